"""What one process decides and all of them do."""

import traceback
from collections.abc import Callable
from typing import TypeVar

import lightning as L
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
    outcome = trainer.strategy.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    assert outcome is not None
    return outcome[0]
