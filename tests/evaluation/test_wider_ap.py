import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from retinaface.errors import InputError
from retinaface.evaluation.wider_ap import (
    Curve,
    WiderFaceAP,
    area_under,
    average_precision,
    evaluate_predictions,
    judge_photo,
    precision_recall,
    read_predictions,
    size_curves,
    subset_curves,
    write_predictions,
)

REFERENCE = Path(__file__).parents[2] / ".." / "shared" / "reference" / "wider_val"


# The protocol once more, as slow and plain as it is published: a loop over photos, thresholds and detections.


def slow_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
    area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    return width * height / (area_a + area_b - width * height)


def slow_photo(detections, faces, counted):
    state = [0] * len(faces)
    proposals, recalls = [], []
    for detection in detections:
        overlaps = [slow_iou(detection, face) for face in faces]
        best = max(range(len(faces)), key=lambda i: overlaps[i])
        proposal = 1
        if overlaps[best] >= 0.5:
            if not counted[best]:
                state[best] = -1
                proposal = -1
            elif state[best] == 0:
                state[best] = 1
        proposals.append(proposal)
        recalls.append(state.count(1))
    return proposals, recalls


def slow_average_precision(detections, faces, counted):
    scores = [row[4] for rows in detections for row in rows]
    low, high = min(scores, default=0), max(scores, default=0)
    table = np.zeros((1000, 2))
    for rows, boxes, mask in zip(detections, faces, counted, strict=True):
        if len(rows) == 0 or len(boxes) == 0:
            continue
        rows = sorted(rows.tolist(), key=lambda row: -row[4])
        proposals, recalls = slow_photo(rows, boxes.tolist(), mask.tolist())
        normalised = [(row[4] - low) / (high - low) if high > low else 1.0 for row in rows]
        for t in range(1000):
            reached = [i for i, score in enumerate(normalised) if score >= 1 - (t + 1) / 1000]
            if reached:
                table[t] += proposals[: reached[-1] + 1].count(1), recalls[reached[-1]]
    n_counted = sum(int(mask.sum()) for mask in counted)
    if n_counted == 0:
        return float("nan")
    recall = [0.0, *(table[:, 1] / n_counted), 1.0]
    precision = [0.0, *(found / judged if judged else 0.0 for judged, found in table), 0.0]
    area = 0.0
    for i in range(len(recall) - 1):
        area += (recall[i + 1] - recall[i]) * max(precision[i + 1 :])
    return area


def random_photos(seed, n_photos=6):
    """Photos whose detections are moved faces and chance boxes; some have equal scores, some have none at all."""
    random = np.random.default_rng(seed)
    detections, faces, counted = [], [], []
    for _ in range(n_photos):
        n_faces, n_chance = random.integers(0, 7), random.integers(0, 6)
        corners = random.integers(0, 60, (n_faces, 2))
        boxes = np.column_stack((corners, corners + random.integers(4, 30, (n_faces, 2)))).astype(float)
        moved = np.repeat(boxes, random.integers(0, 3, n_faces), axis=0)
        moved = moved + random.integers(-3, 4, moved.shape)
        corners = random.integers(0, 60, (n_chance, 2))
        chance = np.column_stack((corners, corners + random.integers(4, 30, (n_chance, 2))))
        rows = np.concatenate((moved, chance))
        scores = random.choice([0.02, 0.1, 0.25, 0.5, 0.9, 0.99, random.random()], len(rows))
        detections.append(random.permutation(np.column_stack((rows, scores))))
        faces.append(boxes)
        counted.append(random.random(n_faces) < 0.7)
    return detections, faces, counted


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_the_plain_protocol(seed):
    photos = random_photos(seed)
    assert average_precision(*photos) == pytest.approx(slow_average_precision(*photos), abs=1e-12, nan_ok=True)


