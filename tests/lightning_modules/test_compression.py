import lightning as L
import pytest
import torch

from datamodules import WiderFaceDataModule
from lightning_modules import CompressionModule
from lightning_modules.compression import DistillationSettings
from retinaface.errors import InputError


def fit(module, root, folder, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, datamodule=WiderFaceDataModule(root, train_size=64, batch_size=4, num_workers=0))
    return trainer


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
    for name in ("train/loss", "train/classes", "distillation/loss", "distillation/classes", "distillation/boxes"):
        assert torch.isfinite(logged[name]), name
    assert "val/ap_all" in logged


def test_distillation_has_its_share_of_the_loss(tiny_root, tiny_checkpoint, fitted, monkeypatch):
    module = CompressionModule(
        str(tiny_checkpoint), str(tiny_checkpoint), distillation=DistillationSettings(weight=0.25)
    )
    data = WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    logged = {}
    monkeypatch.setattr(module, "log_losses", lambda name, losses, size: logged.update({name: losses.total}))
    total = module.training_step(batch, 0)
    assert logged["distillation"] > 0  # the student's batch norms use the batch, the teacher's do not
    assert total == 0.25 * logged["distillation"] + 0.75 * logged["train"]
    module.teacher = None
    assert module.training_step(batch, 0) == logged["train"]


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


@pytest.mark.parametrize("settings", [{"weight": 1.1}, {"temperature": 0}], ids=lambda value: next(iter(value)))
def test_bad_distillation_settings_are_named(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        DistillationSettings(**settings)
