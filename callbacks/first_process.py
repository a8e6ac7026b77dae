"""What one process decides and all of them do."""

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

from retinaface.errors import InputError

_T = TypeVar("_T")


def decided_by_first_process(trainer: L.Trainer, decide: Callable[[], _T]) -> _T:
    """Lets the first process decide, and tells the others, which wait.

    Args:
        trainer: Whose processes they are.
        decide: Called in the first process alone; what it returns is sent with pickle.

    Returns:
        The decision, in every process.

    Raises:
        InputError: In every process, if ``decide`` raised one: no process is left waiting.
        RuntimeError: In every process, if it raised anything else.
    """
    if trainer.world_size == 1:
        return decide()
    outcome: tuple[_T] | Exception | None = None
    if trainer.is_global_zero:
        try:
            outcome = (decide(),)
        except InputError as error:
            outcome = error
        except Exception as error:  # not every exception can be sent, nor its traceback
            rank_zero_info(traceback.format_exc())
            outcome = RuntimeError(f"the first process failed ({type(error).__name__}: {error})")
    outcome = _broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    assert outcome is not None
    return outcome[0]


def _broadcast(outcome: _T) -> _T:
    """Sends what the first process has to the others, which sleep until it comes, however long it takes.

    Waiting in the training's own process group ends after half an hour, and with NCCL it keeps a core busy.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    assert isinstance(group, dist.ProcessGroup)
    sent = [outcome]
    dist.broadcast_object_list(sent, src=0, group=group)
    dist.destroy_process_group(group)
    return sent[0]
