import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from retinaface.evaluation.benchmark import Timing
from retinaface.evaluation.visualize import (
    GREEN,
    GREY,
    LANDMARK_COLOURS,
    ORANGE,
    RED,
    contact_sheet,
    draw_detections,
    draw_judgement,
    draw_training_batch,
    plot_ap_against_latency,
    plot_ap_by_size,
    plot_benchmark,
    plot_face_sizes,
    plot_kept_channels,
    plot_mixed_precision,
    plot_precision_recall,
    plot_report,
    plot_sensitivity,
    plot_training,
)
from retinaface.evaluation.wider_ap import Curve, area_under


def blank(height=200, width=300):
    return np.zeros((height, width, 3), np.uint8)


def has_colour(picture, colour, box):
    """Whether a pixel of this colour lies on or near the outline of the box."""
    x1, y1, x2, y2 = box
    return (picture[max(y1 - 2, 0) : y2 + 3, max(x1 - 2, 0) : x2 + 3] == colour).all(axis=-1).any()


def test_detections_are_drawn_on_a_copy():
    image = blank()
    landmarks = np.array([[[60, 80], [90, 80], [75, 95], [63, 110], [np.nan, np.nan]]])
    picture = draw_detections(image, [[50, 60, 100, 130]], [0.87], landmarks)
    assert not image.any()
    assert picture.shape == image.shape
    assert tuple(picture[130, 75]) == GREEN  # lower side of the box
    for (x, y), colour in zip(landmarks[0, :4].astype(int), LANDMARK_COLOURS, strict=False):
        assert tuple(picture[y, x]) == colour
    assert not (picture == LANDMARK_COLOURS[4]).all(axis=-1).any()  # the point that is not there
    plate = picture[45:60, 50:80]
    assert (plate == 255).all(axis=-1).any()  # the score, above the box
    assert not picture[140:].any()


def test_training_batch_shows_what_the_network_is_told():
    batch = {
        "images": torch.zeros((2, 3, 100, 100), dtype=torch.uint8),
        "boxes": torch.tensor([[[10.0, 10, 40, 50], [50, 50, 90, 90]], [[20, 20, 60, 60], [0, 0, 0, 0]]]),
        "landmarks": torch.zeros((2, 2, 5, 2)),
        "has_landmarks": torch.tensor([[True, False], [False, False]]),
        "labels": torch.tensor([[1, -1], [1, 0]]),
    }
    batch["landmarks"][0, 0] = torch.tensor([[15.0, 20], [35, 20], [25, 30], [17, 40], [33, 40]])
    first, second = draw_training_batch(batch)
    assert not batch["images"].any()
    assert tuple(first[50, 25]) == GREEN
    assert tuple(first[90, 60]) == tuple(first[70, 70]) == GREY  # the side and the middle of the ignored face
    assert [tuple(first[y, x]) for x, y in batch["landmarks"][0, 0].int().tolist()] == list(LANDMARK_COLOURS)
    assert tuple(second[60, 40]) == GREEN
    assert not second[:15, :15].any()  # padding is not drawn
    assert not (second == GREY).all(axis=-1).any()


