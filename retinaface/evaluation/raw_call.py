"""One call of a model in a runtime, ready to be timed: from an input in memory to raw outputs, nothing after them."""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from retinaface.delivery.runtime import load_detector
from retinaface.delivery.session import compile_for_openvino, open_session
from retinaface.errors import InputError, one_line

Runtime = Literal["onnxruntime", "openvino", "torch"]

# Of a picture in pixels: the side of a square, or height and width.
Size = int | tuple[int, int]

# By the names of ONNX Runtime and of OpenVINO.
_INPUT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "f32": np.float32,
    "f16": np.float16,
    "u8": np.uint8,
}
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


def height_and_width(size: Size) -> tuple[int, int]:
    """Both sides of a picture."""
    return (size, size) if isinstance(size, int) else size


def fits(model: Path, runtime: Runtime) -> bool:
    """Whether a runtime takes files of this kind: torch .ckpt and .pth, the others .onnx."""
    return (model.suffix.lower() == ".onnx") != (runtime == "torch")


def usable_runtimes(models: Sequence[Path]) -> list[Runtime]:
    """The installed runtimes that take at least one of these files, ONNX Runtime first."""
    installed: list[Runtime] = ["onnxruntime", "torch"]
    if importlib.util.find_spec("openvino"):
        installed.insert(1, "openvino")
    return [runtime for runtime in installed if any(fits(model, runtime) for model in models)]


def prepare(model: Path, runtime: Runtime, size: Size, batch: int, threads: int) -> RawCall:
    """Opens a model, makes its input and runs it once.

    Args:
        model: an ONNX file with one image input ``(batch, 3, height, width)`` or ``(batch, height, width, 3)`` of
            float32, float16 or uint8; for torch a checkpoint or public weights.
        runtime: what runs it, on the CPU and with its own defaults, which in OpenVINO on CPUs that can means bfloat16
            for float models.
        size: of the input in pixels.
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
    shape = (batch, 3, *height_and_width(size))
    call = _OPEN[runtime](model, shape, threads)
    try:
        call.run()
    except Exception as error:  # each runtime has exceptions of its own
        raise InputError(f"{model}: fails on an input of {[*shape]} in {runtime}: {one_line(error)[:160]}") from None
    return call


def _open_in_onnxruntime(model: Path, shape: tuple[int, ...], threads: int) -> RawCall:
    # Threads that one session leaves waiting in a busy loop take the cores from the next: three equal models took
    # 28 ms each in turns, but 15 ms alone, and 15 ms in turns with this option.
    session = open_session(model, threads, {"session.force_spinning_stop": "1"})
    inputs = [_Input(one.name, one.type, [axis or "?" for axis in one.shape]) for one in session.get_inputs()]
    name, photos = _make_input(model, inputs, shape)
    return RawCall(lambda: session.run(None, {name: photos}))


def _open_in_openvino(model: Path, shape: tuple[int, ...], threads: int) -> RawCall:
    compiled = compile_for_openvino(model, threads)
    inputs = [
        _Input(
            one.any_name,
            one.element_type.get_type_name(),
            [axis.get_length() if axis.is_static else "?" for axis in one.partial_shape]
            if one.partial_shape.rank.is_static
            else [],
        )
        for one in compiled.inputs
    ]
    name, photos = _make_input(model, inputs, shape)
    request = compiled.create_infer_request()  # its threads do not wait in a busy loop
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


@dataclass(frozen=True)
class _Input:
    """What an opened model takes, as its runtime says: to read the file once more would count as its memory.

    Attributes:
        name: of the input.
        type: of its numbers, by the runtime's name.
        shape: an int for each axis that is fixed, text for one that is not.
    """

    name: str
    type: str
    shape: list[int | str]


def _make_input(model: Path, inputs: Sequence[_Input], shape: tuple[int, ...]) -> tuple[str, NDArray[Any]]:
    """Name and content of a model's input."""
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _INPUT_TYPES:
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise InputError(f"{model}: expected one image input (batch, 3, height, width), found {found or 'none'}")
    (only,) = inputs
    if only.shape[1] != 3 and only.shape[3] == 3:
        shape = (shape[0], *shape[2:], 3)
    if any(isinstance(axis, int) and axis != wanted for axis, wanted in zip(only.shape, shape, strict=True)):
        raise InputError(
            f"{model}: takes inputs of {only.shape} only, not {list(shape)}; choose a matching size and batch"
        )
    return only.name, _noise(shape, _INPUT_TYPES[only.type])


def _noise(shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """Make an input with the spread of a photo whose mean was subtracted (uint8: of a photo), always the same."""
    random = np.random.default_rng(0)
    if dtype is np.uint8:
        return random.integers(0, 256, shape, np.uint8)
    return (random.standard_normal(shape, np.float32) * 50).astype(dtype)
