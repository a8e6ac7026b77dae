from types import SimpleNamespace

import pytest

from callbacks.first_process import decided_by_first_process
from retinaface.errors import InputError


def trainer(rank, sent=None):
    """One of two processes: the first one's broadcasts are noted, the other is given what was sent."""
    notes = []

    def broadcast(outcome):
        notes.append(outcome)
        return outcome if rank == 0 else sent

    strategy = SimpleNamespace(broadcast=broadcast)
    return SimpleNamespace(world_size=2, is_global_zero=rank == 0, strategy=strategy, notes=notes)


def fail(error):
    raise error


@pytest.mark.parametrize("decision", [None, "a plan"])
def test_all_have_the_first_ones_decision(decision):
    first = trainer(0)
    assert decided_by_first_process(first, lambda: decision) == decision
    other = trainer(1, first.notes[0])
    assert decided_by_first_process(other, lambda: fail(AssertionError("asked"))) == decision


def test_an_error_ends_all():
    for error, expected in ((InputError("no such module"), InputError), (MemoryError("full"), RuntimeError)):
        first = trainer(0)
        with pytest.raises(expected, match=str(error)):
            decided_by_first_process(first, lambda error=error: fail(error))
        with pytest.raises(expected, match=str(error)):
            decided_by_first_process(trainer(1, first.notes[0]), lambda: None)


def test_one_process_keeps_its_traceback():
    with pytest.raises(MemoryError):
        decided_by_first_process(SimpleNamespace(world_size=1), lambda: fail(MemoryError("full")))
