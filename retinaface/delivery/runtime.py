"""Runs a detector from any of its file formats, in any runtime, behind one interface."""

import json
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinaface.compression.structure import Network, load_network
from retinaface.cpus import saturates_int8, usable_cpus
from retinaface.delivery.export import INPUT_NAME, METADATA_KEY, OUTPUT_NAMES
from retinaface.delivery.letterbox import letterbox, to_photo, without_padding
from retinaface.delivery.session import compile_for_openvino, open_session
from retinaface.errors import InputError, one_line
from retinaface.model.network import NetworkConfig, Outputs
from retinaface.model.postprocess import Detections, postprocess

# Parts of the names of providers and devices that leave the CPU alone.
_NOT_THE_CPU = ("cuda", "tensorrt", "rocm", "migraphx", "coreml", "dml", "gpu", "npu", "qnn", "cann")

# Each has a photo in memory, and threads of its own for what is computed in torch.
_MOST_CALLERS = 8

RuntimeChoice = Literal["auto", "torch", "onnxruntime", "openvino"]


@dataclass(frozen=True)
class Detector:
    """A network that is ready to run. Several threads may use it at once.

    Attributes:
        config: Its anchors and strides.
        run: Maps ``(B, 3, H, W)`` float32 from :func:`retinaface.model.network.normalize` to raw outputs on the CPU.
        runtime: What runs it: ``torch``, ``onnxruntime`` or ``openvino``.
        batch: The only number of pictures that it takes; None for any.
        size: The only height and width in pixels that it takes; None for any.
        callers: Threads that get most out of it together, where there are many pictures.
    """

    config: NetworkConfig
    run: Callable[[Tensor], Outputs]
    runtime: str
    batch: int | None = None
    size: tuple[int, int] | None = None
    callers: int = 1

    def detect(
        self,
        image: NDArray[np.uint8],
        score_threshold: float = 0.5,
        nms_threshold: float = 0.4,
        top_k: int = 5000,
        keep: int = 750,
        longest: int | None = None,
    ) -> Detections:
        """Finds the faces in one picture, at its own size; what does not fit in a fixed :attr:`size` is shrunk.

        Faces much larger than the largest anchor (512 pixels) are not found: ``longest`` brings photos of many
        megapixels to a size that detectors are trained for.

        Args:
            image: ``(H, W, 3)`` uint8 BGR, as OpenCV reads it.
            score_threshold: Faces with a lower score are dropped.
            nms_threshold: Of two boxes with a higher IoU the lower-scored one is dropped.
            top_k: Candidates that enter the suppression.
            keep: Faces that are returned at most.
            longest: Pictures whose long side is above this many pixels are shrunk to it; None: none are.

        Returns:
            The faces, best first, in pixels of the picture.

        Raises:
            InputError: It is no such picture.
        """
        return self.detect_batch([image], score_threshold, nms_threshold, top_k, keep, longest)[0]

    def detect_batch(
        self,
        images: Sequence[NDArray[np.uint8]],
        score_threshold: float = 0.5,
        nms_threshold: float = 0.4,
        top_k: int = 5000,
        keep: int = 750,
        longest: int | None = None,
    ) -> list[Detections]:
        """Finds the faces in several pictures with one call of the network.

        Pictures of one size give what they give one by one. Others are filled up to the largest height and width with
        the mean colour, which costs time, and changes a little what is found near the filled sides.

        Args:
            images: Any number of pictures, ``(H, W, 3)`` uint8 BGR each, of any sizes.
            score_threshold: As for :meth:`detect`.
            nms_threshold: As for :meth:`detect`.
            top_k: As for :meth:`detect`, per picture.
            keep: As for :meth:`detect`, per picture.
            longest: As for :meth:`detect`.

        Returns:
            The faces of each picture, best first, in its own pixels.

        Raises:
            InputError: One is no such picture.
        """
        batch = self.batch or max(1, len(images))
        found = []
        for start in range(0, len(images), batch):
            pictures = list(images[start : start + batch])
            boxed = letterbox(pictures + pictures[-1:] * (batch - len(pictures)), self.size, longest)
            outputs = without_padding(self.run(boxed.images), boxed, self.config)
            size = (boxed.images.shape[2], boxed.images.shape[3])
            faces = postprocess(outputs, size, self.config, score_threshold, nms_threshold, top_k, keep)
            found += [to_photo(each, scale) for each, scale in zip(faces, boxed.scales, strict=True)]
        return found[: len(images)]


