"""One call of a model in a runtime, ready to be timed: from an input in memory to raw outputs, nothing after them."""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from retinaface.delivery.runtime import load_detector
from retinaface.delivery.session import compile_for_openvino, open_session
from retinaface.errors import InputError, one_line

Runtime = Literal["onnxruntime", "openvino", "torch"]

_INPUT_TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.UINT8: np.uint8}
# After a call torch's threads (OpenMP) wait in a busy loop, up to 20 ms as measured by the CPU time of the process.
_TORCH_REST = 0.02


@dataclass(frozen=True)
class RawCall:
    """A model in a runtime, with its input.

    Attributes:
        run: calls the model once.
        rest: seconds after a call until the runtime's threads leave the cores to others.
    """

    run: Callable[[], object]
    rest: float = 0.0

    def milliseconds(self) -> float:
        """Times one call, and returns when the cores are free for the next."""
        start = time.perf_counter()
        self.run()
        taken = time.perf_counter() - start
        if self.rest:
            time.sleep(self.rest)
        return taken * 1000


def fits(model: Path, runtime: Runtime) -> bool:
    """Whether a runtime takes files of this kind: torch .ckpt and .pth, the others .onnx."""
    return (model.suffix == ".onnx") != (runtime == "torch")


def usable_runtimes(models: Sequence[Path]) -> list[Runtime]:
    """The installed runtimes that take at least one of these files, ONNX Runtime first."""
    installed: list[Runtime] = ["onnxruntime", "torch"]
    if importlib.util.find_spec("openvino"):
        installed.insert(1, "openvino")
    return [runtime for runtime in installed if any(fits(model, runtime) for model in models)]


def prepare(model: Path, runtime: Runtime, size: int, batch: int, threads: int) -> RawCall:
    """Opens a model, makes its input and runs it once.

    Args:
        model: an ONNX file with one image input ``(batch, 3, height, width)`` of float32, float16 or uint8; for torch
            a checkpoint or public weights.
        runtime: what runs it, on the CPU and with its own defaults, which in OpenVINO on CPUs that can means bfloat16
            for float models.
        size: height and width of the input in pixels.
        batch: photos per call.
        threads: threads to compute with; for torch they are those of the whole process from now on.

    Returns:
        The call.

    Raises:
        InputError: the file is missing, is not for this runtime or does not take this input, or the runtime is not
            installed.
    """
    if not model.is_file():
        raise InputError(f"{model}: no such file; expected an ONNX model, or for torch a checkpoint")
    if not fits(model, runtime):
        kind = "checkpoints (.ckpt) and public weights (.pth)" if runtime == "torch" else "ONNX files (.onnx)"
        raise InputError(f"{model}: {runtime} runs {kind} only; choose another runtime for it")
    call = _OPEN[runtime](model, (batch, 3, size, size), threads)
    try:
        call.run()
    except Exception as error:  # each runtime has exceptions of its own
        raise InputError(
            f"{model}: fails on an input of {[batch, 3, size, size]} in {runtime}: {one_line(error)[:160]}"
        ) from None
    return call


def _open_in_onnxruntime(model: Path, shape: tuple[int, ...], threads: int) -> RawCall:
    # Threads that one session leaves waiting in a busy loop take the cores from the next: three equal models took
    # 28 ms each in turns, but 15 ms alone, and 15 ms in turns with this option.
    session = open_session(model, threads, {"session.force_spinning_stop": "1"})
    name, photos = _make_input(model, shape)
    return RawCall(lambda: session.run(None, {name: photos}))


def _open_in_openvino(model: Path, shape: tuple[int, ...], threads: int) -> RawCall:
    request = compile_for_openvino(model, threads).create_infer_request()  # its threads do not wait in a busy loop
    name, photos = _make_input(model, shape)
    return RawCall(lambda: request.infer({name: photos}))


def _open_in_torch(model: Path, shape: tuple[int, ...], threads: int) -> RawCall:
    detector = load_detector(model, threads, runtime="torch")
    photos = torch.from_numpy(_noise(shape, np.float32))
    return RawCall(lambda: detector.run(photos), _TORCH_REST)


_OPEN: dict[Runtime, Callable[[Path, tuple[int, ...], int], RawCall]] = {
    "onnxruntime": _open_in_onnxruntime,
    "openvino": _open_in_openvino,
    "torch": _open_in_torch,
}


def _make_input(model: Path, shape: tuple[int, ...]) -> tuple[str, NDArray[Any]]:
    """Name and content of a file's input."""
    graph = onnx.load(model, load_external_data=False).graph
    inputs = {one.name: one.type.tensor_type for one in graph.input}
    dimensions = {
        name: [dimension.dim_value or dimension.dim_param or "?" for dimension in kind.shape.dim]
        for name, kind in inputs.items()
    }
    if any(len(dimensions[name]) != 4 or kind.elem_type not in _INPUT_TYPES for name, kind in inputs.items()) or (
        len(inputs) != 1
    ):
        types = {name: TensorProto.DataType.Name(kind.elem_type).lower() for name, kind in inputs.items()}
        found = ", ".join(f"{name} {types[name]} {dimensions[name]}" for name in inputs)
        raise InputError(f"{model}: expected one image input (batch, 3, height, width), found {found or 'none'}")
    (name,) = inputs
    fixed = dimensions[name]
    if any(isinstance(dim, int) and dim != wanted for dim, wanted in zip(fixed, shape, strict=True)):
        raise InputError(f"{model}: takes inputs of {fixed} only, not {list(shape)}; choose a matching size and batch")
    return name, _noise(shape, _INPUT_TYPES[inputs[name].elem_type])


def _noise(shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """Make an input with the spread of a photo whose mean was subtracted (uint8: of a photo), always the same."""
    random = np.random.default_rng(0)
    if dtype is np.uint8:
        return random.integers(0, 256, shape, np.uint8)
    return (random.standard_normal(shape, np.float32) * 50).astype(dtype)
