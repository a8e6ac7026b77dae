import logging
import math
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import wandb

from retinaface.data.annotations import Sample, load_split, load_unlabelled
from retinaface.errors import InputError
from retinaface.evaluation import evaluate as module
from retinaface.evaluation.evaluate import (
    Photo,
    draw_worst_photos,
    evaluate,
    evaluate_on,
    evaluation_tables,
    labelled_by,
    landmark_error,
    save_pictures,
    save_results,
    send_to_wandb,
)
from retinaface.evaluation.visualize import GREEN, ORANGE, RED
from retinaface.evaluation.wider_ap import SIZE_CLASSES, evaluate_predictions, read_predictions
from retinaface.model.postprocess import Detections


class Oracle:
    """Stands in for a detector: answers with the annotated faces of the photos in turn, without the first ``miss``."""

    runtime, callers = "oracle", 1

    def __init__(self, root, miss=0):
        self.answers = iter([(sample.boxes[miss:], sample.landmarks[miss:]) for sample in load_split(root, "val")])

    def detect(self, image, score_threshold, nms_threshold, keep):
        assert image.dtype == np.uint8
        boxes, landmarks = (torch.from_numpy(values) for values in next(self.answers))
        return Detections(boxes, torch.linspace(0.9, 0.8, len(boxes)), landmarks.nan_to_num())


@pytest.fixture
def oracle(tiny_root, monkeypatch):
    """Evaluates an oracle that misses some faces of each photo."""

    def call(root=tiny_root, miss=0):
        monkeypatch.setattr(module, "load_detector", lambda path, **_: Oracle(root, miss))
        return evaluate(Path("oracle"), root)

    return call


def test_perfect_detections_have_full_precision(oracle, tiny_root):
    result = oracle()
    accuracy = result.accuracy
    assert accuracy.ap["all"] == pytest.approx(1.0)
    assert set(accuracy.curves) == {subset for subset, ap in accuracy.ap.items() if ap is not None}
    assert set(accuracy.ap_by_size) == set(SIZE_CLASSES)
    by_size = [ap for ap in accuracy.ap_by_size.values() if ap is not None]
    assert by_size == pytest.approx([1.0] * len(by_size))
    assert len(by_size) > 1
    samples = load_split(tiny_root, "val")
    assert len(result.photos) == len(samples)
    assert result.faces == sum(int(sample.counted["all"].sum()) for sample in samples)
    assert result.images_per_second > 0
    assert result.landmark_error == pytest.approx(0, abs=1e-6)
    assert result.landmark_faces == result.faces


def test_missed_faces_cost_recall(oracle, tiny_root):
    result = oracle(miss=1)
    found = sum(int(sample.counted["all"][1:].sum()) for sample in load_split(tiny_root, "val"))
    assert result.accuracy.ap["all"] == pytest.approx(found / result.faces, abs=1e-6)


@pytest.mark.parametrize("protocol", ["original", "vga", "long640"])
def test_checkpoint_is_evaluated(tiny_root, tiny_checkpoint, protocol):
    result = evaluate(tiny_checkpoint, tiny_root, protocol)
    assert (result.runtime, result.protocol) == ("torch", protocol)
    assert 0 <= result.accuracy.ap["all"] <= 1


def test_a_detector_agrees_with_itself_and_less_with_another(tiny_root, tiny_checkpoint, monkeypatch):
    class Finder:
        """Finds two faces on each photo, one of them hardly."""

        runtime, callers = "finder", 1

        def __init__(self, shift):
            self.boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0], [50.0, 50.0, 70.0, 70.0]]) + shift

        def detect(self, image, score_threshold, nms_threshold, keep):
            return Detections(self.boxes, torch.tensor([0.5, 0.49]), torch.ones(2, 5, 2))

    shifts = {"teacher": 0.0, "near": 2.0, "far": 20.0}
    monkeypatch.setattr(module, "load_detector", lambda model, **_: Finder(shifts[model.name]))
    unlabelled = load_unlabelled(tiny_root / "WIDER_train" / "images", "val") * 3
    samples = labelled_by(Path("teacher"), unlabelled)
    assert [sample.path for sample in samples] == [sample.path for sample in unlabelled]
    for sample in samples:  # only what a person would be shown
        assert sample.boxes.tolist() == [[10, 10, 30, 30]]
        assert sample.landmarks.shape == (1, 5, 2)
        assert sample.counted["all"].tolist() == [True]
    found = {name: evaluate_on(Path(name), samples) for name in shifts}
    assert {name: each.accuracy.ap["all"] for name, each in found.items()} == {"teacher": 1, "near": 1, "far": 0}
    assert {each.faces for each in found.values()} == {3}
    assert found["teacher"].official_photos is None


