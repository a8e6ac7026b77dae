"""What an ONNX file takes and what it gives: the steps around the network that can be part of the file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from onnxscript import opset18
from torch import Tensor, nn

from retinaface.errors import InputError
from retinaface.model.anchors import make_anchors
from retinaface.model.boxes import decode_boxes, decode_landmarks
from retinaface.model.network import NetworkConfig, Outputs, face_logit, normalize
from retinaface.model.postprocess import best_anchors, suppress

Form = Literal["raw", "decoded", "end_to_end"]
Input = Literal["normalized", "uint8", "bgr", "rgb"]

# boxes (B, A, 4) xyxy in pixels, scores (B, A), landmarks (B, A, 5, 2) in pixels
Decoded = tuple[Tensor, Tensor, Tensor]
# boxes (N, 4), scores (N,), landmarks (N, 5, 2), picture_index (N,) int64
Faces = tuple[Tensor, Tensor, Tensor, Tensor]

RAW_NAMES = ("class_logits", "box_deltas", "landmark_deltas")
_DECODED_NAMES = ("boxes", "scores", "landmarks")
_FACES_NAMES = (*_DECODED_NAMES, "picture_index")
_STEPS: dict[Form, tuple[tuple[str, ...], ...]] = {
    "raw": (RAW_NAMES,),
    "decoded": (RAW_NAMES, _DECODED_NAMES),
    "end_to_end": (RAW_NAMES, tuple(f"anchor_{name}" for name in _DECODED_NAMES), _FACES_NAMES),
}

KEEP = 750
"""Faces per picture that an end-to-end file gives at most; as many as ``Detector.detect``."""

_SMALLEST_SIDE = 33  # below, a graph for INT8 does not run


@dataclass(frozen=True)
class OnnxSettings:
    """What kind of ONNX file to write.

    Attributes:
        form: ``raw`` gives ``class_logits (B, A, 2)``, ``box_deltas (B, A, 4)`` and ``landmark_deltas (B, A, 10)``.
            ``decoded`` gives ``boxes (B, A, 4)`` xyxy and ``landmarks (B, A, 5, 2)`` in pixels of the input and
            ``scores (B, A)`` in 0-1, for every anchor. ``end_to_end`` gives the faces of all pictures of the batch,
            picture after picture, best first: ``boxes (N, 4)``, ``scores (N,)``, ``landmarks (N, 5, 2)`` and
            ``picture_index (N,)`` int64, which picture each is in. All but that are float32. Every anchor above the
            threshold enters the suppression, where ``Detector.detect`` takes the best 5000, and 750 faces a picture
            are given at most.
        input: ``normalized`` takes float32 from :func:`retinaface.model.network.normalize` (BGR, 0-255, minus the mean
            colour), ``uint8`` the picture itself (BGR, 0-255), both ``(B, 3, H, W)``. ``bgr`` and ``rgb`` take it as
            programs have it, uint8 ``(B, H, W, 3)``: OpenCV reads BGR; Pillow, browsers and cameras give RGB.
        size: Height and width in pixels that the file takes; None for any from 33.
        batch: Pictures per call that the file takes; None for any number.
        score_threshold: ``end_to_end``: faces with a lower score are dropped.
        nms_threshold: ``end_to_end``: of two boxes with a higher IoU the lower-scored one is dropped.
        least_channels: INT8 for ONNX Runtime: narrower float layers are filled up to it with zeros. 16 is for CPUs with
            AVX-512, 8 for those with AVX2 alone, and 1, which fills nothing, for browsers; see
            :func:`retinaface.delivery.int8_layout.widen_float_layers`.

    Raises:
        InputError: A setting is out of range.
    """

    form: Form = "raw"
    input: Input = "normalized"
    size: tuple[int, int] | None = None
    batch: int | None = None
    score_threshold: float = 0.5
    nms_threshold: float = 0.4
    least_channels: int = 16

    def __post_init__(self) -> None:
        for name, choices in (("form", get_args(Form)), ("input", get_args(Input))):
            if getattr(self, name) not in choices:
                raise InputError(f"export: {name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < _SMALLEST_SIDE):
            raise InputError(
                f"export: size is {'x'.join(map(str, self.size))}; expected height and width of {_SMALLEST_SIDE} "
                "pixels or more, such as 480x640, or none for any"
            )
        if self.batch is not None and self.batch < 1:
            raise InputError(f"export: batch is {self.batch}; expected 1 or more, or none for any")
        if self.least_channels < 1:
            raise InputError(
                f"export: least_channels is {self.least_channels}; expected what a CPU computes at once, 16 with "
                "AVX-512 and 8 with AVX2, or 1 for layers as they are"
            )
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"export: {name} is {getattr(self, name)}; expected a number from 0 to 1")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the file's outputs, in order."""
        return _STEPS[self.form][-1]

    @property
    def in_planes(self) -> bool:
        """Whether the file takes ``(B, 3, H, W)``, else ``(B, H, W, 3)``."""
        return self.input in ("normalized", "uint8")

    def feed(self, pictures: Tensor) -> Tensor:
        """What the file takes of pictures ``(B, 3, H, W)`` uint8 BGR."""
        if self.input == "normalized":
            return normalize(pictures)
        if self.in_planes:
            return pictures
        ordered = pictures.flip(1) if self.input == "rgb" else pictures
        return ordered.permute(0, 2, 3, 1).contiguous()

    @property
    def step_names(self) -> tuple[str, ...]:
        """Names of the outputs of every step, in order; the last ones are those of the file."""
        return tuple(name for step in _STEPS[self.form] for name in step)


