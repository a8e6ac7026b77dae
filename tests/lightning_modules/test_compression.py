from copy import deepcopy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import distributed, nn

from datamodules import WiderFaceDataModule
from lightning_modules import CompressionModule
from retinaface.compression.distillation import DistillationSettings
from retinaface.compression.features import FeatureTap
from retinaface.compression.pruning import PruningSettings, apply_plan, make_plan
from retinaface.compression.quantization import FakeQuantizedRetinaFace
from retinaface.compression.structure import load_network
from retinaface.delivery.export import export_onnx
from retinaface.errors import InputError

FEATURES = DistillationSettings(features=1.0)


def fit(module, root, folder, max_epochs=1, ckpt_path=None, enable_checkpointing=False, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=enable_checkpointing,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    data = WiderFaceDataModule(root, train_size=64, batch_size=4, num_workers=0)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


class Prune(L.Callback):
    """Removes channels in ``setup``, as ``callbacks.ChannelPruning`` does."""

    def setup(self, trainer, pl_module, stage):
        plan = make_plan(pl_module.network, PruningSettings(ratio=0.5, round_to=4))
        apply_plan(pl_module.network, plan)
        pl_module.structure.plans.append(plan)


class Quantize(L.Callback):
    """Puts a quantized network in the student's place in ``setup``."""

    def __init__(self, compressed):
        self.network, self.structure = deepcopy(compressed.int8), deepcopy(compressed.structure)

    def setup(self, trainer, pl_module, stage):
        pl_module.network, pl_module.structure = self.network.train(), self.structure


@pytest.fixture(scope="module")
def fitted(tiny_root, tiny_checkpoint, tmp_path_factory):
    """A module after an epoch with a teacher, its trainer and its saved checkpoint."""
    folder = tmp_path_factory.mktemp("compression")
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint))
    trainer = fit(module, tiny_root, folder)
    trainer.save_checkpoint(folder / "saved.ckpt")
    return module, trainer, folder / "saved.ckpt"


def test_teacher_stays_as_it_was_and_student_learns(fitted, tiny_checkpoint):
    module, trainer, _ = fitted
    start = torch.load(tiny_checkpoint, weights_only=True)["state_dict"]
    teacher = module.teacher.state_dict()
    assert all(torch.equal(value, start[f"network.{name}"]) for name, value in teacher.items())
    assert not any(submodule.training for submodule in module.teacher.modules())
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    trained = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in module.student.parameters()}
    assert not [name for name, p in module.student.named_parameters() if torch.equal(p, start[f"network.{name}"])]


def test_mode_of_the_teacher_never_changes(fitted):
    module = fitted[0]
    for mode in (True, False, True):
        module.train(mode)
        assert module.training == module.student.training == mode
        assert not module.teacher.training


def test_losses_of_both_kinds_are_logged(fitted):
    logged = fitted[1].callback_metrics
    for name in ("train/loss", "train/classes", "distillation/loss", "distillation/logits", "distillation/boxes"):
        assert torch.isfinite(logged[name]), name
    assert "distillation/features" not in logged  # no weight
    assert "val/ap_all" in logged


@pytest.fixture
def batch(tiny_root):
    data = WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.fixture
def logged(monkeypatch):
    """What a module logs outside a trainer."""
    logged = {}
    monkeypatch.setattr(CompressionModule, "log", lambda _, name, value, **options: logged.update({name: value}))
    monkeypatch.setattr(CompressionModule, "log_dict", lambda _, values, **options: logged.update(values))
    return logged


def test_distillation_has_its_share_of_the_loss(tiny_checkpoint, batch, logged):
    module = CompressionModule(
        str(tiny_checkpoint), str(tiny_checkpoint), distillation=DistillationSettings(weight=0.25)
    )
    total = module.training_step(batch, 0)
    assert logged["distillation/loss"] > 0  # the student's batch norms use the batch, the teacher's do not
    assert total == 0.25 * logged["distillation/loss"] + 0.75 * logged["train/loss"]
    parts = [logged[f"distillation/{part}"] for part in ("logits", "boxes", "landmarks")]
    assert logged["distillation/loss"] == sum(parts)
    module.teacher = None
    assert module.training_step(batch, 0) == logged["train/loss"]


