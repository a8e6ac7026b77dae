from types import SimpleNamespace

import pytest

from callbacks.first_process import decided_by_first_process
from retinaface.errors import InputError


@pytest.fixture
def first(monkeypatch):
    """The first of two processes, with notes of what it sends."""
    notes = []
    monkeypatch.setattr("callbacks.first_process._broadcast", lambda outcome: notes.append(outcome) or outcome)
    return SimpleNamespace(world_size=2, is_global_zero=True, notes=notes)


@pytest.fixture
def other(monkeypatch, first):
    """The second one, which is given what the first one sent."""

    def become_the_other():
        monkeypatch.setattr("callbacks.first_process._broadcast", lambda outcome: first.notes[-1])
        return SimpleNamespace(world_size=2, is_global_zero=False)

    return become_the_other


def fail(error):
    raise error


@pytest.mark.parametrize("decision", [None, "a plan"])
def test_all_have_the_first_ones_decision(first, other, decision):
    assert decided_by_first_process(first, lambda: decision) == decision
    assert decided_by_first_process(other(), lambda: fail(AssertionError("asked"))) == decision


@pytest.mark.parametrize(
    ("error", "expected"), [(InputError("no module"), InputError), (MemoryError("full"), RuntimeError)]
)
def test_an_error_ends_all(first, other, error, expected):
    with pytest.raises(expected, match=str(error)):
        decided_by_first_process(first, lambda: fail(error))
    with pytest.raises(expected, match=str(error)):
        decided_by_first_process(other(), lambda: None)


def test_one_process_keeps_its_traceback():
    with pytest.raises(MemoryError):
        decided_by_first_process(SimpleNamespace(world_size=1), lambda: fail(MemoryError("full")))
