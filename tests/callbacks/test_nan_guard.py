from pathlib import Path
from types import SimpleNamespace

import cv2
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks import NanGuard
from datamodules import WiderFaceDataModule
from lightning_modules import RetinaFaceModule
from retinaface.errors import InputError

SPOIL = "--trainer.callbacks+=stage_process.SpoilLandmarks"


class SpoilBeforeStep(L.Callback):
    """Makes a gradient infinite in the hook that the guard looks in, as a regularisation might."""

    names = ()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pl_module.network.class_heads[0].bias.grad.fill_(torch.inf)


class Spoil(L.Callback):
    """Makes the loss of one batch, or a gradient, NaN; notes the photos of all batches and the weights after steps."""

    def __init__(self, batch: int = 99, gradient_at: int = 99):
        self.batch, self.gradient_at = batch, gradient_at
        self.names, self.weights = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})
        self.names.append(batch["names"])
        if len(self.names) == self.batch:
            batch["landmarks"].fill_(torch.nan)
            batch["has_landmarks"].fill_(True)

    def on_after_backward(self, trainer, pl_module):
        if len(self.names) == self.gradient_at:
            pl_module.network.class_heads[0].bias.grad.fill_(torch.inf)


def fit(spoil: L.Callback, tiny_root: Path, tiny_checkpoint: Path, folder: Path, **options) -> RetinaFaceModule:
    module = RetinaFaceModule(weights=str(tiny_checkpoint))
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[NanGuard(), spoil, ModelCheckpoint(folder, filename="last")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
        **{"max_epochs": 2} | options,
    )
    trainer.fit(module, datamodule=WiderFaceDataModule(tiny_root, train_size=64, batch_size=2, num_workers=0))
    return module


def same(module, weights) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in module.named_parameters())


def test_stops_before_the_step_and_keeps_the_batch(tiny_root, tiny_checkpoint, tmp_path, monkeypatch):
    modules = []
    monkeypatch.setattr(NanGuard, "setup", lambda self, trainer, module, stage: modules.append(module))
    spoil = Spoil(batch=6)  # the second of the second epoch
    with pytest.raises(InputError) as error:
        fit(spoil, tiny_root, tiny_checkpoint, tmp_path)
    message = str(error.value)
    photos = spoil.names[-1]
    assert len(photos) == 2
    assert "epoch 1, step 5, the loss is not finite (train/classes " in message
    assert "train/landmarks nan" in message
    assert "val/" not in message
    assert "lr-" not in message
    assert f"with the photos {', '.join(photos)};" in message
    assert "\n" not in message
    assert same(modules[0], spoil.weights[-1])
    assert not same(modules[0], spoil.weights[-2])

    saved = torch.load(tmp_path / "non_finite_batch_rank0.pt", weights_only=True)
    assert saved["images"].shape == (2, 3, 64, 64)
    assert saved["landmarks"].isnan().all()
    assert {"boxes", "labels", "has_landmarks"} <= saved.keys()
    assert saved["names"] == photos
    assert (saved["epoch"], saved["step"], saved["rank"]) == (1, 5, 0)
    assert not torch.tensor(saved["losses"]["train/loss"]).isfinite()
    assert torch.tensor(saved["losses"]["train/classes"]).isfinite()
    assert cv2.imread(str(tmp_path / "non_finite_batch_rank0.jpg")) is not None

    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_gradients_count_as_well(tiny_root, tiny_checkpoint, tmp_path):
    spoil = Spoil(gradient_at=2)
    with pytest.raises(InputError, match=r"step 1, the gradients are not finite") as error:
        fit(spoil, tiny_root, tiny_checkpoint, tmp_path)
    assert ", ".join(spoil.names[1]) in str(error.value)
    assert torch.load(tmp_path / "non_finite_batch_rank0.pt", weights_only=True)["names"] == spoil.names[1]


def test_the_batch_is_named_where_gradients_are_accumulated(tiny_root, tiny_checkpoint, tmp_path):
    spoil = Spoil(batch=3)
    with pytest.raises(InputError, match="step 1, the loss") as error:
        fit(spoil, tiny_root, tiny_checkpoint, tmp_path, accumulate_grad_batches=2)
    assert len(spoil.names) == 4
    assert f"photos {', '.join(spoil.names[2])};" in str(error.value)


def test_changes_nothing_else(tiny_root, tiny_checkpoint, tmp_path, monkeypatch):
    guarded = fit(Spoil(), tiny_root, tiny_checkpoint, tmp_path / "guarded", max_epochs=1)
    for hook in ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step"):
        monkeypatch.delattr(NanGuard, hook)
    torch.manual_seed(0)
    assert same(
        fit(Spoil(), tiny_root, tiny_checkpoint, tmp_path / "free", max_epochs=1), dict(guarded.named_parameters())
    )


