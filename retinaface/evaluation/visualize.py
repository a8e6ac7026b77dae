"""Pictures for people: detections on photos, what was found and missed, contact sheets, curves and report charts.

Photos are ``(H, W, 3)`` uint8 in BGR; the drawing functions return a copy and leave their input alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from retinaface.data.transforms import FACE, IGNORED
from retinaface.evaluation.wider_ap import SUBSETS, Curve, area_under, judge_photo
from retinaface.whole_file import whole_file

if TYPE_CHECKING:
    from retinaface.evaluation.benchmark import Timing  # which would make `detect` wait for SciPy

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

# BGR; told apart by the colour-blind too (Okabe and Ito).
GREEN: Colour = (115, 158, 0)
ORANGE: Colour = (0, 159, 230)
RED: Colour = (0, 60, 230)
GREY: Colour = (150, 150, 150)
YELLOW: Colour = (66, 228, 240)
SKY: Colour = (233, 180, 86)
PINK: Colour = (167, 121, 204)
BLUE: Colour = (178, 114, 0)
LANDMARK_COLOURS: tuple[Colour, ...] = (SKY, BLUE, YELLOW, PINK, RED)
"""Left eye, right eye, nose, left mouth corner, right mouth corner."""

_BAR_COLOURS = ("#9aa0a6", "#56b4e9", "#0072b2", "#009e73", "#e69f00")


def draw_detections(image: Image, boxes: ArrayLike, scores: ArrayLike, landmarks: ArrayLike | None = None) -> Image:
    """Draw boxes with their scores, and five coloured dots per face.

    Args:
        image: ``(H, W, 3)`` uint8 BGR.
        boxes: ``(N, 4)`` xyxy in pixels.
        scores: ``(N,)``, 0–1.
        landmarks: ``(N, 5, 2)`` in pixels; points that are not finite are left out.

    Returns:
        A copy of the image with the drawing on it; lines and text grow with the image.
    """
    picture = image.copy()
    corners = _boxes(boxes)
    for box in corners:
        _rectangle(picture, box, GREEN)
    if landmarks is not None:
        for box, points in zip(corners, np.asarray(landmarks, float).reshape(-1, 5, 2), strict=True):
            _dots(picture, box, points)
    for box, score in zip(corners, np.asarray(scores, float).ravel(), strict=True):
        _label(picture, box, f"{score:.2f}", GREEN)
    return picture


def draw_judgement(image: Image, detections: ArrayLike, faces: ArrayLike, counted: ArrayLike) -> Image:
    """Draw what a detector found and what it got wrong, by the rules of the WIDER FACE protocol.

    Green boxes are detections that find a face, red ones false alarms (both with their scores), orange ones faces
    that were missed, and thin grey ones faces that do not count.

    Args:
        image: ``(H, W, 3)`` uint8 BGR.
        detections: ``(N, 5)`` xyxy in pixels and score; leave out those too weak to show.
        faces: ``(M, 4)`` xyxy in pixels, every annotated face.
        counted: ``(M,)`` bool, which faces count.

    Returns:
        A copy of the image with the drawing on it.
    """
    picture = image.copy()
    rows, corners = np.asarray(detections, float).reshape(-1, 5), _boxes(faces)
    judgement = judge_photo(rows, corners, counted)
    for box in corners[~np.asarray(counted, bool)]:
        cv2.rectangle(picture, _pixel(box[:2]), _pixel(box[2:]), GREY, 1)
    for box in corners[judgement.missed]:
        _rectangle(picture, box, ORANGE)
    for mask, colour in ((judgement.found, GREEN), (judgement.false_alarms, RED)):
        for row in rows[mask]:
            _rectangle(picture, row[:4], colour)
            _label(picture, row[:4], f"{row[4]:.2f}", colour)
    return picture


def draw_training_batch(batch: Mapping[str, Any]) -> list[Image]:
    """Draw what the network is shown and told: faces green with five coloured dots, ignored faces crossed out in grey.

    Args:
        batch: of :func:`retinaface.data.loading.collate_train`, on any device.

    Returns:
        A picture ``(S, S, 3)`` uint8 BGR per sample.
    """
    arrays = {key: batch[key].cpu().numpy() for key in ("images", "boxes", "landmarks", "has_landmarks", "labels")}
    pictures = []
    for image, boxes, landmarks, has_landmarks, labels in zip(*arrays.values(), strict=True):
        picture: Image = np.ascontiguousarray(image.transpose(1, 2, 0))
        thickness = max(1, len(picture) // 200)  # still to be seen on a sheet of many
        for box in boxes[labels == IGNORED]:
            _cross_out(picture, box, thickness)
        for box in boxes[labels == FACE]:
            cv2.rectangle(picture, _pixel(box[:2]), _pixel(box[2:]), GREEN, thickness)
        for box, points in zip(boxes[has_landmarks], landmarks[has_landmarks], strict=True):
            _dots(picture, box, points)
        pictures.append(picture)
    return pictures


def contact_sheet(images: Sequence[Image], columns: int = 4, width: int = 1600) -> Image:
    """Put pictures of any sizes on one sheet, row by row.

    Args:
        images: each ``(H, W, 3)`` uint8 BGR, at least one.
        columns: pictures per row.
        width: of the sheet, in pixels.

    Returns:
        ``(H, width, 3)`` uint8 BGR: every picture scaled to the width of its column, white in between.

    Raises:
        ValueError: there are no pictures, or the columns are too narrow to show anything.
    """
    gap = max(2, width // 200)
    cell = (width - gap * (columns + 1)) // columns if columns > 0 else 0
    if not images or cell < 1:
        raise ValueError(f"a contact sheet needs pictures and room for them: {len(images)} in columns of {cell} pixels")
    scaled = [_resize_to_width(image, cell) for image in images]
    rows = [scaled[start : start + columns] for start in range(0, len(scaled), columns)]
    heights = [max(len(image) for image in row) for row in rows]
    sheet: Image = np.full((sum(heights) + gap * (len(rows) + 1), width, 3), 255, np.uint8)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            left = gap + column * (cell + gap)
            sheet[top : top + len(image), left : left + cell] = image
        top += height + gap
    return sheet


def plot_precision_recall(curves: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Plot precision against recall: a panel per subset, a line per model, with the average precision in the legend.

    Args:
        curves: model name, the one to compare with (the teacher) first, to subset to curve; a subset that no model
            has gets no panel.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
    """
    subsets = [name for name in SUBSETS if any(name in each for each in curves.values())]
    figure = Figure(figsize=(1 + 4.6 * max(1, len(subsets)), 4.6), layout="constrained")
    figure.suptitle("Precision and recall at IoU 0.5")
    for axes, subset in zip(figure.subplots(1, max(1, len(subsets)), squeeze=False)[0], subsets, strict=False):
        for index, ((name, each), colour) in enumerate(zip(curves.items(), _colours(len(curves)), strict=True)):
            if subset in each:
                curve = each[subset]
                label = f"{name}: AP {area_under(curve):.3f}"
                # The first is drawn wider, to be seen below the others.
                axes.plot(curve.recall, curve.precision, label=label, color=colour, linewidth=2 if index else 4)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=f"{subset} faces")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left").set_in_layout(False)  # a long name must not squeeze the panel
    _save(figure, path)


