"""Runs a detector from any of its file formats behind one interface."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinaface.compression.structure import load_network
from retinaface.cpus import saturates_int8, usable_cpus
from retinaface.delivery.export import INPUT_NAME, METADATA_KEY, OUTPUT_NAMES
from retinaface.delivery.session import open_session
from retinaface.errors import InputError
from retinaface.model.network import NetworkConfig, Outputs, as_input, pad_small
from retinaface.model.postprocess import Detections, postprocess


@dataclass(frozen=True)
class Detector:
    """A network that is ready to run.

    Attributes:
        config: Its anchors and strides.
        run: Maps ``(B, 3, H, W)`` float32 from :func:`retinaface.model.network.normalize` to raw outputs.
        runtime: What runs it: ``torch`` or ``onnxruntime``.
    """

    config: NetworkConfig
    run: Callable[[Tensor], Outputs]
    runtime: str

    def detect(
        self,
        image: NDArray[np.uint8],
        score_threshold: float = 0.5,
        nms_threshold: float = 0.4,
        top_k: int = 5000,
        keep: int = 750,
    ) -> Detections:
        """Finds the faces in one picture, at its own size.

        Args:
            image: ``(H, W, 3)`` uint8 BGR, as OpenCV reads it.
            score_threshold: Faces with a lower score are dropped.
            nms_threshold: Of two boxes with a higher IoU the lower-scored one is dropped.
            top_k: Candidates that enter the suppression.
            keep: Faces that are returned at most.

        Returns:
            The faces, best first, in pixels of the picture.
        """
        images = pad_small(as_input(image))
        outputs = self.run(images)
        size = (images.shape[2], images.shape[3])
        return postprocess(outputs, size, self.config, score_threshold, nms_threshold, top_k, keep)[0]


def load_detector(path: Path | str, threads: int | None = None) -> Detector:
    """Loads a detector.

    Args:
        path: A public RetinaFace file (.pth), one of this project's checkpoints (.ckpt) or its ONNX files (.onnx). A
            checkpoint of quantization-aware training runs with simulated INT8. An INT8 ONNX file with weights of 8 bits
            comes with a warning where it can be wrong (:func:`retinaface.cpus.saturates_int8`).
        threads: Threads of ONNX Runtime; None takes all CPUs that this process may use.

    Returns:
        The detector.

    Raises:
        InputError: No such file, or not a detector.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a detector (.pth, .ckpt or .onnx)")
    if path.suffix == ".onnx":
        return _load_onnx(path, threads)
    network, structure = load_network(path)

    @torch.inference_mode()
    def run(images: Tensor) -> Outputs:
        outputs: Outputs = network(images)
        return outputs

    return Detector(structure.network, run, "torch")


def _load_onnx(path: Path, threads: int | None) -> Detector:
    session = open_session(path, threads or len(usable_cpus()))
    metadata = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    try:
        facts = json.loads(metadata)
        config = NetworkConfig(**facts["network"])
    except (KeyError, TypeError, ValueError) as error:  # a TypeError too where there are none
        raise InputError(
            f"{path}: has no anchors in its metadata; export it with `python -m retinaface export`"
        ) from error
    if facts.get("weight_bits") == 8 and saturates_int8():
        warnings.warn(
            f"{path}: this CPU has no INT8 dot products (VNNI), so sums of products of 8-bit numbers are cut off at 16 "
            "bits and faces can be missed; quantize with `weight_bits: 7`, or evaluate this file here before using it",
            stacklevel=3,
        )

    def run(images: Tensor) -> Outputs:
        class_logits, box_deltas, landmark_deltas = session.run(list(OUTPUT_NAMES), {INPUT_NAME: images.numpy()})
        return torch.from_numpy(class_logits), torch.from_numpy(box_deltas), torch.from_numpy(landmark_deltas)

    return Detector(config, run, "onnxruntime")