def test_is_on_by_default_and_ends_a_run_with_one_line(
    tiny_root, tiny_checkpoint, tmp_path, make_stage_arguments, run_stage, capsys, monkeypatch
):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    weights = f"--model.init_args.weights={tiny_checkpoint}"
    with pytest.raises(SystemExit) as end:
        run_stage(make_stage_arguments("teacher", tiny_root, weights), tmp_path, SPOIL)
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: training: in epoch 0, step 0, the loss is not finite")
    assert (tmp_path / "non_finite_batch_rank0.pt").is_file()
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_what_other_callbacks_add_to_the_gradients_counts(tiny_root, tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"step 0, the gradients are not finite"):
        fit(SpoilBeforeStep(), tiny_root, tiny_checkpoint, tmp_path)


def test_photos_are_named_where_the_batch_cannot_be_saved(tiny_root, tiny_checkpoint, tmp_path):
    spoil = Spoil(batch=1)
    (tmp_path / "non_finite_batch_rank0.pt").mkdir()
    with pytest.raises(InputError, match=r"The batch could not be saved \(.*rank0\.pt: ") as error:
        fit(spoil, tiny_root, tiny_checkpoint, tmp_path)
    assert "the loss is not finite (train/" in str(error.value)
    assert f"with the photos {', '.join(spoil.names[0])};" in str(error.value)
    assert "Look at" not in str(error.value)


class OtherProcess:
    """Stands for ``torch.distributed`` with another process, which answers every question alike."""

    def __init__(self, answer: int):
        self.answer, self.asked = answer, []

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def all_reduce(self, count):
        self.asked.append(int(count))
        count += self.answer


class CountWaits(TorchDispatchMode):
    """Notes where Python asks for a value, for which a device would have to finish."""

    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def ask(gradient: float, trainer) -> None:
    """Looks at a loss that is fine, and at a gradient."""
    guard, module = NanGuard(), torch.nn.Linear(1, 1)
    module.weight.grad = torch.full_like(module.weight, gradient)
    guard.on_train_batch_start(trainer, module, {"names": ["a"]}, 0)
    guard.on_before_backward(trainer, module, torch.tensor(1.0))
    guard.on_before_optimizer_step(trainer, module, None)


def test_another_process_says_whose_loss_it_was(tmp_path, monkeypatch):
    """What a process does whose own loss is fine: the gradients, which are averaged, are not."""
    monkeypatch.setattr("callbacks.nan_guard.distributed", other := OtherProcess(1))
    trainer = SimpleNamespace(precision_plugin=None, current_epoch=2, global_step=7, default_root_dir=tmp_path)
    with pytest.raises(InputError, match="epoch 2, step 7, the loss of another process"):
        ask(torch.nan, trainer)
    assert other.asked == [1, 0]
    assert not list(tmp_path.iterdir())


def test_processes_exchange_one_number_where_all_is_well_and_wait_once(monkeypatch):
    other, waits = OtherProcess(0), []
    monkeypatch.setattr("callbacks.nan_guard.distributed", other)
    monkeypatch.setattr(other, "all_reduce", lambda count: other.asked.append(count))
    with CountWaits(waits):
        ask(1.0, SimpleNamespace(precision_plugin=None))
    assert len(other.asked) == 1
    assert other.asked[0].dim() == 0
    assert waits == ["aten::_local_scalar_dense"]


def test_overflowing_gradients_are_left_to_the_scaler():
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    ask(torch.inf, trainer)


@pytest.mark.slow
def test_ends_all_processes(tiny_root, tiny_checkpoint, tmp_path, make_stage_arguments, run_process):
    result = run_process(
        make_stage_arguments("teacher", tiny_root, f"--model.init_args.weights={tiny_checkpoint}"),
        tmp_path,
        "--data.init_args.batch_size=2",
        *(f"--trainer.{option}" for option in ("accelerator=cpu", "devices=2", "strategy=ddp")),
        SPOIL,
        "--trainer.callbacks.init_args.rank=1",
        "--trainer.callbacks.init_args.step=1",
        timeout=200,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error: training: in epoch 0, step 1, the loss is not finite") == 1, result.stderr
    assert result.stderr.count("step 1, the loss of another process is not finite") == 1, result.stderr
    assert [path.name for path in tmp_path.glob("*.pt")] == ["non_finite_batch_rank1.pt"]