def plot_ap_by_size(models: Mapping[str, Mapping[str, float | None]], path: Path, title: str = "") -> None:
    """Plot average precision by face size, a group of bars per size class.

    Args:
        models: model name to size class to average precision, 0-1, or None where there is no such face.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
        title: what else to say above.
    """
    classes = list(dict.fromkeys(name for each in models.values() for name, ap in each.items() if ap is not None))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / max(1, len(models))
    for index, ((name, each), colour) in enumerate(zip(models.items(), _colours(len(models)), strict=True)):
        places = np.arange(len(classes)) + (index - (len(models) - 1) / 2) * width
        values = [each.get(size) for size in classes]
        bars = axes.bar(places, [value or 0 for value in values], width * 0.94, label=name, color=colour)
        labels = ["-" if value is None else f"{value:.2f}" for value in values]
        axes.bar_label(bars, labels=labels, padding=2, fontsize=8)
    axes.set_xticks(range(len(classes)), classes)
    axes.set(
        xlabel="shorter side of the face, pixels of the photo",
        ylabel="average precision",
        ylim=(0, 1.25),
        yticks=np.linspace(0, 1, 6),
    )
    axes.set_title(f"Average precision at IoU 0.5 by face size{title and f', {title}'}")
    if models:
        axes.legend(loc="upper left", ncols=len(models))
    _tidy(axes)
    _save(figure, path)