def test_a_teacher_without_a_share_is_not_asked(tiny_checkpoint, batch, logged):
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint), distillation=DistillationSettings(weight=0))
    module.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was asked"))
    assert module.training_step(batch, 0) == logged["train/loss"]
    assert not any(name.startswith("distillation/") for name in logged)


def test_photos_alone_are_enough(tiny_checkpoint, batch, logged):
    """At a weight of 1 the labels are not looked at, and every parameter learns."""
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint), distillation=DistillationSettings(weight=1))
    loss = module.training_step({"images": batch["images"]}, 0)
    loss.backward()
    assert loss == logged["distillation/loss"]
    assert not any(name.startswith("train/") for name in logged)
    assert all(parameter.grad.isfinite().all() for parameter in module.student.parameters())
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_the_teacher_is_asked_once_a_batch(tiny_checkpoint, batch, logged):
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint))
    asked = []
    module.teacher.register_forward_hook(lambda _, images, outputs: asked.append(outputs))
    module.training_step(batch, 0)
    ((logits, *_),) = asked
    assert not logits.requires_grad


@pytest.mark.parametrize(
    ("precision", "around", "expected"),
    [
        (None, False, torch.float32),
        (None, True, torch.bfloat16),
        ("bfloat16", False, torch.bfloat16),
        ("float32", True, torch.float32),
    ],
)
def test_precision_of_the_teacher(tiny_checkpoint, batch, logged, precision, around, expected):
    settings = DistillationSettings(teacher_precision=precision)
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint), distillation=settings)
    found = {}
    for network in ("student", "teacher"):
        getattr(module, network).register_forward_hook(lambda _, i, outputs, n=network: found.update({n: outputs[0]}))
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        loss = module.training_step(batch, 0)
    assert found["teacher"].dtype == expected
    assert found["student"].dtype == (torch.bfloat16 if around else torch.float32)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("feature_loss", ["pkd", "cwd", "mse"])
def test_no_part_of_the_loss_waits_for_the_device(tiny_checkpoint, batch, logged, no_waiting, feature_loss):
    settings = DistillationSettings(features=1.0, feature_loss=feature_loss)
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint), distillation=settings)
    module._make_adapters()
    module._teacher_tap = FeatureTap(module.teacher, "fpn")
    with no_waiting:
        module.training_step(batch, 0).backward()
    assert logged["distillation/features"] > 0


def test_a_compiled_student_learns_no_features(tiny_checkpoint):
    networks = (str(tiny_checkpoint), str(tiny_checkpoint))
    CompressionModule(*networks, compile_network=True)
    with pytest.raises(InputError, match=r"compile_network is set.* set distillation\.features to 0"):
        CompressionModule(*networks, distillation=FEATURES, compile_network=True)


def test_teacher_is_not_in_the_checkpoint(fitted):
    _, _, checkpoint = fitted
    content = torch.load(checkpoint, weights_only=True)
    assert content["state_dict"]
    assert all(key.startswith("network.") for key in content["state_dict"])


def test_loads_without_the_files_of_student_and_teacher(fitted):
    module, _, checkpoint = fitted
    loaded = CompressionModule.load_from_checkpoint(checkpoint, map_location="cpu")
    assert loaded.teacher is None
    expected = module.student.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.student.state_dict().items())


def test_nothing_to_train_without_a_student(tiny_root, tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match="student: none given"):
        fit(CompressionModule(teacher=str(tiny_checkpoint)), tiny_root, tmp_path)