class OnnxForm(nn.Module):
    """A network with the steps before and after it that are to be part of the file.

    Args:
        network: Maps normalized pictures to raw outputs.
        config: Its anchors and strides.
        settings: The steps.
    """

    black: Tensor

    def __init__(self, network: nn.Module, config: NetworkConfig, settings: OnnxSettings) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.settings = settings
        # A buffer, as normalize() keeps the mean in a cache, in which an export would leave a symbol.
        self.register_buffer("black", normalize(torch.zeros(1, 3, 1, 1)), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps what the settings say that the file takes to the outputs of every step."""
        if not self.settings.in_planes:
            images = images.permute(0, 3, 1, 2)
        if self.settings.input == "rgb":
            images = images[:, [2, 1, 0]]
        if self.settings.input != "normalized":
            images = images.float() + self.black
        raw: Outputs = self.network(images)
        if self.settings.form == "raw":
            return raw
        decoded = decode(raw, images.shape[-2], images.shape[-1], self.config)
        return (*raw, *decoded) if self.settings.form == "decoded" else (*raw, *decoded, *self.select(decoded))

    def select(self, decoded: Decoded) -> Faces:
        """Chooses the faces by score and suppression, all that the settings say."""
        boxes, scores, landmarks = decoded
        kept = _kept_anchors(boxes, scores, self.settings.score_threshold, self.settings.nms_threshold)
        picture, anchor = kept[:, 0], kept[:, 2]
        return boxes[picture, anchor], scores[picture, anchor], landmarks[picture, anchor], picture


def decode(raw: Outputs, height: int, width: int, config: NetworkConfig) -> Decoded:
    """Turns raw outputs into boxes, scores and landmarks of every anchor.

    Args:
        raw: ``class_logits (B, A, 2)``, ``box_deltas (B, A, 4)``, ``landmark_deltas (B, A, 10)``.
        height: Of the network's input in pixels; while exporting, a symbol.
        width: As ``height``.
        config: The network's anchors and strides.

    Returns:
        ``boxes (B, A, 4)`` float32 xyxy in pixels, ``scores (B, A)`` float32 in 0-1, ``landmarks (B, A, 5, 2)`` float32
        in pixels: the numbers of :func:`retinaface.model.postprocess.postprocess`.
    """
    class_logits, box_deltas, landmark_deltas = raw
    # Without its cache, which would keep the symbols.
    anchors = make_anchors.__wrapped__(height, width, config.anchor_sizes, config.strides)
    scale = torch.tensor([width, height], dtype=torch.float32)
    boxes = decode_boxes(box_deltas, anchors) * scale.repeat(2)
    scores = face_logit(class_logits).sigmoid()
    return boxes, scores, decode_landmarks(landmark_deltas, anchors) * scale


@torch.library.custom_op("retinaface::kept_anchors", mutates_args=())
def _kept_anchors(boxes: Tensor, scores: Tensor, score_threshold: float, nms_threshold: float) -> Tensor:
    """Score threshold and suppression, as ONNX defines them in one operation.

    Args:
        boxes: ``(B, A, 4)`` float32 xyxy.
        scores: ``(B, A)`` float32.
        score_threshold: Lower scores are dropped.
        nms_threshold: Of two boxes with a higher IoU the lower-scored one is dropped.

    Returns:
        ``(N, 3)`` int64: picture, 0 (the class) and anchor of each kept box; picture after picture, best first.
    """
    found = []
    nms_threshold = float(np.float32(nms_threshold))  # as in ONNX
    for picture, picture_scores in enumerate(scores):
        best, candidates = best_anchors(picture_scores, score_threshold)
        kept = candidates[suppress(boxes[picture, candidates], best, nms_threshold, KEEP)]
        found.append(torch.stack([torch.full_like(kept, picture), torch.zeros_like(kept), kept], dim=1))
    return torch.cat(found)


@_kept_anchors.register_fake
def _(boxes: Tensor, scores: Tensor, score_threshold: float, nms_threshold: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64)


def _non_max_suppression(boxes: Any, scores: Any, score_threshold: float, nms_threshold: float) -> Any:  # noqa: ANN401
    # Runtimes keep what is above the threshold; here, as everywhere in this project, what is at it is kept too.
    below = float(np.nextafter(np.float32(score_threshold), np.float32(-1)))
    return opset18.NonMaxSuppression(
        boxes,
        opset18.Unsqueeze(scores, opset18.Constant(value_ints=[1])),
        opset18.Constant(value_ints=[KEEP]),
        opset18.Constant(value_floats=[nms_threshold]),
        opset18.Constant(value_floats=[below]),
    )


def _reshape(tensor: Any, size: Sequence[Any]) -> Any:  # noqa: ANN401
    # The exporter would compute open axes from height and width, in dozens of nodes. Of two the first is the batch.
    is_open = [not isinstance(length, int) for length in size]
    shape = [-1 if opened else length for opened, length in zip(is_open, size, strict=True)]
    if is_open[0] and sum(is_open) > 1:
        shape[0] = 0  # as it is
    return opset18.Reshape(tensor, opset18.Constant(value_ints=shape))


# What the exporter makes of this file's own operation, and of those that its own translation makes slow.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.retinaface.kept_anchors.default: _non_max_suppression,
    torch.ops.aten.view.default: _reshape,
    torch.ops.aten._unsafe_view.default: _reshape,
}
