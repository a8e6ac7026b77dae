import shutil

import lightning as L
import pytest
import torch

import callbacks.quantization
from callbacks import QuantizationAwareTraining
from datamodules import WiderFaceDataModule
from lightning_modules import CompressionModule
from retinaface.compression.quantization import FakeQuantizedRetinaFace
from retinaface.compression.structure import load_network
from retinaface.errors import InputError
from retinaface.evaluation.mixed_precision import Choice, MixedPrecision, Trial


class Watch(L.Callback):
    """Copies batch statistics and ranges of activations after each epoch's training and after its validation."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_validation_start(self, trainer, pl_module):
        self.trained.append(self.copy(pl_module))

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(self.copy(pl_module))

    def copy(self, pl_module):
        state = pl_module.network.state_dict()
        statistics = {k: v.clone() for k, v in state.items() if k.endswith(("running_mean", "running_var"))}
        # Ranges of the weights have a value per channel and follow the weights.
        ranges = {k: v.clone() for k, v in state.items() if k.endswith(("min_val", "max_val")) and v.numel() == 1}
        return statistics, ranges


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_statistics_and_ranges_move_in_training_alone_until_they_freeze(tiny_root, tiny_checkpoint, tmp_path):
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[QuantizationAwareTraining(freeze_at=0.6), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint))
    trainer.fit(module, datamodule=WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0))

    for before, after in zip(watch.trained, watch.validated, strict=True):
        for kind in range(2):
            assert before[kind]
            assert not moved(before[kind], after[kind])
    statistics, ranges = watch.validated[0]
    assert moved(statistics, watch.trained[1][0]) == set(statistics)
    assert len(moved(ranges, watch.trained[1][1])) > 0.5 * len(ranges)  # a lower end at 0 after a ReLU stays there
    for kind in range(2):
        assert not moved(watch.validated[1][kind], watch.trained[2][kind])  # frozen: 2 of 3 epochs are over


@pytest.mark.slow  # test_mixed_precision_changes_nothing looks at a single step
def test_mixed_precision_trains_and_validates_the_same_student(tiny_root, tiny_checkpoint, tmp_path):
    found = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = L.Trainer(
            accelerator="cpu",
            precision=precision,
            max_epochs=1,
            callbacks=[QuantizationAwareTraining()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = CompressionModule(str(tiny_checkpoint))
        trainer.fit(module, datamodule=WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0))
        found.append((module.state_dict(), trainer.callback_metrics["val/ap_all"]))
    (precise, precise_ap), (mixed, mixed_ap) = found
    assert not moved(precise, mixed)
    assert mixed_ap == precise_ap > 0


@pytest.mark.parametrize("stage", ["teacher", "prune", pytest.param("qat", marks=pytest.mark.slow)])
def test_stages_take_a_step_in_mixed_precision(
    stage, tiny_root, tiny_checkpoint, tmp_path, make_stage_arguments, run_stage
):
    roles = ("weights",) if stage == "teacher" else ("student", "teacher")
    start = [f"--model.init_args.{role}={tiny_checkpoint}" for role in roles]
    options = ["--trainer.precision=bf16-mixed", "--trainer.fast_dev_run=1"]
    cli = run_stage([*make_stage_arguments(stage, tiny_root, *start), *options], tmp_path)
    assert cli.trainer.global_step == 1
    assert cli.trainer.callback_metrics["train/loss"].isfinite()


def test_student_is_quantized_and_every_parameter_trained(quantized_run, pruned_run):
    module = quantized_run.cli.model
    assert isinstance(module.network, FakeQuantizedRetinaFace)
    assert module.structure.quantization is not None
    start = CompressionModule(str(pruned_run.checkpoint))
    QuantizationAwareTraining().setup(quantized_run.cli.trainer, start, "fit")
    before = dict(start.network.named_parameters())
    same = [name for name, value in module.network.named_parameters() if torch.equal(value, before[name])]
    assert not same  # so the optimizer held the parameters of the quantized graph


def test_checkpoint_rebuilds_the_trained_student(quantized_run):
    network, structure = load_network(quantized_run.checkpoint)
    assert len(structure.plans) == 1
    images = torch.rand(1, 3, 64, 96) * 255 - 110
    trained = quantized_run.cli.model.network.eval()
    with torch.no_grad():
        for expected, actual in zip(trained(images), network(images), strict=True):
            assert torch.equal(expected, actual)


def test_killed_and_resumed_run_ends_like_an_uninterrupted_one(quantized_run, tmp_path, check_resume):
    check_resume(quantized_run, tmp_path)


def test_two_processes_end_with_the_same_trained_parameters(quantized_run, tmp_path, check_two_processes):
    check_two_processes(quantized_run.arguments, tmp_path)


def test_refuses_a_quantized_network(quantized_run, tiny_checkpoint):
    with pytest.raises(InputError, match=r"quantization.*quantized already"):
        QuantizationAwareTraining().setup(quantized_run.cli.trainer, quantized_run.cli.model, "fit")
    with pytest.raises(InputError, match="quantized already"):
        CompressionModule(str(quantized_run.checkpoint), str(tiny_checkpoint))


def test_refuses_to_resume_from_another_stage(tiny_root, pruned_run, quantized_run, tmp_path, run_stage, capsys):
    no_features = "--model.init_args.distillation.features=0"  # their adapters would be missed before
    with pytest.raises(SystemExit):
        run_stage(quantized_run.arguments, tmp_path, no_features, f"--ckpt_path={pruned_run.checkpoint}")
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {pruned_run.checkpoint}: was not prepared for INT8")


def test_bad_settings_are_named():
    for freeze_at in (0, -0.1, 2):  # frozen from the start, no range would ever be seen
        with pytest.raises(InputError, match=f"freeze_at is {freeze_at}"):
            QuantizationAwareTraining(freeze_at=freeze_at)
    module = CompressionModule()
    with pytest.raises(InputError, match="nowhere"):
        QuantizationAwareTraining(keep_float=["nowhere"]).setup(L.Trainer(logger=False), module, "fit")
    for name, value in (("ap_budget", -0.1), ("ap_budget", 1), ("choose_photos", 0)):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            QuantizationAwareTraining(**{name: value})


@pytest.fixture
def asked(monkeypatch, without_export):
    """What a choice was asked for, each time; it is the pyramid, at once instead of in a quarter of an hour."""
    asked = []

    def choose(network, samples, pictures, budget, settings, size, threads, report):
        chosen, whole = Trial(("fpn",), 0.795, 1.1, True), Trial(None, 0.8, 0.5, True)
        asked.append((samples, pictures, budget, settings))
        torch.rand(3)  # as exports do
        report(chosen)
        return Choice(chosen, whole, [chosen], MixedPrecision(len(samples), whole, Trial((), 0.7, 1.0, False), {}))

    monkeypatch.setattr(callbacks.quantization, "choose_keep_float", choose)
    return asked


AUTO = "--trainer.callbacks.init_args.keep_float=auto"


def test_what_stays_in_float_is_chosen_on_training_photos(quantized_run, asked, tmp_path, run_stage, caplog):
    options = ["ap_budget=0.02", "choose_photos=3", "weight_bits=7"]
    more = [AUTO, *(f"--trainer.callbacks.init_args.{option}" for option in options), "--trainer.max_epochs=1"]
    with caplog.at_level("INFO"):
        cli = run_stage(quantized_run.arguments, tmp_path, *more)
    ((samples, pictures, budget, settings),) = asked
    train = [sample.path for sample in cli.datamodule.train_samples]
    measured_on = [sample.path for sample in samples]
    assert len(measured_on) == 3
    assert set(measured_on) < set(train)
    assert pictures._samples
    assert {sample.path for sample in pictures._samples} <= set(train) - set(measured_on)
    assert (budget, settings.weight_bits) == (0.02, 7)
    assert "chose fpn in float: AP 0.7950" in caplog.text

    network, structure = load_network(tmp_path / "checkpoints" / "last.ckpt")
    assert structure.quantization.keep_float == ("fpn",)
    assert structure.quantization.weight_bits == 7
    assert isinstance(network, FakeQuantizedRetinaFace)

    cli = run_stage(quantized_run.arguments, tmp_path, *more[:-1], "--ckpt_path=last", "--trainer.max_epochs=2")
    assert cli.trainer.global_step == 4
    assert len(asked) == 1  # nothing is chosen anew
    assert cli.model.structure.quantization.keep_float == ("fpn",)


@pytest.mark.slow
def test_a_choice_outlives_a_fit_that_was_killed_before_its_first_checkpoint(quantized_run, asked, tmp_path, run_stage):
    arguments = [*quantized_run.arguments, AUTO, "--trainer.max_epochs=1"]
    states = []
    for folder in ("uninterrupted", "killed"):
        run_stage(arguments, tmp_path / folder)
        states.append(torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        if folder == "uninterrupted":
            (tmp_path / "killed").mkdir()
            shutil.copy(tmp_path / folder / "keep_float.pt", tmp_path / "killed")
    assert len(asked) == 1
    assert not moved(*states)
    run_stage([*arguments, "--trainer.callbacks.init_args.ap_budget=0.02"], tmp_path / "killed")
    assert len(asked) == 2


def test_names_from_the_command_line(quantized_run, asked, tmp_path, run_stage):
    names = ["--trainer.callbacks.init_args.keep_float=[ssh.1,'*_heads']", "--trainer.fast_dev_run=true"]
    cli = run_stage(quantized_run.arguments, tmp_path, *names)
    assert list(cli.model.structure.quantization.keep_float) == ["ssh.1", "*_heads"]
    assert not asked


def test_a_trial_measures_nothing(quantized_run, asked, tmp_path, run_stage):
    cli = run_stage(quantized_run.arguments, tmp_path, AUTO, "--trainer.fast_dev_run=true")
    assert not asked
    assert isinstance(cli.model.network, FakeQuantizedRetinaFace)
    assert not list(tmp_path.glob("*.pt"))


def test_a_choice_needs_a_data_module(tiny_checkpoint):
    module = CompressionModule(str(tiny_checkpoint))
    with pytest.raises(InputError, match=r"keep_float auto .* needs a data module"):
        QuantizationAwareTraining("auto").setup(L.Trainer(accelerator="cpu", logger=False), module, "fit")


@pytest.mark.slow
def test_an_error_of_the_choice_ends_all_processes(quantized_run, tmp_path, run_process):
    options = [AUTO, "--trainer.callbacks.init_args.backend=openvino", "--trainer.accelerator=cpu"]
    processes = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    result = run_process(quantized_run.arguments, tmp_path, *options, *processes, timeout=200)
    assert result.returncode != 0
    assert result.stderr.count("error: quantization: what stays in float is chosen by timings") == 2, result.stderr
