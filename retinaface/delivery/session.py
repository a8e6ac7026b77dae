"""Opens ONNX files in ONNX Runtime, in one way, so that what is counted, timed and evaluated is the same graph."""

from pathlib import Path

import onnxruntime as ort

from retinaface.errors import InputError, one_line


def open_session(
    path: Path,
    threads: int | None = None,
    entries: dict[str, str] | None = None,
    optimized: Path | None = None,
) -> ort.InferenceSession:
    """Opens a file with all optimizations on the CPU.

    Args:
        path: ONNX file.
        threads: Threads to compute with; None takes every physical core.
        entries: Session configuration entries by ONNX Runtime's names.
        optimized: File to write the optimized graph to.

    Returns:
        The session.

    Raises:
        InputError: ONNX Runtime cannot load the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise InputError(f"{path}: ONNX Runtime cannot load it ({one_line(error)[:160]})") from error
