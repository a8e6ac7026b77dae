import errno
import os
from copy import deepcopy

import pytest
import torch

from retinaface.compression.decision import digest, kept_decision
from retinaface.errors import InputError


class Decide:
    """Decides otherwise each time, as timings may."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return [("conv", [self.count])], {"mean": torch.tensor([float(self.count)])}


MADE_FOR = {"ratio": 0.4, "keep": ("fpn",), "target": {"macs": None}, "student": "a0"}


def test_a_decision_is_made_once(tmp_path):
    decide, file, said = Decide(), tmp_path / "new" / "plan.pt", []
    first = kept_decision(file, MADE_FOR, decide, said.append)
    assert said == []
    again = kept_decision(file, deepcopy(MADE_FOR), decide, said.append)
    assert decide.count == 1
    assert str(again) == str(first)
    assert said == [f"{file}: decided before for this student and these settings; delete it to decide anew"]
    assert list(file.parent.iterdir()) == [file]
    torch.load(file, weights_only=True)


@pytest.mark.parametrize("other", [{"ratio": 0.5}, {"student": "b0"}, {"target": {"macs": 0.3}}], ids=str)
def test_a_decision_for_something_else_is_made_anew(tmp_path, other):
    decide, file, said = Decide(), tmp_path / "plan.pt", []
    kept_decision(file, MADE_FOR, decide)
    for _ in range(2):
        plan, _ = kept_decision(file, MADE_FOR | other, decide, said.append)
    assert decide.count == 2
    assert plan == [("conv", [2])]
    assert "another student or other settings" in said[0]
    assert "decided before" in said[1]


def test_a_damaged_file_is_replaced(tmp_path):
    decide, file, said = Decide(), tmp_path / "plan.pt", []
    for content in (b"", b"no torch file"):
        file.write_bytes(content)
        kept_decision(file, MADE_FOR, decide, said.append)
    torch.save(["another", "file"], file)
    kept_decision(file, MADE_FOR, decide, said.append)
    assert decide.count == 3
    assert said == [f"{file}: is damaged, so it is decided anew"] * 3


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("retinaface.whole_file.os.fsync", fail)
    with pytest.raises(InputError, match=r"plan\.pt: cannot be written \(No space left on device\)"):
        kept_decision(tmp_path / "plan.pt", MADE_FOR, Decide())
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_decided_nothing_is_written(tmp_path):
    def refuse():
        raise InputError("cannot be reached")

    with pytest.raises(InputError, match="cannot be reached"):
        kept_decision(tmp_path / "plan.pt", MADE_FOR, refuse)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_sees_every_weight_and_statistic(tiny_network):
    before = digest(tiny_network)
    assert digest(deepcopy(tiny_network)) == before
    for name in ("ssh.2.conv3.0.weight", "backbone.stage1.0.1.running_mean", "backbone.stage1.0.1.num_batches_tracked"):
        changed = deepcopy(tiny_network)
        changed.state_dict()[name].view(-1)[0] += 1
        assert digest(changed) != before