def test_truncated_photo_is_named(tiny_root, tiny_checkpoint, tmp_path):
    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    photo = sorted((root / "WIDER_val").rglob("*.jpg"))[-1]
    photo.write_bytes(photo.read_bytes()[:500])
    with pytest.raises(InputError, match=str(photo)):
        evaluate(tiny_checkpoint, root)


def test_results_are_not_mixed_with_those_of_other_photos(tiny_checkpoint, tiny_root, tmp_path):
    evaluation = evaluate(tiny_checkpoint, tiny_root)
    save_results(evaluation, tmp_path)
    save_results(evaluation, tmp_path)  # the same photos again are fine
    (tmp_path / "event").mkdir()
    (tmp_path / "event" / "other.txt").write_text("event/other\n0\n")
    with pytest.raises(InputError, match="event/other"):
        save_results(evaluation, tmp_path)


@pytest.mark.reference
def test_public_weights_have_the_known_average_precision(reference):
    weights = reference / "weights" / "mobilenet025_widerface.pth"
    result = evaluate(weights, reference / "wider_val")
    expected = {"easy": 0.841, "medium": 0.786, "hard": 0.659}
    assert {name: result.accuracy.ap[name] for name in expected} == pytest.approx(expected, abs=0.003)
    assert (len(result.photos), result.official_photos) == (67, 3226)


def describe(faces, detections, counted=None):
    """A sample and its detections."""
    boxes = np.array(faces, np.float32).reshape(-1, 4)
    landmarks = np.full((len(boxes), 5, 2), np.nan, np.float32)
    mask = np.ones(len(boxes), bool) if counted is None else np.array(counted)
    found = torch.tensor(detections, dtype=torch.float32).reshape(-1, 5)
    sample = Sample(Path("a.jpg"), "a", boxes, landmarks, {"all": mask})
    return sample, Detections(found[:, :4], found[:, 4], torch.zeros(len(found), 5, 2))


def test_landmark_error_is_relative_to_the_face_and_of_its_best_detection():
    sample, found = describe([[0, 0, 16, 36], [100, 0, 110, 10]], [[0, 0, 16, 36, 0.3], [0, 0, 17, 36, 0.9]])
    sample.landmarks[0, :2] = [[3, 4], [6, 8]]  # the other three are not labelled
    found.landmarks[0] = 99.0
    error, faces = landmark_error([sample], [found])
    assert faces == 1  # the second face is not found
    assert error == pytest.approx((5 + 10) / 2 / np.sqrt(16 * 36))


