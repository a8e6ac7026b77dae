import csv
import shutil
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise

import cv2
import lightning as L
import pytest
import torch

from callbacks import ChannelPruning
from datamodules import WiderFaceDataModule
from lightning_modules import CompressionModule, RetinaFaceModule
from retinaface.compression.channel_groups import loss_gradients
from retinaface.compression.pruning import PruningSettings, PruningTarget, apply_plan, count_complexity, make_plan
from retinaface.compression.structure import load_network
from retinaface.errors import InputError
from retinaface.model.network import NetworkConfig, normalize


def test_student_is_smaller_and_trained(pruned_run, tiny_checkpoint):
    module = pruned_run.cli.model
    before, _ = load_network(tiny_checkpoint)
    assert sum(p.numel() for p in module.network.parameters()) < 0.6 * sum(p.numel() for p in before.parameters())
    assert module.structure.plans
    assert module.structure.network.activation == "relu"
    untrained = CompressionModule(str(tiny_checkpoint), activation="relu")
    ChannelPruning(ratio=0.4, recalibrate=0).setup(trainer(), untrained, "fit")
    changed = [
        name
        for (name, new), old in zip(module.network.named_parameters(), untrained.network.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert len(changed) == len(list(module.network.parameters()))  # so the optimizer held the pruned parameters


def test_batch_statistics_move_while_fine_tuning(pruned_run):
    norms = {k: v for k, v in pruned_run.cli.model.network.state_dict().items() if k.endswith("num_batches_tracked")}
    assert {int(count) for count in norms.values()} == {6}  # 3 epochs of 2 batches
    assert all(module.training for module in pruned_run.cli.model.network.modules())


def test_what_was_removed_is_drawn_and_logged(pruned_run, tiny_checkpoint):
    assert cv2.imread(str(pruned_run.folder / "kept_channels.png")).std() > 10
    with next(pruned_run.folder.rglob("metrics.csv")).open() as file:
        first = next(csv.DictReader(file))
    params, macs = count_complexity(load_network(tiny_checkpoint)[0])
    left = count_complexity(pruned_run.cli.model.network)
    logged = [int(float(first[f"pruning/{name}"])) for name in ("params_before", "macs_before", "params", "macs")]
    assert logged == [params, macs, *left]
    assert [float(first[f"pruning/{name}"]) for name in ("ms_before", "ms", "speedup")] == [10, 5, 2]


@pytest.mark.parametrize(("options", "trial"), [({}, 1), ({"measure_speed": False}, False)])
def test_nothing_is_timed_for_a_trial_or_where_that_is_not_wanted(module, monkeypatch, options, trial):
    monkeypatch.setattr("retinaface.evaluation.speedup.benchmark", None)
    callback = ChannelPruning(recalibrate=0, **options)
    callback.setup(trainer(fast_dev_run=trial), module, "fit")
    assert list(callback._change.figures()) == ["params_before", "params", "macs_before", "macs"]


def test_killed_and_resumed_run_ends_like_an_uninterrupted_one(pruned_run, pruned_again_run, tmp_path, check_resume):
    """A second pruning after the first, which has all that a resumed run must not do anew."""
    assert len(pruned_again_run.cli.model.structure.plans) == 2
    check_resume(pruned_again_run, tmp_path)


def test_nothing_is_chosen_anew_when_a_fit_goes_on(pruned_run, tmp_path, run_stage, monkeypatch, without_export):
    """Also with ``--ckpt_path=last``, which the trainer alone would look up only after the callbacks' ``setup``."""
    monkeypatch.setattr("callbacks.pruning.make_plan", None)
    shutil.copytree(pruned_run.folder / "checkpoints", tmp_path / "checkpoints")
    for epochs, path in ((4, pruned_run.checkpoint), (5, "last")):
        cli = run_stage(pruned_run.arguments, tmp_path, f"--ckpt_path={path}", f"--trainer.max_epochs={epochs}")
        assert cli.trainer.global_step == 2 * epochs
        assert cli.model.structure.plans == pruned_run.cli.model.structure.plans
        assert not (tmp_path / "kept_channels.png").exists()  # the one of the first start stays right


def test_a_fit_that_finds_no_last_checkpoint_prunes(pruned_run, tmp_path, run_stage, without_export):
    cli = run_stage(pruned_run.arguments, tmp_path, "--ckpt_path=last", "--trainer.max_epochs=1")
    assert cli.trainer.global_step == 2
    assert cli.model.structure.plans == pruned_run.cli.model.structure.plans
    assert (tmp_path / "kept_channels.png").exists()


def test_a_decision_outlives_a_fit_that_was_killed_before_its_first_checkpoint(
    pruned_run, tmp_path, run_stage, monkeypatch, without_export
):
    """All is as in the uninterrupted fit, the adapters' weights, which are drawn after the decision, included."""
    options = ["--model.init_args.distillation.features=1.0", "--trainer.max_epochs=1"]
    options += [f"--trainer.callbacks.init_args.{option}" for option in ("importance=taylor", "recalibrate=20")]
    states = []
    for folder in ("uninterrupted", "killed"):
        run_stage([*pruned_run.arguments, *options], tmp_path / folder)
        states.append(torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        with next((tmp_path / folder).rglob("metrics.csv")).open() as file:
            assert next(csv.DictReader(file))["pruning/speedup"] == "2.0"
        assert (tmp_path / folder / "kept_channels.png").exists()
        if folder == "uninterrupted":
            (tmp_path / "killed").mkdir()
            shutil.copy(tmp_path / folder / "pruning.pt", tmp_path / "killed")
            monkeypatch.setattr("callbacks.pruning.make_plan", None)
            monkeypatch.setattr("callbacks.pruning.update_bn", None)
    assert any(name.startswith("adapters.") for name in states[0])
    assert not [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({"target": PruningTarget(speedup=2.0)}, True),
        ({"importance": "taylor"}, True),
        ({"target": PruningTarget(macs=0.5)}, False),
        ({}, False),
    ],
    ids=str,
)
def test_what_takes_minutes_is_kept(module, data, tmp_path, monkeypatch, options, keeps):
    calls = []
    monkeypatch.setattr("callbacks.pruning.make_plan", lambda *_: calls.append(_) or [("ssh.0.conv5_1.0", [0, 2])])
    modules = [deepcopy(module) for _ in range(2)]
    for each in modules:
        callback = ChannelPruning(recalibrate=0, **options)
        callback.setup(trainer(data, default_root_dir=tmp_path), each, "fit")
        assert callback._change.figures()["speedup"] == 2
    assert len(calls) == (1 if keeps else 2)
    assert [path.name for path in tmp_path.iterdir()] == (["pruning.pt"] if keeps else [])
    assert modules[0].structure.plans == modules[1].structure.plans == [[("ssh.0.conv5_1.0", [0, 2])]]
    ChannelPruning(recalibrate=0, round_to=4, **options).setup(trainer(data, default_root_dir=tmp_path), module, "fit")
    assert len(calls) == (2 if keeps else 3)


def test_a_trial_keeps_nothing(module, data, tmp_path):
    options = {"default_root_dir": tmp_path, "fast_dev_run": 1}
    ChannelPruning(importance="taylor", recalibrate=0).setup(trainer(data, **options), module, "fit")
    assert not list(tmp_path.iterdir())


def test_batch_statistics_come_out_the_same_again(module, data):
    """So those of a plan that is made anew in a moment need not be kept."""
    modules = [deepcopy(module) for _ in range(2)]
    for each in modules:
        ChannelPruning(recalibrate=2).setup(trainer(data), each, "fit")
    before, again = (each.network.state_dict() for each in modules)
    assert not [name for name, value in before.items() if not torch.equal(value, again[name])]


@pytest.mark.slow
def test_plans_pile_up_from_stage_to_stage(
    pruned_run, pruned_again_run, tiny_root, tiny_checkpoint, tmp_path, run_stage, make_stage_arguments, without_export
):
    """Pruned, pruned again, a third time, then INT8: each stage goes on from the checkpoint of the one before."""

    def run(stage, student, *options):
        roles = [f"--model.init_args.student={student}", f"--model.init_args.teacher={tiny_checkpoint}"]
        arguments = make_stage_arguments(stage, tiny_root, *roles, "--trainer.max_epochs=1", *options)
        return run_stage(arguments, tmp_path / stage).model, tmp_path / stage / "checkpoints" / "last.ckpt"

    first, second = ((each.cli.model, each.checkpoint) for each in (pruned_run, pruned_again_run))
    third = run("prune", second[1], "--trainer.callbacks.init_args.round_to=2")
    int8 = run("qat", third[1])
    plans, parameters = [], []
    for module, checkpoint in (first, second, third, int8):
        rebuilt, structure = load_network(checkpoint)
        assert torch.equal(answer(rebuilt), answer(module.network))
        assert structure.plans == module.structure.plans
        plans.append(structure.plans)
        parameters.append(sum(parameter.numel() for parameter in structure.build_float().parameters()))
    assert [len(each) for each in plans] == [1, 2, 3, 3]
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(plans))
    assert parameters[0] > parameters[1] > parameters[2] == parameters[3]
    assert structure.quantization is not None


def answer(network):
    """All that a network says about a picture, in evaluation mode and without a trace of the question."""
    training = network.training
    network.eval()
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(3)) * 255 - 110
    with torch.no_grad():
        outputs = torch.cat(network(picture), dim=2)
    network.train(training)
    return outputs