class TorchRuntime:
    """Runs a network in torch.

    Args:
        network: In evaluation mode.
        device: Where to run it.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        self._network = network.to(device)
        self._device = device
        self(torch.zeros(1, 3, 64, 64))  # a fake-quantized graph changes at its first run, which must be nobody else's

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Outputs:
        """Maps ``(B, 3, H, W)`` to raw outputs."""
        # Channels last is faster on the CPU.
        pictures = images.to(self._device, memory_format=torch.channels_last)
        class_logits, box_deltas, landmark_deltas = self._network(pictures)
        return class_logits.cpu(), box_deltas.cpu(), landmark_deltas.cpu()


class OnnxRuntime:
    """Runs a file in ONNX Runtime.

    Args:
        path: ONNX file.
        threads: Threads to compute with, beside those of the callers.
        providers: As for :func:`retinaface.delivery.session.open_session`.
    """

    def __init__(self, path: Path, threads: int, providers: Sequence[str] | None) -> None:
        self._session = open_session(path, threads, providers=providers)

    def __call__(self, images: Tensor) -> Outputs:
        """Maps ``(B, 3, H, W)`` to raw outputs."""
        return _as_outputs(self._session.run(list(OUTPUT_NAMES), {INPUT_NAME: images.numpy()}))


class OpenVinoRuntime:
    """Runs a file in OpenVINO.

    Args:
        path: ONNX file.
        threads: Threads of the CPU to compute with; None leaves it to OpenVINO.
        device: As for :func:`retinaface.delivery.session.compile_for_openvino`.
    """

    def __init__(self, path: Path, threads: int | None, device: str) -> None:
        self._model = compile_for_openvino(path, threads, device)
        self._of_thread = threading.local()  # a request serves one caller at a time

    def __call__(self, images: Tensor) -> Outputs:
        """Maps ``(B, 3, H, W)`` to raw outputs."""
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self._model.create_infer_request()
        results = self._of_thread.request.infer({INPUT_NAME: images.numpy()})
        return _as_outputs([results[name] for name in OUTPUT_NAMES])


def _as_outputs(arrays: Sequence[NDArray[np.float32]]) -> Outputs:
    class_logits, box_deltas, landmark_deltas = (torch.from_numpy(array) for array in arrays)
    return class_logits, box_deltas, landmark_deltas


def load_detector(
    path: Path | str,
    threads: int | None = None,
    *,
    runtime: RuntimeChoice = "auto",
    providers: Sequence[str] | None = None,
    device: str | None = None,
    many: bool = False,
) -> Detector:
    """Loads a detector.

    Args:
        path: A public RetinaFace file (.pth), one of this project's checkpoints (.ckpt) or its ONNX files with raw
            outputs (.onnx). A checkpoint of quantization-aware training runs with simulated INT8. An INT8 ONNX file
            with weights of 8 bits comes with a warning where it can be wrong
            (:func:`retinaface.cpus.saturates_int8`).
        threads: Threads to compute with; for torch they are those of the whole process. None takes all CPUs that this
            process may use, or what torch and OpenVINO choose.
        runtime: ``torch`` for .pth and .ckpt, ``onnxruntime`` or ``openvino`` for .onnx; ``auto`` takes torch or ONNX
            Runtime.
        providers: ONNX Runtime's execution providers by name, the preferred one first, such as ``["CUDA"]`` or
            ``["CoreML"]``; by default the CPU.
        device: Where torch (``cpu``, ``cuda``, ``cuda:1``, ``mps``) or OpenVINO (``CPU``, ``GPU``) computes; by default
            the CPU.
        many: Whether it is for many pictures, and :attr:`Detector.callers` threads will share them. In ONNX Runtime on
            the CPU these have the CPUs to share then, unless ``threads`` says otherwise: that is faster, but for a
            single picture slower.

    Returns:
        The detector.

    Raises:
        InputError: No such file, not a detector, or the runtime cannot run it here; says what to install.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a detector (.pth, .ckpt or .onnx)")
    if threads is not None and threads < 1:
        raise InputError(f"threads: expected at least 1, found {threads}")
    is_onnx = path.suffix.lower() == ".onnx"
    chosen = ("onnxruntime" if is_onnx else "torch") if runtime == "auto" else runtime
    _require_fitting(path, is_onnx, chosen, providers, device)
    run: Callable[[Tensor], Outputs]
    callers = 1
    if chosen == "torch":
        return _load_torch(path, threads, device or "cpu")
    if chosen == "onnxruntime":
        if many and threads is None and not providers:
            callers = min(usable_cpus(), _MOST_CALLERS)
            threads = usable_cpus() // callers
        run = OnnxRuntime(path, threads or usable_cpus(), providers)
    else:
        run = OpenVinoRuntime(path, threads, device or "CPU")
    form = _read_form(path)
    places = " ".join(providers or [device or "CPU"]).lower()
    if form.weight_bits == 8 and not any(name in places for name in _NOT_THE_CPU) and saturates_int8():
        warnings.warn(
            f"{path}: this CPU has no INT8 dot products (VNNI), so sums of products of 8-bit numbers are cut off at 16 "
            "bits and faces can be missed; quantize with `weight_bits: 7`, or evaluate this file here before using it",
            stacklevel=2,
        )
    return Detector(form.config, run, chosen, form.batch, form.size, callers)