def test_scores_are_normalised_over_all_photos_and_counted_at_thresholds():
    # Found at .8 and .6, which becomes 1 and 0: the false alarm at .6999 stands between them, at .4995.
    box, elsewhere = [0, 0, 9, 9], [50, 50, 59, 59]
    detections = [np.array([[*box, 0.8], [*elsewhere, 0.6999]]), np.array([[*box, 0.6]])]
    curve = precision_recall(detections, [[box], [box]], [[True], [True]])
    assert curve.recall.tolist() == [0.5] * 999 + [1.0]
    np.testing.assert_allclose(curve.precision, [1.0] * 500 + [0.5] * 499 + [2 / 3])
    assert area_under(curve) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_a_detection_belongs_to_the_face_it_overlaps_most_even_if_that_does_not_count():
    ignored, face = [0, 0, 19, 19], [4, 0, 23, 19]
    detections = [np.array([[1, 0, 20, 19, 0.9]])]  # overlaps both by more than half
    curve = precision_recall(detections, [[ignored, face]], [[False, True]])
    assert curve.recall.max() == 0
    assert curve.precision.min() == 1  # not judged


def test_a_second_detection_of_a_face_is_a_false_alarm():
    box = [0, 0, 9, 9]
    curve = precision_recall([[[*box, 0.9], [*box, 0.8]]], [[box]], [[True]])
    assert curve.precision[-1] == 0.5


def test_overlap_counts_the_last_pixel():
    # 10×10 pixels against 20×10: exactly .5 with the last pixel, 9*9 / (19*9) without.
    assert average_precision([[[0, 0, 9, 9, 0.9]]], [[[0, 0, 19, 9]]], [[True]]) == 1
    assert average_precision([[[0, 0, 8, 9, 0.9]]], [[[0, 0, 19, 9]]], [[True]]) == 0


def test_photos_without_faces_are_not_held_against_the_detector():
    box = [0, 0, 9, 9]
    assert average_precision([[[*box, 0.9]], [[*box, 0.95]]], [[box], []], [[True], []]) == 1


def test_borderline_inputs():
    box = [0, 0, 9, 9]
    nothing = np.empty((0, 5))
    assert average_precision([nothing], [[box]], [[True]]) == 0
    assert average_precision([[[*box, 0.3]], [[*box, 0.3]]], [[box], [box]], [[True], [True]]) == 1  # equal scores
    assert np.isnan(average_precision([[[*box, 0.3]]], [[box]], [[False]]))
    assert np.isnan(average_precision([nothing], [[]], [[]]))
    assert np.isnan(average_precision([[[*box, 0.3]]], [[]], [[]]))
    assert np.isnan(average_precision([], [], []))
    assert subset_curves([], [], []) == {}
    assert area_under(Curve(np.zeros(3), np.ones(3))) == 0


@pytest.mark.parametrize(
    ("detections", "faces", "counted", "message"),
    [
        ([[]], [], [], "photos differ"),
        ([[[0, 0, 1, 1]]], [[]], [[]], r"detections: expected shape \(N, 5\)"),
        ([[]], [[[0, 0, 1]]], [[True]], r"faces: expected shape \(N, 4\)"),
        ([[]], [[[0, 0, 1, 1]]], [[True, False]], "counted: expected shape"),
        ([[[0, 0, 1, 1, float("nan")]]], [[]], [[]], "scores must be finite"),
    ],
)
def test_unfit_arrays_are_refused(detections, faces, counted, message):
    with pytest.raises(ValueError, match=message):
        average_precision(detections, faces, counted)


def test_face_sizes_share_no_false_alarms_and_no_faces():
    small, large, lost = [0, 0, 20, 30], [100, 100, 170, 200], [300, 0, 309, 20]
    alarm = [50, 0, 71, 25]  # small, on nothing
    detections = [np.array([[*small, 0.5], [*large, 0.3], [*alarm, 0.9]])]
    curves = size_curves(detections, [[small, large, lost]], [[True, True, True]])
    assert list(curves) == ["8-16", "16-32", "64-128"]  # by the shorter side; the others hold no face
    assert {name: area_under(curve) for name, curve in curves.items()} == {"8-16": 0, "16-32": 0.5, "64-128": 1}
    uncounted = size_curves(detections, [[small, large, lost]], [[True, False, True]])
    assert list(uncounted) == ["8-16", "16-32"]
    assert area_under(uncounted["16-32"]) == 0.5