@pytest.mark.slow
def test_two_processes_end_with_the_same_trained_parameters(pruned_run, tmp_path, check_two_processes):
    """Each sees photos of its own, so each alone would choose other channels, and estimate other statistics."""
    options = ["recalibrate=20", "importance=taylor", "ranking=global", "round_to=1"]
    check_two_processes([*pruned_run.arguments, *(f"--trainer.callbacks.init_args.{o}" for o in options)], tmp_path)


@pytest.mark.slow
def test_refusal_ends_all_processes(pruned_run, tmp_path, run_process):
    options = ["--trainer.callbacks.init_args.target.macs=0.01", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    result = run_process(pruned_run.arguments, tmp_path, *options, "--trainer.strategy=ddp", timeout=100)
    assert result.returncode != 0
    assert result.stderr.count("error: pruning: target {macs: 0.010} cannot be reached") == 2, result.stderr


def trainer(datamodule: L.LightningDataModule | None = None, **options: object) -> L.Trainer:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)
    if datamodule is not None:
        datamodule.setup("fit")
        trainer.datamodule = datamodule
    return trainer


@pytest.fixture
def data(tiny_root) -> WiderFaceDataModule:
    return WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0)


@pytest.fixture
def module(tiny_checkpoint) -> CompressionModule:
    return CompressionModule(str(tiny_checkpoint))