def test_lines_grow_with_the_photo():
    def thickness(size):
        box = [size // 4, size // 4, size // 2, size // 2]
        picture = draw_detections(blank(size, size), [box], [0.5])
        return int(picture[size // 2 - size // 8, : size * 3 // 8].any(axis=-1).sum())

    assert thickness(200) < thickness(2000) <= 10


@pytest.mark.parametrize(
    "box", [[-40, -40, 20, 20], [290, 190, 400, 400], [0, 0, 299, 199], [1e9, -1e9, 1e10, 1e9], [5, 5, 5, 5]]
)
def test_boxes_beyond_the_photo_are_no_problem(box):
    picture = draw_detections(blank(), [box], [1.0], np.full((1, 5, 2), 1e9))
    assert picture.shape == (200, 300, 3)


def test_nothing_to_draw():
    image = blank()
    np.testing.assert_array_equal(draw_detections(image, np.empty((0, 4)), [], np.empty((0, 5, 2))), image)
    np.testing.assert_array_equal(draw_judgement(image, np.empty((0, 5)), np.empty((0, 4)), []), image)


def test_judgement_has_four_colours():
    found, missed, ignored, false = [20, 30, 60, 70], [100, 30, 140, 70], [180, 30, 220, 70], [20, 130, 60, 170]
    detections = [[*found, 0.9], [*false, 0.6], [*ignored, 0.8]]
    picture = draw_judgement(blank(), detections, [found, missed, ignored], [True, True, False])
    for box, colour in ((found, GREEN), (missed, ORANGE), (ignored, GREY), (false, RED)):
        assert has_colour(picture, colour, box)
    for colour in (GREEN, RED, ORANGE):
        assert not has_colour(picture, colour, ignored)


def test_contact_sheet_holds_every_picture():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 30), (90, 90, 0)]
    sizes = [(50, 100), (300, 100), (80, 80), (20, 400), (33, 31)]
    images = [np.full((*size, 3), colour, np.uint8) for size, colour in zip(sizes, colours, strict=True)]
    sheet = contact_sheet(images, columns=2, width=401)
    assert sheet.shape[1] == 401
    assert sheet.dtype == np.uint8
    for (height, width), colour in zip(sizes, colours, strict=True):
        ys, xs = np.nonzero((sheet == colour).all(axis=-1))
        cell = (401 - 3 * 2) // 2
        assert xs.max() - xs.min() + 1 == cell
        assert ys.max() - ys.min() + 1 == round(height * cell / width)


@pytest.mark.parametrize("arguments", [([],), ([blank()], 0), ([blank()], 4, 8)])
def test_contact_sheet_without_room_is_refused(arguments):
    with pytest.raises(ValueError, match="needs pictures and room"):
        contact_sheet(*arguments)


def test_curves_are_plotted(tmp_path):
    recall = np.linspace(0, 0.9, 50)
    good, bad = Curve(recall, 1 - recall**3), Curve(recall, 1 - recall)
    plot_precision_recall({"teacher": {"all": good, "hard": bad}, "int8": {"all": bad}}, tmp_path / "a" / "pr.svg")
    text = svg_text(tmp_path / "a" / "pr.svg")
    for expected in (
        f"teacher: AP {area_under(good):.3f}",
        f"int8: AP {area_under(bad):.3f}",
        "all faces",
        "hard face",
    ):
        assert expected in text
    assert "easy faces" not in text
    plot_precision_recall({"teacher": {"all": good}}, tmp_path / "pr.png")
    assert imread(tmp_path / "pr.png").std() > 0.05
    plot_precision_recall({"teacher": {}}, tmp_path / "pr.png")  # photos without a face that counts


def test_ap_by_size_has_a_bar_per_model_and_class(tmp_path):
    models = {"teacher": {"<8": None, "8-16": 0.31, "16-32": 0.62}, "int8": {"<8": None, "8-16": None, "16-32": 0.57}}
    plot_ap_by_size(models, tmp_path / "sizes.svg", "vga")
    text = svg_text(tmp_path / "sizes.svg")
    for label in ("teacher", "int8", "8-16", "16-32", "0.31", "0.62", "0.57", "by face size, vga"):
        assert label in text
    assert "&lt;8" not in text  # no model has a figure
    plot_ap_by_size({"teacher": {"<8": None}}, tmp_path / "sizes.png")
    assert imread(tmp_path / "sizes.png").std() > 0.01


def svg_text(file):
    """The texts of an SVG figure: matplotlib keeps them as comments beside the outlines."""
    return file.read_text()


def test_face_sizes_are_plotted(tmp_path):
    sizes = {"train": [0.5, 3, 15, 15.5, 17, 40, 9000], "val": np.array([20.0])}
    plot_face_sizes(sizes, tmp_path / "a" / "sizes.svg", smallest_anchor=16)
    text = svg_text(tmp_path / "a" / "sizes.svg")
    for label in ("train: 7 faces", "val: 1 faces", "smallest anchor, 16 px", "100%"):
        assert label in text
    plot_face_sizes({"train": []}, tmp_path / "sizes.png", smallest_anchor=16)
    assert imread(tmp_path / "sizes.png").std() > 0.02


def report_models(**subsets):
    shared = {"params": 400_000, "macs": 750_000_000, "onnx_bytes": 1_700_000, "latency_ms_median": 12.0}
    teacher = {"name": "teacher", "ap": {"all": 0.8, "easy": None, "medium": None, "hard": None, **subsets}, **shared}
    small = {"macs": 500_000_000, "onnx_bytes": 425_000, "latency_ms_median": 6.0}
    student = {**teacher, **small, "name": "int8", "ap": {**teacher["ap"], "all": 0.76}}
    return [teacher, student]


def test_kept_channels_have_a_bar_per_layer(tmp_path):
    pictures = []
    for count, left in ((10, 64), (10, 32), (40, 32)):
        plot_kept_channels({f"layer{index}": (64, left) for index in range(count)}, tmp_path / "kept.png")
        pictures.append(imread(tmp_path / "kept.png"))
    full, half, many = ((picture[..., 0] < 0.02) & (picture[..., 2] > 0.6) for picture in pictures)
    assert full.sum() == pytest.approx(2 * half.sum(), rel=0.1)
    assert many.sum() > 3 * half.sum()


def test_sensitivity_has_a_cell_per_group_and_ratio(tmp_path):
    groups = {f"layer{index}": {0.25: (0.01 * index, 1.1), 0.5: (0.02 * index, 1.2)} for index in range(12)}
    plot_sensitivity(groups, tmp_path / "plots" / "sensitivity.png")
    assert imread(tmp_path / "plots" / "sensitivity.png")[..., :3].std() > 0.1


def test_mixed_precision_has_a_row_per_part(tmp_path):
    parts = {"backbone.stage1": (0.012, -0.25), "fpn": (-0.004, 0.031)}
    plot_mixed_precision(parts, tmp_path / "plots" / "quantization.svg")
    text = svg_text(tmp_path / "plots" / "quantization.svg")
    for label in (*parts, "+0.012", "-0.004", "-25%", "+3%"):
        assert label in text
    plot_mixed_precision(parts, tmp_path / "quantization.png")
    assert imread(tmp_path / "quantization.png")[..., :3].std() > 0.05


def test_report_shows_what_is_kept_and_gained(tmp_path):
    plot_report(report_models(), tmp_path / "report.svg")
    text = svg_text(tmp_path / "report.svg")
    for label in ("teacher", "int8", "0.760", "(95.0%)", "2.0x", "faster", "4.0x", "smaller", "1.5x", "fewer"):
        assert label in text
    assert "easy" not in text
    plot_report(report_models(easy=0.9, medium=0.8, hard=0.6), tmp_path / "report.svg")
    assert "0.760 (95.0%)" in svg_text(tmp_path / "report.svg")
    assert "hard" in svg_text(tmp_path / "report.svg")
    plot_report(report_models(), tmp_path / "report.png")
    assert imread(tmp_path / "report.png").std() > 0.05


def test_report_without_labels_shows_agreement_in_place_of_ap(tmp_path):
    models = [model | {"ap": dict.fromkeys(model["ap"]), "agreement": 1.0} for model in report_models()]
    models[1]["agreement"] = 0.953
    plot_report(models, tmp_path / "report.svg")
    text = svg_text(tmp_path / "report.svg")
    assert "agreement with the teacher" in text
    assert "95.3%" in text
    assert "accuracy" not in text
    assert "precision" not in text
    models[1]["agreement"] = None
    plot_report(models, tmp_path / "report.png")


def test_report_with_a_useless_student_and_without_models(tmp_path):
    models = report_models(easy=0.0)
    models[1]["ap"] = {"all": float("nan"), "easy": None}
    plot_report(models, tmp_path / "report.png")
    with pytest.raises(ValueError, match="no models"):
        plot_report([], tmp_path / "report.png")


def timed_models(**changes):
    models = [{**model, "latency_ms_p10": 9.0, "latency_ms_p90": 11.0} for model in report_models()]
    models[1].update(changes)
    return models


def test_ap_against_latency_names_every_model_with_its_size(tmp_path):
    plot_ap_against_latency(timed_models(), tmp_path / "plot.svg")
    text = svg_text(tmp_path / "plot.svg")
    for label in (
        "AP (all)",
        "ms per photo",
        *(f"{m['name']}, {m['onnx_bytes'] / 1e6:.2f} MB" for m in timed_models()),
    ):
        assert label in text
    plot_ap_against_latency(timed_models(ap={"all": None}), tmp_path / "plot.png")
    assert imread(tmp_path / "plot.png").std() > 0.05
    with pytest.raises(ValueError, match="no models"):
        plot_ap_against_latency([], tmp_path / "plot.png")


def test_discs_have_the_area_of_the_files(tmp_path, monkeypatch):
    drawn = {}

    def scatter(axes, x, y, area, color, **_):
        drawn.setdefault(color, (x, y, area))

    monkeypatch.setattr("matplotlib.axes.Axes.scatter", scatter)
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda *_, **__: None)
    plot_ap_against_latency(timed_models(), tmp_path / "plot.png")
    (teacher_ms, teacher_ap, teacher_area), (ms, ap, area) = drawn.values()
    assert (teacher_ms, teacher_ap, ms, ap) == (12, 0.8, 6, 0.76)
    assert teacher_area == pytest.approx(4 * area)