def plot_report(models: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot what compression kept and what it gained: AP, latency, file size and MACs side by side.

    Args:
        models: the report's models, the one to compare with (the teacher) first. Each has ``name``, ``ap`` (subset to
            0–1 or None), ``latency_ms_median``, ``onnx_bytes`` and ``macs``; without labels ``agreement`` with the
            first, 0–1 or None, which takes the place of AP.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).

    Raises:
        ValueError: there are no models.
    """
    if not models:
        raise ValueError("plot_report: no models")
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    ap_axes, *cost_axes = figure.subplots(1, 4, width_ratios=(1.8, 1, 1, 1))
    if "agreement" in models[0]:
        _plot_agreement(ap_axes, models)
    else:
        _plot_ap(ap_axes, models)
    panels = (
        ("latency", "ms per photo, median", "latency_ms_median", 1.0, "faster"),
        ("file size", "MB of ONNX", "onnx_bytes", 1e6, "smaller"),
        ("computation", "GMACs per photo", "macs", 1e9, "fewer"),
    )
    for axes, (title, unit, key, scale, gain) in zip(cost_axes, panels, strict=True):
        values = [model[key] / scale for model in models]
        bars = axes.bar([model["name"] for model in models], values, color=_colours(len(models)), width=0.7)
        axes.bar_label(bars, labels=[_cost_label(value, values[0], gain) for value in values], padding=2)
        axes.set(title=title, ylabel=unit)
        axes.margins(y=0.3)
        _tidy(axes)
    _save(figure, path)


def plot_ap_against_latency(models: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot accuracy against time: a disc per model whose area is the size of its file, and a line in their order.

    Args:
        models: as for :func:`plot_report`; each has ``latency_ms_p10`` and ``latency_ms_p90`` too, which end the line
            through its disc.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).

    Raises:
        ValueError: there are no models.
    """
    if not models:
        raise ValueError("plot_ap_against_latency: no models")
    compared = "agreement" in models[0]
    figure = Figure(figsize=(4.8, 4), layout="constrained")
    axes = figure.subplots()
    values = np.array([model["agreement"] if compared else model["ap"]["all"] for model in models], float)
    times = np.array([model["latency_ms_median"] for model in models])
    sizes = np.array([model["onnx_bytes"] for model in models]) / 1e6
    axes.plot(times, values, color="#888888", linewidth=1, linestyle=":", zorder=1)
    for index, (model, colour) in enumerate(zip(models, _colours(len(models)), strict=True)):
        low, high = model["latency_ms_p10"], model["latency_ms_p90"]
        axes.plot([low, high], [values[index]] * 2, color=colour, linewidth=1.5, zorder=2)
        axes.scatter(times[index], values[index], 600 * sizes[index] / sizes.max(), color=colour, alpha=0.8, zorder=3)
    handles = [axes.scatter([], [], 60, color=colour) for colour in _colours(len(models))]
    labels = [f"{model['name']}, {size:.2f} MB" for model, size in zip(models, sizes, strict=True)]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    axes.set(xlabel="ms per photo, median (line: 10 % to 90 %)", ylabel="agreement" if compared else "AP (all)")
    axes.set_xlim(0, 1.1 * max(model["latency_ms_p90"] for model in models))
    if known := values[np.isfinite(values)].tolist():
        # Never so near that noise looks like a difference.
        middle, half = (max(known) + min(known)) / 2, max(0.8 * (max(known) - min(known)), 0.03)
        axes.set_ylim(max(middle - half, -0.02), min(middle + half, 1.02))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_training(figures: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Plot a training: the losses, the average precision on the validation photos and the learning rates.

    Args:
        figures: of :func:`retinaface.evaluation.training_log.read_training_log`; what is not there gets no panel.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).

    Raises:
        ValueError: there is nothing to plot.
    """
    panels = {
        "loss": {name.removesuffix("/loss"): each for name, each in figures.items() if name.endswith("/loss")},
        "AP": {name.removeprefix("val/ap_"): each for name, each in figures.items() if name.startswith("val/ap_")},
        "learning rate": {name: each for name, each in figures.items() if name.startswith("lr-")},
    }
    shown = {title: lines for title, lines in panels.items() if lines}
    if not shown:
        raise ValueError("plot_training: no losses, average precision or learning rate")
    figure = Figure(figsize=(4.8, 0.6 + 1.7 * len(shown)), layout="constrained")
    every = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(every, shown.items(), strict=True):
        for (name, line), colour in zip(lines.items(), _colours(len(lines) + 2)[2:], strict=True):
            marker = "." if len(line) < 30 else ""  # a single figure has no line
            axes.plot([*line], [*line.values()], label=name, color=colour, linewidth=1.5, marker=marker)
        axes.set_ylabel(title)
        if title != "learning rate":  # its groups have the rates of parts of the network, mostly the same
            axes.legend(frameon=False, ncols=2)
        highest = max((value for line in lines.values() for value in line.values() if math.isfinite(value)), default=0)
        axes.set_ylim(0, 1.1 * highest or None)
        _tidy(axes)
    every[-1].set_xlabel("training step")
    _save(figure, path)


def plot_face_sizes(short_sides: Mapping[str, ArrayLike], path: Path, smallest_anchor: float) -> None:
    """Plot how large the faces are: their share by shorter side, one outline per split.

    Args:
        short_sides: split to shorter sides in pixels, each above 0.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
        smallest_anchor: side in pixels of the smallest anchor, where a line is drawn: well below it faces are hard
            to match.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    # Two per doubling, 1 to 2048 pixels: finer ones would hold now more, now fewer of the whole numbers that sides are.
    bins = 2.0 ** np.arange(0, 11.5, 0.5)
    for (split, values), colour in zip(short_sides.items(), _BAR_COLOURS[2:], strict=False):
        sides = np.asarray(values, float).clip(bins[0], bins[-1])
        share = np.histogram(sides, bins)[0] / max(len(sides), 1)
        axes.stairs(share, bins, label=f"{split}: {len(sides):,} faces", color=colour, linewidth=2)
    axes.axvline(smallest_anchor, color="black", linestyle="--", label=f"smallest anchor, {smallest_anchor:g} px")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="shorter side of the face, pixels of the photo", ylabel="share of faces", title="Face sizes")
    axes.legend()
    _tidy(axes)
    _save(figure, path)


