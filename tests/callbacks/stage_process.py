"""Runs train.py with more callbacks, for tests that need processes of their own: ``python stage_process.py fit ...``.

As ``stage_process.<class>`` the callbacks can be named on the command line.
"""

import os
import signal
import sys
from contextlib import ExitStack, suppress
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import callbacks.export
import retinaface.evaluation.speedup
import train

DISK = 64 * 2**20
"""Bytes of the small disk of tests."""


class KillInSecondEpoch(L.Callback):
    """Ends the process without warning, as a crash would."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class KillLoaderInSecondEpoch(L.Callback):
    """Ends the processes that load photos, as the system does when memory is short."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == 1:
            for worker in active_children():
                os.kill(worker.pid, signal.SIGKILL)


class FillDiskInSecondEpoch(L.Callback):
    """Leaves no room on the disk that the training writes to."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == 1 and batch_idx == 0:
            with suppress(OSError), (Path(trainer.default_root_dir) / "filler").open("wb", buffering=0) as filler:
                for _ in range(DISK // 4096):  # and not a byte more of what is not that small disk
                    filler.write(bytes(4096))


class GoesOn(L.Callback):
    """Fails where a training starts over."""

    def on_train_start(self, trainer, pl_module) -> None:
        assert trainer.current_epoch > 0


class SpoilLandmarks(L.Callback):
    """Gives one process NaN as landmarks of its photos, from one step on."""

    def __init__(self, rank: int = 0, step: int = 0) -> None:
        self.rank = rank
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == self.rank and trainer.global_step >= self.step:
            batch["landmarks"].fill_(torch.nan)
            batch["has_landmarks"].fill_(True)


class FreezeStatistics(L.Callback):
    """Batch norms use the statistics that they have, which do not depend on the batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        for module in pl_module.network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()


class WithoutRounding(L.Callback):
    """A fake-quantized student computes as in float."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.exact = ExitStack()
        self.exact.enter_context(pl_module.network.without_rounding())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.exact.close()


class SaveEveryRank(L.Callback):
    """Saves what each process trains before and after training, and the photos its metric saw."""

    def on_fit_start(self, trainer, pl_module) -> None:
        self.seen: list[int] = []
        self.before = {name: value.clone() for name, value in student_state(pl_module).items()}

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.seen = pl_module.val_ap.photos_seen().image_ids

    def on_fit_end(self, trainer, pl_module) -> None:
        content = {
            "plans": pl_module.structure.plans,
            "before": self.before,
            "after": student_state(pl_module),
            "trained": [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad],
            "ap": float(trainer.callback_metrics.get("val/ap_all", "nan")),  # calibration measures none
            "seen": self.seen,
        }
        torch.save(content, Path(trainer.default_root_dir) / f"rank_{trainer.global_rank}.pt")


def student_state(module):
    return {name: value for name, value in module.state_dict().items() if not name.startswith("teacher.")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Exports take seconds and change nothing that is compared; nor do timings.
    callbacks.export.export_onnx = lambda *_, **__: None
    retinaface.evaluation.speedup.export_onnx = lambda network, path: None
    timings = [SimpleNamespace(median_ms=10.0, ratio=1.0)] * 2
    retinaface.evaluation.speedup.benchmark = lambda *args, **options: timings
    train.main()