def test_agreement_against_latency(tmp_path):
    models = [{**model, "ap": {"all": None}, "agreement": 0.9} for model in timed_models()]
    plot_ap_against_latency(models, tmp_path / "plot.svg")
    text = svg_text(tmp_path / "plot.svg")
    assert "agreement" in text
    assert "AP" not in text


def test_training_has_a_panel_for_what_was_logged(tmp_path):
    losses = {"train/loss": {9: 2.5, 19: 1.5}, "distillation/loss": {9: 1.0, 19: 0.5}}
    plot_training({**losses, "val/ap_all": {12: 0.5}, "lr-AdamW": {9: 0.1}}, tmp_path / "all.svg")
    text = svg_text(tmp_path / "all.svg")
    for label in ("train", "distillation", "AP", "all", "learning rate", "training step"):
        assert label in text
    plot_training(losses, tmp_path / "losses.svg")
    assert "learning rate" not in svg_text(tmp_path / "losses.svg")
    assert "AP" not in svg_text(tmp_path / "losses.svg")
    unknown = {"val/ap_all": {12: math.nan}, "val/ap_easy": {12: 0.5}}
    plot_training(unknown, tmp_path / "unknown.svg")
    plot_training({"val/ap_all": {12: math.nan}}, tmp_path / "nothing.svg")
    with pytest.raises(ValueError, match="no losses"):
        plot_training({}, tmp_path / "none.svg")