def test_batch_statistics_are_those_of_the_pruned_network(module, data):
    before = deepcopy(module.network)
    ChannelPruning(recalibrate=1).setup(trainer(data), module, "fit")
    batch = next(iter(data.train_dataloader()))
    values = []
    norm = module.network.backbone.stage1[0][1]
    hook = norm.register_forward_hook(lambda _, inputs, output: values.append(inputs[0]))
    with torch.no_grad():
        module.network(normalize(batch["images"]))
    hook.remove()
    expected = values[0].mean((0, 2, 3))
    untouched = deepcopy(before)
    apply_plan(untouched, module.structure.plans[0])
    recalibrated = dict(module.network.named_parameters())
    assert all(torch.equal(recalibrated[name], value) for name, value in untouched.named_parameters())
    # The hook ran in training mode, whose own update has to be undone: 0.1 of the way to what was there already.
    assert torch.allclose(norm.running_mean, expected, atol=1e-3)
    assert not torch.allclose(untouched.backbone.stage1[0][1].running_mean, expected, atol=1e-1)
    assert norm.momentum == 0.1


def test_taylor_looks_at_training_batches(module, data, tmp_path):
    network = deepcopy(module.network).eval()
    batches = list(data.train_dataloader() if data.setup("fit") is None else [])
    losses = (module.task_loss(network(normalize(batch["images"])), batch).total for batch in batches)
    settings = PruningSettings(importance="taylor", ranking="global")
    expected = make_plan(network, settings, loss_gradients(network, losses))
    callback = ChannelPruning(importance="taylor", ranking="global", taylor_batches=9)
    callback.setup(trainer(data, default_root_dir=tmp_path), module, "fit")
    assert module.structure.plans == [expected]
    assert expected != make_plan(network, PruningSettings(ranking="global"))
    assert all(parameter.grad is None for parameter in module.network.parameters())


def test_taylor_refuses_photos_without_labels(module, data):
    data.labels = False
    with pytest.raises(InputError, match="importance taylor looks at the loss against labels"):
        ChannelPruning(importance="taylor").setup(trainer(data), module, "fit")