def test_everything_but_the_teacher_must_match(fitted, tiny_checkpoint, tmp_path):
    _, _, checkpoint = fitted
    content = torch.load(checkpoint, weights_only=True)
    for damage in ("missing", "unexpected"):
        weights = dict(content["state_dict"])
        if damage == "missing":
            del weights["network.class_heads.0.weight"]
        else:
            weights["network.surplus"] = torch.zeros(1)
        path = tmp_path / f"{damage}.ckpt"
        torch.save({**content, "state_dict": weights}, path)
        for teacher in (None, str(tiny_checkpoint)):
            with pytest.raises(RuntimeError, match=r"class_heads\.0\.weight|network\.surplus"):
                CompressionModule.load_from_checkpoint(path, teacher=teacher, map_location="cpu")


def test_teacher_with_other_anchors_is_refused(build_network, save_checkpoint, tiny_checkpoint, tmp_path):
    network = build_network(channels=16, anchor_sizes=((8, 16), (64, 128), (256, 512)))
    path = save_checkpoint(network, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"other\.ckpt: its anchor_sizes .* give a teacher of the same network"):
        CompressionModule(str(tiny_checkpoint), str(path))


def test_activation_changes_and_weights_stay(tiny_checkpoint):
    module = CompressionModule(str(tiny_checkpoint), activation="relu")
    assert module.structure.network.activation == "relu"
    assert any(isinstance(submodule, torch.nn.ReLU) for submodule in module.student.modules())
    start = torch.load(tiny_checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, start[f"network.{name}"]) for name, value in module.student.state_dict().items())


@pytest.fixture(scope="module")
def pruned(tiny_root, tiny_checkpoint, tmp_path_factory):
    """A module pruned when its fit of two epochs began, with features distilled, and its folder of checkpoints."""
    folder = tmp_path_factory.mktemp("features")
    return fit_pruned(tiny_root, tiny_checkpoint, folder), folder


def fit_pruned(root, checkpoint, folder, ckpt_path=None, **settings):
    torch.manual_seed(4)
    distillation = DistillationSettings(**{"features": 1.0} | settings)
    module = CompressionModule(str(checkpoint), str(checkpoint), distillation=distillation)
    save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    fit(
        module,
        root,
        folder,
        max_epochs=2,
        ckpt_path=ckpt_path,
        enable_checkpointing=True,
        callbacks=[Prune(), save],
    )
    return module