def test_benchmark_has_a_panel_per_combination_and_tells_noise(tmp_path):
    first = Timing("run/teacher.onnx", 640, 1, 2, 100, 12.0, 11.0, 14.0, 1, 1, 1, 1, 1, False)
    faster = Timing("run/int8.onnx", 640, 1, 2, 100, 6.0, 5.0, 9.0, 2, 1, 3, 1.9, 2.1, True, "openvino")
    same = Timing("run/pruned.onnx", 640, 1, 2, 100, 11.9, 11.0, 14.0, 1.01, 0.9, 1.1, 0.95, 1.05, False)
    plot_benchmark({"one thread": [first, faster, same], "two threads": [first]}, tmp_path / "plot.svg")
    text = svg_text(tmp_path / "plot.svg")
    for label in ("one thread", "two threads", "teacher.onnx, onnxruntime", "int8.onnx, openvino", "6.00 ms 2.00x"):
        assert label in text
    assert text.count("within noise") == 1
    namesake = replace(faster, model="other/teacher.onnx")
    plot_benchmark({"one thread": [first, namesake]}, tmp_path / "plot.svg")
    text = svg_text(tmp_path / "plot.svg")
    assert "run/teacher.onnx, onnxruntime" in text
    assert "other/teacher.onnx, openvino" in text