def plot_kept_channels(layers: Mapping[str, tuple[int, int]], path: Path) -> None:
    """Plot the share of its channels that pruning left in every layer.

    Args:
        layers: layer name to output channels before and after.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
    """
    figure = Figure(figsize=(8, 1.2 + 0.19 * len(layers)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(layers))
    shares = [after / before for before, after in layers.values()]
    axes.barh(places, np.ones(len(layers)), color=_BAR_COLOURS[0], alpha=0.4)
    bars = axes.barh(places, shares, color=_BAR_COLOURS[2])
    axes.bar_label(bars, [f"{after} of {before}" for before, after in layers.values()], padding=3, fontsize=7)
    axes.set_yticks(places, [*layers], fontsize=7)
    axes.set(xlabel="share of the output channels", title="Channels kept", xlim=(0, 1.15))
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_sensitivity(groups: Mapping[str, Mapping[float, tuple[float, float]]], path: Path) -> None:
    """Plot what pruning one group of channels costs and brings: a row per group, a column per ratio.

    Args:
        groups: group to ratio of its channels to the loss of average precision and the speed-up; all with the same
            ratios.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
    """
    ratios = [f"{ratio:.0%}" for ratio in next(iter(groups.values()), {})]
    values = np.array([[*points.values()] for points in groups.values()], float).reshape(len(groups), len(ratios), 2)
    figure = Figure(figsize=(9, 1.4 + 0.21 * len(groups)), layout="constrained")
    panels = (("loss of AP", "YlOrRd", "{:+.3f}"), ("speed-up", "YlGn", "{:.2f}x"))
    for index, (axes, (title, colours, style)) in enumerate(
        zip(figure.subplots(1, 2, sharey=True), panels, strict=True)
    ):
        shown = values[..., index]
        axes.imshow(shown, cmap=colours, aspect="auto", vmin=index)  # no loss, and a speed-up of 1, are white
        for (row, column), value in np.ndenumerate(shown):
            axes.text(column, row, style.format(value), ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(ratios)), ratios)
        axes.set(title=title, xlabel="share of the channels removed")
        axes.set_yticks(range(len(groups)), [*groups], fontsize=7)
    _save(figure, path)