def test_face_sizes_together_are_the_whole():
    """Where all faces are of one size class, and all detections too, it is the protocol's own curve."""
    detections, faces, counted = random_photos(5)
    faces = [boxes.copy() for boxes in faces]
    for rows in (*faces, *detections):
        rows[:, 2:4] = rows[:, :2] + 8 + (rows[:, 2:4] - rows[:, :2]) % 8
    (name,) = curves = size_curves(detections, faces, counted)
    assert name == "8-16"
    assert area_under(curves[name]) == average_precision(detections, faces, counted) > 0


def test_judgement_of_a_photo_is_in_the_order_given():
    face, ignored, missed = [0, 0, 9, 9], [30, 0, 39, 9], [60, 0, 69, 9]
    detections = [[*face, 0.5], [*ignored, 0.9], [0, 50, 9, 59, 0.1], [*face, 0.8]]
    judgement = judge_photo(detections, [face, ignored, missed], [True, False, True])
    assert judgement.found.tolist() == [False, False, False, True]
    assert judgement.false_alarms.tolist() == [True, False, True, False]
    assert judgement.missed.tolist() == [False, False, True]
    assert judgement.owners.tolist() == [0, 1, -1, 0]
    assert judge_photo(detections, [], []).false_alarms.all()
    assert judge_photo([], [face], [True]).missed.all()


# Files


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_written_predictions_are_read_back_sorted(tmp_path):
    random = np.random.default_rng(1)
    corners = random.uniform(-5, 900, (40, 2)).astype(np.float32)
    boxes = np.concatenate((corners, corners + random.uniform(1, 90, (40, 2)).astype(np.float32)), axis=1)
    scores = random.random(40).astype(np.float32)
    file = write_predictions(tmp_path, "9--Press/a.b_1", boxes, scores)
    write_predictions(tmp_path, "9--Press/empty", np.empty((0, 4)), [])
    lines = file.read_text().splitlines()
    assert lines[:2] == ["a.b_1", "40"]
    read = read_predictions(tmp_path)
    assert read["9--Press/empty"].shape == (0, 5)
    order = np.argsort(-scores)
    np.testing.assert_allclose(read["9--Press/a.b_1"][:, :4], boxes[order], atol=1e-5)
    np.testing.assert_array_equal(read["9--Press/a.b_1"][:, 4].astype(np.float32), scores[order])


