"""Opens ONNX files in one way per runtime, so that what is counted, timed and evaluated is the same graph."""

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import onnxruntime as ort

from retinaface.errors import InputError, one_line

_CPU = "CPU"
_starting = Lock()  # threads that come first at the same time would start a core each
_SUFFIX = "ExecutionProvider"
# What brings a provider; the other ones come with builds of ONNX Runtime of their own.
_PACKAGES = {
    "CUDA": "onnxruntime-gpu",
    "Tensorrt": "onnxruntime-gpu",
    "OpenVINO": "onnxruntime-openvino",
    "Dml": "onnxruntime-directml",
    "MIGraphX": "onnxruntime-migraphx",
    "QNN": "onnxruntime-qnn",
    "CoreML": "onnxruntime on a Mac",
}


def open_session(
    path: Path,
    threads: int | None = None,
    entries: dict[str, str] | None = None,
    optimized: Path | None = None,
    providers: Sequence[str] | None = None,
) -> ort.InferenceSession:
    """Opens a file with all optimizations. Several threads may run it at once.

    Args:
        path: ONNX file.
        threads: Threads to compute with; None takes every physical core.
        entries: Session configuration entries by ONNX Runtime's names.
        optimized: File to write the optimized graph to.
        providers: What computes, by ONNX Runtime's names, such as ``CUDA``, ``CoreML`` or ``CPUExecutionProvider``, the
            preferred one first; what none of them can compute is left to the CPU. None takes the CPU.

    Returns:
        The session.

    Raises:
        InputError: ONNX Runtime cannot load the file, or has no such provider.
    """
    wanted = [_provider(name) for name in providers or [_CPU]]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        session = ort.InferenceSession(path, options, providers=wanted)
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise InputError(f"{path}: ONNX Runtime cannot load it ({one_line(error)[:160]})") from error
    # A provider whose libraries are absent is left out, without an exception.
    for provider in wanted:
        if provider not in session.get_providers():
            raise InputError(
                f"{path}: ONNX Runtime could not start {provider}; check its driver and libraries, or name another "
                "provider"
            )
    return session


def _provider(name: str) -> str:
    """ONNX Runtime's full name of a provider that is there."""
    full_names: dict[str, str] = {full.removesuffix(_SUFFIX).lower(): full for full in ort.get_all_providers()}
    full = full_names.get(name.lower().removesuffix(_SUFFIX.lower()))
    if full is None:
        known = ", ".join(sorted(each.removesuffix(_SUFFIX) for each in full_names.values()))
        raise InputError(f"provider {name}: ONNX Runtime knows none of that name; expected one of {known}")
    if full not in ort.get_available_providers():
        package = _PACKAGES.get(full.removesuffix(_SUFFIX))
        remedy = f"install {package} in its place" if package else "install a build of ONNX Runtime with it"
        raise InputError(f"provider {name}: the installed ONNX Runtime comes without it; {remedy}, or choose CPU")
    return full


def compile_for_openvino(path: Path, threads: int | None = None, device: str = _CPU) -> Any:  # noqa: ANN401
    """Compiles a file with OpenVINO's own defaults, which on CPUs that can means bfloat16.

    Args:
        path: ONNX file.
        threads: Threads of the CPU to compute with; None leaves it to OpenVINO.
        device: By OpenVINO's names, such as ``CPU``, ``GPU`` or ``AUTO``.

    Returns:
        ``openvino.CompiledModel``.

    Raises:
        InputError: OpenVINO is not installed, does not have the device, or cannot load the file.
    """
    try:
        openvino = importlib.import_module("openvino")
    except ImportError as error:
        raise InputError(f"{path}: OpenVINO is not installed; run `pip install openvino`") from error
    with _starting:
        core = _openvino_core(openvino)
    known = [*core.available_devices, "AUTO"]
    if device.upper().split(".")[0].split(":")[0] not in {each.split(".")[0] for each in known}:
        raise InputError(f"device {device}: OpenVINO finds none of that name here; expected one of {', '.join(known)}")
    try:
        return core.compile_model(path, device.upper(), {"INFERENCE_NUM_THREADS": threads} if threads else {})
    except RuntimeError as error:
        raise InputError(f"{path}: OpenVINO cannot load it ({str(error).splitlines()[0][:160]})") from error


@cache
def _openvino_core(openvino: ModuleType) -> Any:  # noqa: ANN401
    """The one core of this process.

    A core's CPU plugin brings a stack for signal handlers, and when it goes, puts back the one that it found. Of two
    cores that overlap, the later one may so put back a stack that is gone: the next signal, Ctrl-C for instance, ends
    the process with a segmentation fault.
    """
    return openvino.Core()