def plot_mixed_precision(parts: Mapping[str, tuple[float, float]], path: Path) -> None:
    """Plot what leaving one part of a network in float wins back and costs, against the network in INT8: a row a part.

    Args:
        parts: name of a part to the gain of average precision and to how much longer the network takes, as a share;
            negative where it loses, or is faster.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
    """
    figure = Figure(figsize=(9, 1.4 + 0.21 * len(parts)), layout="constrained")
    figure.suptitle("One part in float, the rest in INT8")
    gains, times = np.array([*parts.values()], float).reshape(-1, 2).T
    places = np.arange(len(parts))
    panels = (("gain of AP", gains, "{:+.3f}", 1), ("change of the time per photo", times, "{:+.0%}", -1))
    for axes, (title, values, style, better) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        colours = [_BAR_COLOURS[3 if value * better > 0 else 4] for value in values]
        bars = axes.barh(places, values, color=colours)
        axes.bar_label(bars, [style.format(value) for value in values], padding=2, fontsize=7)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=title)
        axes.margins(x=0.2)
        axes.set_yticks(places, [*parts], fontsize=7)
        axes.set_ylim(len(parts) - 0.4, -0.6)  # the first on top
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _, style=style: style.format(value))
    _save(figure, path)


def plot_benchmark(panels: Mapping[str, Sequence["Timing"]], path: Path) -> None:
    """Plot how long models take in runtimes: a panel per combination of size, batch and threads, a bar per entry.

    Args:
        panels: title to timings, the one to compare with first.
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
    """
    from retinaface.evaluation.benchmark_text import short_names  # which makes who only draws faces wait for SciPy

    heights = [len(timings) + 1.5 for timings in panels.values()]
    figure = Figure(figsize=(9, 0.6 + 0.36 * sum(heights)), layout="constrained")
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, timings) in zip(every, panels.items(), strict=True):
        models = [*dict.fromkeys(timing.model for timing in timings)]
        names = short_names(models)
        colours = dict(zip(models, _colours(len(models)), strict=True))
        places, medians = np.arange(len(timings)), np.array([timing.median_ms for timing in timings])
        spread = [medians - [timing.p10_ms for timing in timings], [timing.p90_ms for timing in timings] - medians]
        axes.barh(places, medians, color=[colours[timing.model] for timing in timings], xerr=spread, capsize=3)
        for place, timing in zip(places, timings, strict=True):
            verdict = f" {timing.ratio:.2f}x" if timing.differs else " within noise" if place else ""
            axes.text(timing.p90_ms, place, f"  {timing.median_ms:.2f} ms{verdict}", va="center", fontsize=8)
        axes.set_yticks(places, [f"{names[timing.model]}, {timing.runtime}" for timing in timings], fontsize=8)
        axes.set_ylim(len(timings) - 0.4, -0.6)  # the first on top
        axes.set_xlim(0, 1.3 * max(timing.p90_ms for timing in timings))
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    every[-1].set_xlabel("ms per call, median (line: 10 % to 90 %), speed-up against the first")
    _save(figure, path)


def _plot_ap(axes: Axes, models: Sequence[Mapping[str, Any]]) -> None:
    """Draw a group of bars per subset that any model has a value for, each model with its share of the first's AP."""
    subsets = [name for name in SUBSETS if any(model["ap"].get(name) is not None for model in models)]
    width = 0.85 / len(models)
    crowded = len(subsets) * len(models) > 4
    style, separator = ({"rotation": 90, "fontsize": 8.5}, " ") if crowded else ({"fontsize": 10}, "\n")
    for index, (model, colour) in enumerate(zip(models, _colours(len(models)), strict=True)):
        for group, subset in enumerate(subsets):
            value, reference = model["ap"].get(subset), models[0]["ap"].get(subset)
            if value is None:
                continue
            share = f"{separator}({value / reference:.1%})" if index and reference else ""
            bars = axes.bar(group + (index - (len(models) - 1) / 2) * width, value, width * 0.94, color=colour)
            axes.bar_label(bars, labels=[f"{value:.3f}{share}"], padding=3, **style)
    handles = [axes.bar(0, 0, color=colour) for colour in _colours(len(models))]
    axes.legend(handles, [model["name"] for model in models], loc="upper center", ncols=len(models), frameon=False)
    axes.set(title="accuracy kept", ylabel="average precision", ylim=(0, 1.45), yticks=np.linspace(0, 1, 6))
    axes.set_xticks(range(len(subsets)), subsets)
    _tidy(axes)