def test_unsorted_files_with_windows_line_ends_are_read(tmp_path):
    write(tmp_path / "e" / "p.txt", "e/p.jpg\r\n2\r\n1 2 3 4 0.1 \r\n5 6 7 8 0.7\r\n\r\n")
    np.testing.assert_allclose(read_predictions(tmp_path)["e/p"], [[5, 6, 12, 14, 0.7], [1, 2, 4, 6, 0.1]])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 2),
        ("p\n", 2),
        ("p\nmany\n", 2),
        ("p\n2\n1 2 3 4 .5\n", 2),
        ("p\n2\n1 2 3 4 .5\n1 2 3 4\n", 4),
        ("p\n2\n1 2 3 x .5\n1 2 3 4 .5\n", 3),
        ("p\n3\n1 2 3 4 .5\n1 2 3 4 nan\n1 2 3 4 .5\n", 4),
        ("p\n2\n1 2 3 4\n5 6 7 8\n", 3),
        ("p\n2\n1 2 3 4 .5\n\n", 2),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path, text, line):
    write(tmp_path / "e" / "p.txt", text)
    with pytest.raises(InputError, match=rf"p\.txt:{line}: ") as error:
        read_predictions(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_predictions(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no result file"):
        read_predictions(tmp_path)


@pytest.fixture
def ground_truth(tmp_path):
    """Two events with two photos and one photo, in the layout of the official files."""

    def cells(*values):
        array = np.empty((len(values), 1), object)
        array[:, 0] = values
        return array

    boxes = cells(
        cells(np.array([[0, 0, 10, 10], [50, 50, 20, 20]]), np.array([[5, 5, 10, 10]])),
        cells(np.array([[0, 0, 10, 10]])),
    )
    easy = cells(cells(np.array([[2]]), np.empty((0, 1))), cells(np.array([[1]])))
    hard = cells(cells(np.array([[1], [2]]), np.array([[1]])), cells(np.array([[1]])))
    common = {
        "event_list": cells("0--Parade", "1--Handshaking"),
        "file_list": cells(cells("a", "b"), cells("c")),
        "face_bbx_list": boxes,
    }
    folder = tmp_path / "truth"
    folder.mkdir()
    savemat(folder / "wider_face_val.mat", common)
    for subset, counted in (("easy", easy), ("medium", hard), ("hard", hard)):
        savemat(folder / f"wider_{subset}_val.mat", {**common, "gt_list": counted})
    return folder


def test_folders_are_evaluated_without_the_events_that_are_absent(ground_truth, tmp_path, caplog):
    results = tmp_path / "results"
    write_predictions(results, "0--Parade/a", [[0, 0, 10, 10], [50, 50, 70, 70]], [0.9, 0.8])
    write_predictions(results, "0--Parade/b", np.empty((0, 4)), [])
    ap = evaluate_predictions(results, ground_truth)
    assert list(ap) == ["easy", "medium", "hard"]
    assert ap == pytest.approx({"easy": 1, "medium": 2 / 3, "hard": 2 / 3})
    assert "1 of 2 events" in caplog.text
    assert "1--Handshaking" in caplog.text


def test_missing_photos_of_a_present_event_are_named(ground_truth, tmp_path, caplog):
    results = tmp_path / "results"
    write_predictions(results, "0--Parade/a", [[0, 0, 10, 10]], [0.9])
    with pytest.raises(InputError, match=r"1 photos have no result file \(0--Parade/b\)"):
        evaluate_predictions(results, ground_truth)
    assert evaluate_predictions(results, ground_truth, skip_missing=True)["hard"] == 0.5
    assert "1 photos have no result file (0--Parade/b); they are left out" in caplog.text


def test_folders_of_other_photos_are_refused(ground_truth, tmp_path):
    write_predictions(tmp_path / "results", "holiday/a", [[0, 0, 10, 10]], [0.9])
    with pytest.raises(InputError, match=r"none of its folders is a WIDER FACE event, such as 0--Parade"):
        evaluate_predictions(tmp_path / "results", ground_truth)


def test_unknown_photos_only_enter_the_normalisation(ground_truth, tmp_path):
    results = tmp_path / "results"
    write_predictions(results, "1--Handshaking/c", [[0, 0, 10, 10], [70, 70, 90, 90]], [0.5, 0.5])
    write_predictions(results, "holiday/x", [[0, 0, 10, 10]], [0.1])
    assert evaluate_predictions(results, ground_truth)["hard"] == 0.5


@pytest.mark.reference
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="../shared/reference is not there")
def test_real_detections_give_the_reference_evaluators_result(tmp_path):
    with tarfile.open(REFERENCE / "detections_third.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    expected = json.loads((REFERENCE / "expected_ap.json").read_text())
    for subset, ap in evaluate_predictions(tmp_path, REFERENCE).items():
        assert ap == pytest.approx(expected[subset], abs=1e-9)


# The metric


def metric_batch(photos, chosen):
    """The photos with these numbers as tensors; every second face counts as easy."""
    detections, faces, counted = photos
    masks = [torch.tensor(counted[i]) for i in chosen]
    return (
        torch.tensor(chosen, dtype=torch.int64),
        [torch.tensor(detections[i], dtype=torch.float32) for i in chosen],
        [torch.tensor(faces[i], dtype=torch.float32) for i in chosen],
        [{"all": mask, "easy": mask & (torch.arange(len(mask)) % 2 == 0)} for mask in masks],
    )


@pytest.fixture(scope="module")
def photos():
    return random_photos(3, n_photos=9)


def computed(photos, *batches):
    metric = WiderFaceAP()
    for chosen in batches:
        metric.update(*metric_batch(photos, chosen))
    return {subset: value.item() for subset, value in metric.compute().items()}


def test_metric_equals_the_function(photos):
    detections, faces, counted = photos
    detections = [rows.astype(np.float32) for rows in detections]  # as the tensors
    easy = [mask & (np.arange(len(mask)) % 2 == 0) for mask in counted]
    assert computed(photos, list(range(9))) == {
        "all": pytest.approx(average_precision(detections, faces, counted), abs=1e-6),
        "easy": pytest.approx(average_precision(detections, faces, easy), abs=1e-6),
    }


def test_metric_ignores_order_and_repeated_photos(photos):
    expected = computed(photos, list(range(9)))
    assert computed(photos, [8, 3], [1], [0, 2, 4], [7, 5, 6]) == expected
    assert computed(photos, [0, 1, 2, 3, 4], [5, 6, 7, 8, 0], [1]) == expected
    assert computed(photos, [0, 1, 2]) != expected


def test_photos_seen_are_those_that_went_in_once_each(photos):
    metric = WiderFaceAP()
    metric.update(*metric_batch(photos, [5, 2, 8]))
    metric.update(*metric_batch(photos, [2, 0]))
    seen = metric.photos_seen()
    assert seen.image_ids == [0, 2, 5, 8]
    detections, faces, counted = photos
    for place, index in enumerate(seen.image_ids):
        np.testing.assert_array_equal(seen.detections[place], detections[index].astype(np.float32))
        np.testing.assert_array_equal(seen.faces[place], faces[index].astype(np.float32))
        np.testing.assert_array_equal(seen.counted[place]["all"], counted[index])
        assert list(seen.counted[place]) == ["all", "easy"]


def test_metric_leaves_photos_out_of_subsets_they_lack():
    box, yes = [0.0, 0.0, 9.0, 9.0], torch.tensor([True])
    detections = [torch.tensor([[*box, 0.5], [*box, 0.1]]), torch.tensor([[50.0, 50.0, 59.0, 59.0, 0.9]])]
    metric = WiderFaceAP()
    metric.update(
        torch.tensor([0, 1]), detections, [torch.tensor([box])] * 2, [{"all": yes, "easy": yes}, {"all": yes}]
    )
    assert {subset: value.item() for subset, value in metric.compute().items()} == {"all": 0.25, "easy": 1.0}


def test_metric_without_photos_and_after_reset(photos):
    metric = WiderFaceAP()
    metric.update(*metric_batch(photos, [0, 1]))
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute() == {}
    nothing = torch.empty(0)
    metric.update(torch.tensor([4]), [nothing], [nothing], [{"hard": nothing.bool()}])
    assert metric.compute()["hard"].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detections": []}, "one entry per photo"),
        ({"detections": [torch.zeros(2, 4)]}, r"expected \(N, 5\)"),
        ({"counted": [{"all": torch.ones(3, dtype=torch.bool)}]}, "one value for each"),
        ({"counted": [{"tiny": torch.ones(1, dtype=torch.bool)}]}, "unknown subset 'tiny'"),
    ],
)
def test_metric_refuses_unfit_batches(change, message):
    batch = {
        "image_ids": torch.tensor([0]),
        "detections": [torch.zeros(2, 5)],
        "faces": [torch.zeros(1, 4)],
        "counted": [{"all": torch.ones(1, dtype=torch.bool)}],
    }
    with pytest.raises(ValueError, match=message):
        WiderFaceAP().update(**{**batch, **change})


# Photos per process: of different number, with repeats across processes, and none at all in one process.
SHARES = (([0, 1, 2, 3, 4, 5], [6, 7, 8, 0]), ([], list(range(9))))


def evaluate_in_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    photos = random_photos(3, n_photos=9)
    results = []
    for share in SHARES:
        metric = WiderFaceAP()
        for start in range(0, len(share[rank]), 2):
            metric.update(*metric_batch(photos, share[rank][start : start + 2]))
        results.append({subset: value.item() for subset, value in metric.compute().items()})
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_equal_one(photos, tmp_path):
    torch.multiprocessing.spawn(evaluate_in_process, (tmp_path,), nprocs=2)
    expected = computed(photos, list(range(9)))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [expected, expected]