def test_landmark_error_counts_faces_not_photos_and_not_what_is_ignored():
    first = describe([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [[0, 0, 10, 10, 0.9], [20, 0, 30, 10, 0.8]])
    second = describe([[0, 0, 10, 10]], [[0, 0, 10, 10, 0.9]])
    ignored = describe([[0, 0, 10, 10]], [[0, 0, 10, 10, 0.9]], counted=[False])
    empty = describe([], [[0, 0, 10, 10, 0.9]])
    for (sample, _), value in ((first, 1.0), (second, 4.0), (ignored, 8.0)):
        sample.landmarks[:, :, 0] = value
        sample.landmarks[:, :, 1] = 0
    error, faces = landmark_error(*zip(first, second, ignored, empty, strict=True))
    assert (error, faces) == (pytest.approx((1 + 1 + 4) / 3 / 10), 3)
    assert landmark_error(*zip(empty, strict=True)) == (None, 0)
    assert landmark_error([], []) == (None, 0)


@pytest.fixture
def part_of_root(tiny_root, tmp_path):
    """The data root, whose ground truth is in ``.mat`` files, without one of its validation photos."""
    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    load_split(root, "val")[2].path.unlink()
    return root


def test_part_of_the_official_photos_is_evaluated_and_named(oracle, part_of_root, caplog):
    with caplog.at_level(logging.WARNING):
        result = oracle(part_of_root, miss=1)
    assert "4 of the 5 official photos" in caplog.text
    assert result.figures()["official_photos"] == 5
    assert result.accuracy.ap["hard"] is not None
    assert (
        evaluation_tables({"oracle": result})[0].title == f"AP, original: 4 of 5 official photos, {result.faces} faces"
    )


def test_saved_results_give_the_same_average_precision(oracle, part_of_root, tmp_path):
    result = oracle(part_of_root, miss=1)
    save_results(result, tmp_path / "results")
    assert len(read_predictions(tmp_path / "results")) == 4
    with pytest.raises(InputError, match="1 photos have no result file"):
        evaluate_predictions(tmp_path / "results", part_of_root / "wider_face_split")
    again = evaluate_predictions(tmp_path / "results", part_of_root / "wider_face_split", skip_missing=True)
    expected = {name: math.nan if (ap := result.accuracy.ap[name]) is None else ap for name in again}
    assert again == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert 0 < again["hard"] < 1


def test_figures_are_plain(oracle):
    figures = oracle().figures()
    assert set(figures["ap"]) == {"all", "easy", "medium", "hard"}
    assert "curves" not in figures
    assert isinstance(figures["photos"], int)


def test_pictures(oracle, tmp_path):
    teacher, student = oracle(), oracle(miss=1)
    accuracies = {"teacher": teacher.accuracy, "student": student.accuracy}
    files = save_pictures(accuracies, student.photos, tmp_path / "new" / "folder", "original")
    assert sorted(files) == ["ap_by_size", "precision_recall", "worst_photos"]
    for file in files.values():
        assert cv2.imread(str(file)).std() > 10
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written to"):
        save_pictures(accuracies, student.photos, tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written to"):
        save_results(student, tmp_path / "file")


def test_worst_photos_come_first_and_show_misses_and_false_alarms(tmp_path):
    def photo(name, detections, faces):
        cv2.imwrite(str(tmp_path / name), np.full((100, 150, 3), 90, np.uint8))
        rows, boxes = (np.array(v, np.float32).reshape(-1, n) for v, n in ((detections, 5), (faces, 4)))
        return Photo(tmp_path / name, name, rows, boxes, {"all": np.ones(len(boxes), bool)})

    face, other = [10, 10, 40, 50], [80, 10, 110, 50]
    photos = [
        photo("fine.png", [[*face, 0.9], [*other, 0.4]], [face]),  # what is below 0.5 is not shown
        photo("bad.png", [[*other, 0.9]], [face]),
    ]
    sheet = draw_worst_photos(photos)
    third = sheet.shape[1] // 3
    bad, fine = sheet[:, :third], sheet[:, third : 2 * third]
    colours = [[has_colour(part, colour) for colour in (GREEN, RED, ORANGE)] for part in (bad, fine)]
    assert colours == [[False, True, True], [True, False, False]]
    assert draw_worst_photos(photos, count=1).std() > 0
    assert not has_colour(draw_worst_photos(photos, count=1), GREEN)


def has_colour(picture, colour):
    """Whether some pixels are near a colour: the sheet is resized."""
    return (np.abs(picture.astype(int) - colour).max(axis=2) < 12).sum() > 20


def test_wandb_that_refuses_is_one_line(monkeypatch):
    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(InputError, match="W&B: No API key configured; log in"):
        send_to_wandb("faces", {}, {})


def test_wandb_gets_figures_and_pictures(oracle, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("exit", "excepthook"):  # wandb puts its own in their place and leaves them there
        monkeypatch.setattr(sys, name, getattr(sys, name))
    logged = []
    real = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda self, data: (logged.append(data), real(self, data)))
    result = oracle()
    pictures = save_pictures({"oracle": result.accuracy}, result.photos, tmp_path / "pictures")
    try:
        send_to_wandb("test", result.figures(), pictures)
    finally:
        wandb.teardown()
    assert list(logged[0]) == ["evaluation/precision_recall", "evaluation/ap_by_size", "evaluation/worst_photos"]
    assert len(list(tmp_path.rglob("media/images/evaluation/*.png"))) == 3
