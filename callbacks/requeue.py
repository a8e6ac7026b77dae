"""Saves between two steps when a cluster's time is over, and has the job start again."""

import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from lightning_modules.checkpoint_io import REQUEUED
from retinaface.errors import InputError
from retinaface.slurm import SAVED, is_first_step, is_preempted, start_again

_VALIDATION = "epoch_loop.val_loop.batch_progress"


class Requeue(L.Callback):
    """Goes with ``configs/slurm/slurm.yaml``: a job that must end saves after the step that it is in, and ends.

    SIGUSR2 (``#SBATCH --signal=USR2@300``: 300 seconds before the time limit) puts the job back into the queue, and so
    does SIGTERM where the job is pre-empted and has a time of grace; else (it is pre-empted at once, or cancelled) that
    is left to the cluster. All processes end after the same optimizer step, with status 75, and ``--ckpt_path=last``
    goes on with the next one. A validation is broken off and begun anew. Before and after the training, and in a stage
    that trains nothing, there is nothing to save: the cluster is asked at once, and what is under way, as an export,
    goes on for as long as the cluster lets it, and is done again. A job that has started again, and whose time is over
    once more before a step was made, does not start again; that is said.

    The checkpoint is ``requeued.ckpt`` beside those of ``ModelCheckpoint``; the next one of those deletes it. Where it
    cannot be written, the job goes on from the one before. In the list of callbacks this one belongs behind all that
    change something after a step.

    Lightning's own way, ``SLURMEnvironment(auto_requeue=True)``, saves inside the signal handler: in the middle of a
    step, where parameters, batch statistics and the counters do not fit together, and each process in another one,
    which with several of them ends in a deadlock.
    """

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._training = self._ending = self._requeued = False
        self._stepped = self._saved = False  # since this process has begun
        # At once: what other callbacks do in their setup may take longer than the cluster gives.
        self._before: Any = signal.signal(signal.SIGUSR2, self._notice)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True
        # In place of Lightning's handler, which talks to the other processes wherever each of them is. Until then, and
        # again after the training, when there is nothing to save, SIGTERM ends the process; Lightning sees to that.
        signal.signal(signal.SIGTERM, self._notice)

    def _notice(self, number: int, _: FrameType | None) -> None:
        # Some clusters send it to the loader's processes too. Torch would raise for those that end, within the step.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._asked.add(number)
        if not self._training:
            self._requeue_at_once()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stepped = True
        # Gradients that are being accumulated are not saved. Going on from the end of an epoch's last step, Lightning
        # would leave out what ends the epoch.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            self._end_if_asked(trainer)

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._end_if_asked(trainer)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._ending:
            self._saved = self._stepped
        elif trainer.validating:
            # As if in the first batch: what the metric has seen is not saved, so validation must begin anew.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = checkpoint["loops"]["fit_loop"][_VALIDATION]
            checkpoint["loops"]["fit_loop"][_VALIDATION] = {
                **progress,
                "current": begun,
                "total": begun,
                "is_last_batch": False,
            }

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = False
        self._requeue_at_once()

    def _requeue_at_once(self) -> None:
        """ModelCheckpoint has saved what there is, and there is no step whose end would be waited for."""
        if signal.SIGUSR2 in self._asked:
            self._requeue(self._stepped)

    @rank_zero_only
    def _requeue(self, progress: bool) -> None:
        if self._requeued:
            return
        why_not = start_again(progress or not is_first_step())
        self._requeued = why_not is None
        if why_not is not None:
            rank_zero_info(f"requeue: {why_not}")

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            signal.signal(signal.SIGUSR2, self._before)

    def _end_if_asked(self, trainer: L.Trainer) -> None:
        any_process = partial(trainer.strategy.reduce_boolean_decision, all=False)
        if not any_process(bool(self._asked)):
            return
        self._ending = True
        rank_zero_info(f"requeue: the time is over in epoch {trainer.current_epoch}, step {trainer.global_step}")
        saved = _save(trainer)
        for logger in trainer.loggers:  # the cluster may not wait for what they would do at the process's end
            with suppress(OSError):  # where the disk is full
                logger.finalize("requeued")
        time_over = any_process(signal.SIGUSR2 in self._asked)
        if trainer.is_global_zero and (time_over or is_preempted()):
            self._requeue(self._stepped if saved else self._saved)
        trainer.strategy.barrier("requeue")  # srun ends all processes when the first one ends
        sys.exit(SAVED)


def _save(trainer: L.Trainer) -> bool:
    """Whether the first process, which writes, could do so."""
    try:
        trainer.save_checkpoint(_file(trainer))
    except InputError as error:
        rank_zero_info(f"requeue: {error}; it goes on from the checkpoint before")
        trainer.strategy.barrier("Trainer.save_checkpoint")  # in which the others wait
        return False
    rank_zero_info(f"requeue: saved {_file(trainer)}")
    return True


def _file(trainer: L.Trainer) -> Path:
    callback = trainer.checkpoint_callback
    folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
    return Path(folder or trainer.default_root_dir) / REQUEUED