def _require_fitting(
    path: Path, is_onnx: bool, runtime: str, providers: Sequence[str] | None, device: str | None
) -> None:
    """Refuses options that would not be looked at."""
    if runtime == "torch" and is_onnx:
        raise InputError(f"{path}: torch does not run ONNX files; choose the runtime onnxruntime or openvino")
    if runtime != "torch" and not is_onnx:
        raise InputError(
            f"{path}: {runtime} runs ONNX files only; write one with `python -m retinaface export {path} --out FILE`"
        )
    if providers and runtime != "onnxruntime":
        raise InputError(f"providers: only ONNX Runtime has any, and {path} runs in {runtime}; choose a device")
    if device and runtime == "onnxruntime":
        raise InputError(f"device: {path} runs in ONNX Runtime; choose providers, such as CUDA")


def _load_torch(path: Path, threads: int | None, device: str) -> Detector:
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # a torch without CUDA fails an assertion
        raise InputError(
            f"device {device}: torch cannot use it ({one_line(error)[:100]}); choose cpu, or install a torch that can"
        ) from error
    network, structure = load_network(path)
    if threads is not None:
        torch.set_num_threads(threads)
    return Detector(structure.network, TorchRuntime(network, place), "torch")


class _Form(NamedTuple):
    """What must be known of an ONNX file to use it; ``batch`` and ``size`` are None where any will do."""

    config: NetworkConfig
    weight_bits: int | None
    batch: int | None
    size: tuple[int, int] | None


def _read_form(path: Path) -> _Form:
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        facts: dict[str, Any] = json.loads(metadata[METADATA_KEY])
        config = NetworkConfig(**facts["network"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: has no anchors in its metadata; export it with `python -m retinaface export`"
        ) from error
    (picture,) = model.graph.input
    found = [output.name for output in model.graph.output]
    if found != list(OUTPUT_NAMES) or picture.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        kind = onnx.TensorProto.DataType.Name(picture.type.tensor_type.elem_type).lower()
        raise InputError(
            f"{path}: takes {kind} and gives {', '.join(found)}; expected a file that takes float and gives "
            f"{', '.join(OUTPUT_NAMES)}, as `python -m retinaface export` writes without further options"
        )
    batch, _, height, width = (dimension.dim_value or None for dimension in picture.type.tensor_type.shape.dim)
    size = (height, width) if height and width else None
    return _Form(config, facts.get("weight_bits"), batch, size)
