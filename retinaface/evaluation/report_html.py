"""The report of a recipe as one HTML page that needs nothing else: to be read on a phone, sent and kept."""

import base64
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from numpy.typing import NDArray

from retinaface.evaluation.describe import Layer
from retinaface.evaluation.evaluate import Evaluation, Photo, draw_judged
from retinaface.evaluation.report_text import (
    environment,
    methods,
    report_rows,
    verdict,
    verdict_figures,
    what_colours_mean,
    what_is_int8,
)
from retinaface.evaluation.training_log import read_training_log
from retinaface.evaluation.visualize import (
    contact_sheet,
    plot_ap_against_latency,
    plot_precision_recall,
    plot_training,
)
from retinaface.evaluation.wider_ap import SUBSETS

TEMPLATE = Path(__file__).with_name("report_template.html")

# Each is two photos of half this width: sharp on a phone, and four of them stay below a megabyte.
_PAIRS = 4
_PAIR_WIDTH = 1400
_JPEG_QUALITY = 80


@dataclass(frozen=True)
class Picture:
    """A picture within the page.

    Attributes:
        source: Its content, as a ``data:`` address.
        text: What it shows, for those who cannot see it.
    """

    source: str
    text: str


@dataclass(frozen=True)
class Block:
    """Convolutions of one part of the network.

    Attributes:
        name: Of the part, such as ``backbone.stage1``.
        layers: Its convolutions, each with whether it is executed in INT8; None where the file does not tell.
    """

    name: str
    layers: list[tuple[Layer, bool | None]]

    @property
    def kept(self) -> float:
        """Share of the output channels that pruning left, 0-1."""
        return sum(layer.channels for layer, _ in self.layers) / sum(layer.channels_before for layer, _ in self.layers)

    @property
    def told(self) -> bool:
        """Whether the file tells what is executed in INT8."""
        return all(int8 is not None for _, int8 in self.layers)

    @property
    def in_int8(self) -> int:
        """How many convolutions are executed in INT8."""
        return sum(int8 is True for _, int8 in self.layers)


def report_html(
    report: Mapping[str, Any], evaluations: Mapping[str, Evaluation], layers: Sequence[Layer], folder: Path
) -> str:
    """Writes a report as a page without scripts, whose pictures are within it.

    Args:
        report: From :func:`retinaface.evaluation.report.build_report`.
        evaluations: Model name to its evaluation, the teacher first; all on the same photos.
        layers: The final model's convolutions.
        folder: The run's folder, with the logs of a stage in the folder of its name.

    Returns:
        The page.

    Raises:
        InputError: A photo cannot be read.
    """
    models = report["models"]
    teacher, final = models[0]["name"], models[-1]["name"]
    pages = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["inline"] = _inline
    return pages.get_template(TEMPLATE.name).render(
        report=report,
        teacher=teacher,
        final=final,
        verdict=verdict(report),
        figures=verdict_figures(report),
        table=report_rows(models),
        tradeoff=_plot(
            partial(plot_ap_against_latency, models),
            "A disc per model: time per photo to the right, accuracy upwards, file size as its area. The table has "
            "the figures.",
        ),
        curves=[] if "agreement" in models[0] else _plot_curves(evaluations),
        int8=what_is_int8(report),
        blocks=layer_blocks(layers, models[-1]["float_convolutions"]),
        training={model["name"]: _plot_training(folder / model["name"]) for model in models},
        photos=side_by_side(evaluations[teacher].photos, evaluations[final].photos, f"{teacher} left, {final} right"),
        colours=what_colours_mean(report),
        methods=methods(report),
        environment=environment(report["machine"]),
    )


def _inline(text: str) -> Markup:
    """Turns the bold words and the code of a line of Markdown into HTML, and escapes the rest."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text)))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))


def _plot(plot: Callable[[Path], None], text: str) -> Picture:
    """Has a picture plotted, in a form that is sharp at every size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.svg"
        plot(path)
        return Picture(_data_address("image/svg+xml", path.read_bytes()), text)


def _data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _plot_curves(evaluations: Mapping[str, Evaluation]) -> list[Picture]:
    """Plots precision and recall, a picture per subset, each large enough for a phone."""
    curves = {name: evaluation.accuracy.curves for name, evaluation in evaluations.items()}
    pictures = []
    for subset in SUBSETS:
        chosen = {name: {subset: each[subset]} for name, each in curves.items() if subset in each}
        if chosen:
            text = f"Precision against recall for {subset} faces, a line per model."
            pictures.append(_plot(partial(plot_precision_recall, chosen), text))
    return pictures


def _plot_training(stage: Path) -> Picture | str:
    """Plots what a stage logged, or says why there is nothing to plot."""
    if not stage.is_dir():
        return "Given, not trained here."
    if figures := read_training_log(stage):
        text = f"Training of {stage.name} by step: losses, average precision on the validation photos, learning rate."
        return _plot(partial(plot_training, figures), text)
    if any(stage.glob("lightning_logs/version_*/metrics.csv")):
        return "No curves: nothing was logged on the way."
    if any(stage.glob("lightning_logs/version_*/events.out.tfevents.*")):
        return f"The curves are in TensorBoard: tensorboard --logdir {stage / 'lightning_logs'}"
    return "No curves: the stage did not train, or it logged elsewhere, as to Weights & Biases: then they are there."


def layer_blocks(layers: Sequence[Layer], float_names: Sequence[str]) -> list[Block]:
    """Groups convolutions by the part of the network that they are in.

    Args:
        layers: The convolutions, in order.
        float_names: Those that are executed in float. If one of them is no layer, the file lost names, and nothing is
            said of any.

    Returns:
        A block per part, in order: a part is named by the first two words of its convolutions' names.
    """
    told = set(float_names) <= {layer.name for layer in layers}
    blocks: dict[str, Block] = {}
    for layer in layers:
        name = ".".join(layer.name.split(".")[:-1][:2])
        in_int8 = layer.name not in float_names if told else None
        blocks.setdefault(name, Block(name, [])).layers.append((layer, in_int8))
    return list(blocks.values())


def side_by_side(left: Sequence[Photo], right: Sequence[Photo], text: str) -> list[Picture]:
    """Draws what two detectors find on the same photos, next to each other.

    Args:
        left: The photos of one.
        right: The same photos of the other.
        text: What is where.

    Returns:
        A picture for each of up to four photos, evenly spread among those with faces.

    Raises:
        InputError: A photo cannot be read.
    """
    with_faces = [index for index, photo in enumerate(left) if photo.counted["all"].any()]
    places = np.linspace(0, len(with_faces) - 1, min(_PAIRS, len(with_faces))).round().astype(int)
    pictures = []
    for index in (with_faces[place] for place in places):
        pair = contact_sheet([draw_judged(left[index]), draw_judged(right[index])], columns=2, width=_PAIR_WIDTH)
        pictures.append(Picture(_data_address("image/jpeg", _jpeg(pair)), f"{left[index].name}: {text}"))
    return pictures


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    content: bytes = encoded.tobytes()
    return content