def test_what_needs_batches_needs_a_data_module(module):
    for callback in (ChannelPruning(), ChannelPruning(importance="taylor", recalibrate=0)):
        with pytest.raises(InputError, match=r"need a data module.*recalibrate to 0"):
            callback.setup(trainer(), module, "fit")


def test_target_from_the_command_line(tiny_checkpoint, tmp_path, run_stage, pruned_run, without_export):
    options = [
        "--trainer.callbacks.init_args.target.macs=0.5",
        "--trainer.callbacks.init_args.ratios={backbone.stage3: 0.5}",
        "--trainer.callbacks.init_args.round_to=4",
        "--trainer.max_epochs=1",
    ]
    module = run_stage(pruned_run.arguments, tmp_path, *options).model
    whole = count_complexity(load_network(tiny_checkpoint)[0], 64)[1]
    assert count_complexity(module.network, 64)[1] / whole == pytest.approx(0.5, rel=0.05)
    assert module.network.backbone.stage3[1][3].out_channels == 128


class FakeTiming:
    def __init__(self, ratio):
        self.median_ms = 10 / ratio
        self.ratio = ratio


def test_target_for_the_speed_is_measured(module, tmp_path, monkeypatch):
    whole = count_complexity(module.network, 64)[1]
    given = []

    @contextmanager
    def meter(original, size, threads):
        given.append((count_complexity(original, 64)[1], size, threads))
        yield lambda network: (FakeTiming(1.0), FakeTiming(whole / count_complexity(network, 64)[1]))

    monkeypatch.setattr("callbacks.pruning.speedup_meter", meter)
    callback = ChannelPruning(target=PruningTarget(speedup=1.5), recalibrate=0, size=96, threads=1)
    callback.setup(trainer(default_root_dir=tmp_path), module, "fit")
    assert given == [(whole, 96, 1)]
    assert whole / count_complexity(module.network, 64)[1] == pytest.approx(1.5, rel=0.05)
    figures = callback._change.figures()
    assert figures["speedup"] == pytest.approx(figures["ms_before"] / figures["ms"])


def test_same_network_is_pruned_twice_in_two_stages(module):
    widths = []
    for _ in range(2):
        ChannelPruning(ratio=0.3, recalibrate=0).setup(trainer(), module, "fit")
        widths.append(sum(p.numel() for p in module.network.parameters()))
    assert widths[1] < widths[0]
    assert len(module.structure.plans) == 2
    rebuilt = module.structure.build()
    assert [p.shape for p in rebuilt.parameters()] == [p.shape for p in module.network.parameters()]


def test_only_a_fit_prunes(module):
    for stage in ("validate", "test", "predict"):
        ChannelPruning().setup(trainer(), module, stage)
    assert module.structure.plans == []


def test_refuses_a_quantized_network(quantized_run):
    with pytest.raises(InputError, match=r"pruning.*quantized already"):
        ChannelPruning().setup(trainer(), quantized_run.cli.model, "fit")


def test_refuses_to_resume_from_a_quantized_checkpoint(pruned_run, quantized_run, tmp_path, run_stage, capsys):
    with pytest.raises(SystemExit):
        run_stage(pruned_run.arguments, tmp_path, f"--ckpt_path={quantized_run.checkpoint}")
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert str(quantized_run.checkpoint) in message
    assert "quantized" in message


def test_refuses_to_resume_from_another_stage():
    module = RetinaFaceModule(NetworkConfig(channels=16))
    with pytest.raises(InputError, match="not of this pruning stage"):
        ChannelPruning().on_fit_start(trainer(), module)


def test_a_second_pruning_refuses_to_resume_from_the_first(pruned_run, tmp_path, run_stage, capsys):
    arguments = [f"--model.init_args.student={pruned_run.checkpoint}", f"--ckpt_path={pruned_run.checkpoint}"]
    with pytest.raises(SystemExit):
        run_stage(pruned_run.arguments, tmp_path, *arguments)
    assert "not of this pruning stage" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("setting", [{"ratio": 1.5}, {"recalibrate": -1}, {"taylor_batches": 0}, {"size": 10}], ids=str)
def test_bad_settings_are_named(setting):
    (name,) = setting
    with pytest.raises(InputError, match=rf"{name} is -?\d"):
        ChannelPruning(**setting)