def test_adapters_of_a_pruned_student_are_trained(pruned):
    module, folder = pruned
    assert [(a.in_channels, a.out_channels) for a in module.adapters] == [(8, 16)] * 3
    assert torch.isfinite(module.trainer.callback_metrics["distillation/features"])
    trained = {id(parameter) for group in module.trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {id(p) for part in (module.student, module.adapters) for p in part.parameters()}
    first, second = (torch.load(folder / f"epoch={n}.ckpt", weights_only=True)["state_dict"] for n in range(2))
    assert not [key for key, p in module.named_parameters() if p.requires_grad and torch.equal(first[key], second[key])]


def test_adapters_are_in_the_checkpoint_but_no_part_of_the_student(pruned):
    module, folder = pruned
    weights = torch.load(folder / "epoch=1.ckpt", weights_only=True)["state_dict"]
    adapters = {key.removeprefix("adapters."): value for key, value in weights.items() if "adapters." in key}
    assert all(torch.equal(adapters[key], value) for key, value in module.adapters.state_dict().items())
    assert {key.split(".")[0] for key in weights} == {"network", "adapters"}
    network, structure = load_network(folder / "epoch=1.ckpt")
    assert structure.plans == module.structure.plans
    for checkpoint_of in (None, "teacher"):
        again = CompressionModule.load_from_checkpoint(
            folder / "epoch=1.ckpt",
            map_location="cpu",
            **({} if checkpoint_of is None else {"teacher": str(folder / "epoch=0.ckpt"), "distillation": FEATURES}),
        )
        assert not again.adapters
        for loaded in (network, again.student):
            assert all(torch.equal(value, weights[f"network.{key}"]) for key, value in loaded.state_dict().items())


def test_unknown_weights_beside_adapters_are_still_refused(pruned, tmp_path):
    content = torch.load(pruned[1] / "epoch=1.ckpt", weights_only=True)
    content["state_dict"]["adapter.0.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "surplus.ckpt")
    with pytest.raises(RuntimeError, match=r"adapter\.0\.weight"):
        CompressionModule.load_from_checkpoint(tmp_path / "surplus.ckpt", map_location="cpu")


def test_a_resumed_fit_ends_like_an_uninterrupted_one(pruned, tiny_root, tiny_checkpoint, tmp_path):
    module, folder = pruned
    resumed = fit_pruned(tiny_root, tiny_checkpoint, tmp_path, ckpt_path=folder / "epoch=0.ckpt")
    for part in ("student", "adapters"):
        expected = getattr(module, part).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(resumed, part).state_dict().items())


def test_a_fit_goes_on_only_with_its_own_adapters(pruned, tiny_root, tiny_checkpoint, tmp_path):
    path = pruned[1] / "epoch=0.ckpt"
    with pytest.raises(InputError, match=r"epoch=0.ckpt: was trained with another distillation of features"):
        fit_pruned(tiny_root, tiny_checkpoint, tmp_path, ckpt_path=path, features=0.0)


class WatchBroadcast(L.Callback):
    """Notes what the first process sends to the others in every step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.names = list(trainer.strategy.model.named_module_buffers)


@pytest.fixture
def in_process_group():
    """Options of a trainer whose one process takes part in a training of several."""
    yield {"strategy": "ddp", "devices": 1}
    distributed.destroy_process_group()


def test_a_teacher_is_not_sent_to_other_processes(tiny_root, tiny_checkpoint, tmp_path, in_process_group):
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint))
    names = list(module.state_dict())
    watch = WatchBroadcast()
    fit(module, tiny_root, tmp_path, limit_val_batches=0, callbacks=[watch], **in_process_group)
    assert watch.names == [f"network.{name}" for name, _ in module.network.named_buffers()]
    assert list(module.state_dict()) == names


def test_several_processes_can_learn_features_alone(tiny_root, tiny_checkpoint, tmp_path, in_process_group):
    settings = DistillationSettings(weight=1, logits=0, boxes=0, landmarks=0, features=1)
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint), distillation=settings)
    trainer = fit(module, tiny_root, tmp_path, limit_val_batches=0, **in_process_group)
    assert trainer.global_step == 2  # the second one fails where the first left a parameter without gradient


@pytest.mark.parametrize("levels", ["fpn", "ssh", "all"])
@pytest.mark.parametrize(
    "parts", [{"landmarks": 0}, {"logits": 0, "boxes": 0}, {"logits": 0, "boxes": 0, "landmarks": 0}], ids=str
)
def test_all_that_is_trained_has_gradients_and_nothing_else(
    tiny_checkpoint, compressed, batch, logged, monkeypatch, parts, levels
):
    monkeypatch.setattr(CompressionModule, "_fits", True)
    settings = DistillationSettings(weight=1, features=1, feature_loss="cwd", feature_levels=levels, **parts)
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint), distillation=settings)
    for student in (module.network, deepcopy(compressed.int8).train()):
        module.network = student
        module._leave_out_gradients()
        module._make_adapters()
        module._teacher_tap = module._teacher_tap or FeatureTap(module.teacher, levels)
        module.training_step(batch, 0).backward()
        for name, parameter in module.network.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        resting = {name for name, parameter in module.network.named_parameters() if not parameter.requires_grad}
        assert resting
        assert any("ssh" in name for name in resting) == (len(parts) == 3 and levels == "fpn")


def test_what_the_labels_reach_learns_though_the_teacher_leaves_it_out():
    assert DistillationSettings(weight=0.9, landmarks=0).untaught == []
    assert DistillationSettings(weight=1).untaught == []
    assert DistillationSettings(weight=1, landmarks=0).untaught == ["landmark_heads"]


def test_features_of_a_quantized_student(compressed, save_checkpoint, tiny_root, tmp_path):
    original = save_checkpoint(compressed.original, tmp_path / "original.ckpt")
    settings = DistillationSettings(weight=1, features=1.0, feature_loss="cwd", feature_levels="ssh")
    module = CompressionModule(str(original), str(original), distillation=settings)
    trainer = fit(module, tiny_root, tmp_path, callbacks=[Quantize(compressed)], limit_val_batches=0)
    assert isinstance(module.student, FakeQuantizedRetinaFace)
    assert [type(adapter) for adapter in module.adapters] == [nn.Conv2d] * 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.adapters.parameters())
    assert trainer.callback_metrics["distillation/features"] > 0


def test_equal_widths_need_no_adapters(tiny_root, tiny_checkpoint, tmp_path):
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint), distillation=FEATURES)
    trainer = fit(module, tiny_root, tmp_path, limit_val_batches=0, fast_dev_run=True)
    assert not list(module.adapters.parameters())
    assert trainer.callback_metrics["distillation/features"] > 0


def test_the_teacher_is_compiled_for_any_size(tiny_root, tiny_checkpoint, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network, **options: compiled.append((network, options)))
    settings = DistillationSettings(compile_teacher=True)
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint), distillation=settings)
    fit(module, tiny_root, tmp_path, fast_dev_run=True)
    assert compiled == [(module.teacher, {"dynamic": True})]


def test_a_fake_quantized_student_is_not_compiled(compressed, save_checkpoint, tiny_root, tmp_path):
    original = save_checkpoint(compressed.original, tmp_path / "original.ckpt")
    module = CompressionModule(str(original), compile_network=True)
    with pytest.raises(InputError, match=r"compile_network is set, but a fake-quantized network .* leave it out"):
        fit(module, tiny_root, tmp_path, callbacks=[Quantize(compressed)], fast_dev_run=True)


class AskForSyncBatchNorm(L.Callback):
    """Makes the strategy that of a fit with ``sync_batchnorm`` in several processes."""

    def setup(self, trainer, pl_module, stage):
        trainer.strategy._layer_sync = TorchSyncBatchNorm()


def test_batch_norms_of_a_fake_quantized_student_stay_apart_and_that_is_said(
    compressed, save_checkpoint, tiny_root, tmp_path
):
    original = save_checkpoint(compressed.original, tmp_path / "original.ckpt")
    callbacks = [Quantize(compressed), AskForSyncBatchNorm()]
    with pytest.warns(UserWarning, match=r"sync_batchnorm does not reach the batch norms of a fake-quantized network"):
        fit(CompressionModule(str(original)), tiny_root, tmp_path, callbacks=callbacks, fast_dev_run=True)


def test_batch_norms_cannot_be_synchronised_without_gpus(tiny_root, tiny_checkpoint, tmp_path):
    module = CompressionModule(str(tiny_checkpoint))
    with pytest.raises(InputError, match="trainer: sync_batchnorm needs GPUs"):
        fit(module, tiny_root, tmp_path, callbacks=[AskForSyncBatchNorm()], fast_dev_run=True)


@pytest.mark.slow
def test_synchronised_batch_norms_are_exported_and_keep_their_names(tiny_network, tmp_path):
    """The check of the exported file compares it with the network."""
    names = list(tiny_network.state_dict())
    network = TorchSyncBatchNorm().apply(tiny_network)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    assert list(network.state_dict()) == names
    export_onnx(network, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same(tiny_root, tiny_checkpoint, tmp_path, monkeypatch):
    """Its features are recorded too, and its weights keep their names; with a backend that only traces."""

    def trace(network, **options):
        network._compiled_call_impl = torch.compile(network._call_impl, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", trace)
    totals = []
    for compiles in (False, True):
        settings = DistillationSettings(features=1.0, compile_teacher=compiles)
        module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint), distillation=settings)
        names = list(module.state_dict())
        trainer = fit(module, tiny_root, tmp_path, limit_val_batches=0)
        totals.append(trainer.callback_metrics["distillation/loss"])
        assert list(module.state_dict()) == names
    assert (module.teacher._compiled_call_impl is None) is not compiles
    assert totals[0] == totals[1]