def _plot_agreement(axes: Axes, models: Sequence[Mapping[str, Any]]) -> None:
    """Draw a bar per model."""
    values = [model["agreement"] for model in models]
    bars = axes.bar(
        [model["name"] for model in models],
        [value or 0 for value in values],
        color=_colours(len(models)),
        width=0.7,
    )
    axes.bar_label(bars, labels=["-" if value is None else f"{value:.1%}" for value in values], padding=2)
    axes.set(title="agreement with the teacher", ylim=(0, 1.2), yticks=np.linspace(0, 1, 6))
    _tidy(axes)


def _cost_label(value: float, reference: float, gain: str) -> str:
    ratio = f"\n{reference / value:.1f}x\n{gain}" if 0 < value < reference else ""
    return f"{value:.3g}{ratio}"


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _colours(count: int) -> list[str]:
    return [_BAR_COLOURS[index % len(_BAR_COLOURS)] for index in range(count)]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120)


def _boxes(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, float).reshape(-1, 4)


def _thickness(image: Image) -> int:
    return max(1, int(max(image.shape[:2]) / 500 + 0.5))


def _pixel(point: Iterable[float]) -> tuple[int, int]:
    # Far outside the image OpenCV's 32-bit coordinates would overflow; the line leaves the image all the same.
    x, y = (round(min(max(value, -32000), 32000)) for value in point)
    return x, y


def _rectangle(image: Image, box: NDArray[np.float64], colour: Colour) -> None:
    cv2.rectangle(image, _pixel(box[:2]), _pixel(box[2:]), colour, _thickness(image))


def _cross_out(image: Image, box: NDArray[np.float64], thickness: int) -> None:
    (left, top), (right, bottom) = _pixel(box[:2]), _pixel(box[2:])
    cv2.rectangle(image, (left, top), (right, bottom), GREY, thickness)
    cv2.line(image, (left, top), (right, bottom), GREY, thickness)
    cv2.line(image, (left, bottom), (right, top), GREY, thickness)


def _dots(image: Image, box: NDArray[np.float64], points: NDArray[np.float64]) -> None:
    """Draw five landmarks, small enough to leave the face to be seen."""
    radius = max(1, round(min(box[2] - box[0], 15 * _thickness(image)) / 12))
    for point, colour in zip(points, LANDMARK_COLOURS, strict=True):
        if np.isfinite(point).all():
            cv2.circle(image, _pixel(point), radius + 1, (0, 0, 0), cv2.FILLED, cv2.LINE_AA)
            cv2.circle(image, _pixel(point), radius, colour, cv2.FILLED, cv2.LINE_AA)


def _label(image: Image, box: NDArray[np.float64], text: str, colour: Colour) -> None:
    """Write white text on a coloured plate: above the box, or inside its top where the image ends.

    The text is as wide as the box, as far as it stays legible, so that in a crowd it does not hide other faces.
    """
    (full_width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1, 1)
    scale = max(0.3, min((box[2] - box[0]) / full_width, max(image.shape[:2]) / 1800 + 0.2))
    thickness = max(1, round(scale * 1.5))
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    left, top = _pixel(box[:2])
    left = min(max(left, 0), max(image.shape[1] - width, 0))
    bottom = top if top >= height + below else top + height + below
    cv2.rectangle(image, (left, bottom - height - below), (left + width, bottom), colour, cv2.FILLED)
    white = (255, 255, 255)
    cv2.putText(image, text, (left, bottom - below), cv2.FONT_HERSHEY_SIMPLEX, scale, white, thickness, cv2.LINE_AA)


def _resize_to_width(image: Image, width: int) -> Image:
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    shrinks = width < image.shape[1]
    resized: Image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized
