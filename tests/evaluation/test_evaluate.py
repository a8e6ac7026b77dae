import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from retinaface.data.annotations import load_split
from retinaface.errors import InputError
from retinaface.evaluation import evaluate as module
from retinaface.evaluation.evaluate import evaluate
from retinaface.model.postprocess import Detections


class Oracle:
    """Stands in for a detector: answers with the annotated faces of the photos in turn, without the first ``miss``."""

    runtime = "oracle"

    def __init__(self, root, miss=0):
        self.answers = iter([sample.boxes[miss:] for sample in load_split(root, "val")])
        self.thresholds = set()

    def detect(self, image, score_threshold, nms_threshold):
        assert image.dtype == np.uint8
        self.thresholds.add((score_threshold, nms_threshold))
        boxes = torch.from_numpy(next(self.answers))
        return Detections(boxes, torch.linspace(0.9, 0.8, len(boxes)), torch.zeros(len(boxes), 5, 2))


def test_perfect_detections_have_full_precision(tiny_root, monkeypatch):
    oracle = Oracle(tiny_root)
    monkeypatch.setattr(module, "load_detector", lambda path, threads: oracle)
    result = evaluate(Path("oracle"), tiny_root)
    assert result.ap == {"all": pytest.approx(1.0), "easy": None, "medium": None, "hard": None}
    assert set(result.curves) == {"all"}
    samples = load_split(tiny_root, "val")
    assert (result.photos, result.faces) == (len(samples), sum(len(sample.boxes) for sample in samples))
    assert result.images_per_second > 0
    assert oracle.thresholds == {(0.02, 0.4)}


def test_missed_faces_cost_recall(tiny_root, monkeypatch):
    monkeypatch.setattr(module, "load_detector", lambda path, threads: Oracle(tiny_root, miss=1))
    result = evaluate(Path("oracle"), tiny_root)
    samples = load_split(tiny_root, "val")
    found = sum(max(0, len(sample.boxes) - 1) for sample in samples)
    assert result.ap["all"] == pytest.approx(found / result.faces, abs=1e-6)


def test_checkpoint_is_evaluated(tiny_root, tiny_checkpoint):
    result = evaluate(tiny_checkpoint, tiny_root)
    assert result.runtime == "torch"
    assert 0 <= result.ap["all"] <= 1


def test_truncated_photo_is_named(tiny_root, tiny_checkpoint, tmp_path):
    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    photo = sorted((root / "WIDER_val").rglob("*.jpg"))[-1]
    photo.write_bytes(photo.read_bytes()[:500])
    with pytest.raises(InputError, match=str(photo)):
        evaluate(tiny_checkpoint, root)
