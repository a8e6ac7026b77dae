"""What models take besides time: file size, and peak memory in each runtime."""

import importlib
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from retinaface.cpus import physical_cores
from retinaface.errors import InputError
from retinaface.evaluation.raw_call import Runtime, Size, prepare
from retinaface.progress import with_progress

_CALLS = 3


@dataclass(frozen=True)
class Footprint:
    """What a model takes in a runtime.

    Attributes:
        model: the file.
        runtime: what runs it.
        file_bytes: size of the file.
        peak_bytes: peak memory of loading and running it, above the peak of importing the runtime.
    """

    model: str
    runtime: Runtime
    file_bytes: int
    peak_bytes: int


def measure_footprints(
    entries: Sequence[tuple[Path, Runtime]], size: Size = 640, batch: int = 1, threads: int | None = None
) -> list[Footprint]:
    """Measures models in runtimes, each in a process of its own.

    Shows a progress bar on standard error where that is a terminal. Not for Windows, which does not tell a process
    its peak memory.

    Args:
        entries: a file, as for :func:`retinaface.evaluation.benchmark.time_in_turns`, and what runs it.
        size: of the input in pixels.
        batch: photos per call.
        threads: threads to compute with; None takes every physical core that this process may use.

    Returns:
        The footprints, in the order given.

    Raises:
        InputError: as for :func:`retinaface.evaluation.benchmark.time_in_turns`; or a process has not survived it.
    """
    threads = threads or physical_cores()
    # On Linux a process that was started directly inherits the peak of the one that started it; one forked from the
    # small server does not.
    context = multiprocessing.get_context("forkserver")
    found = []
    for model, runtime in with_progress(entries, "measuring memory"):
        with ProcessPoolExecutor(1, mp_context=context) as process:
            try:
                peak = process.submit(_peak_bytes, model, runtime, size, batch, threads).result()
            except BrokenProcessPool as error:
                raise InputError(
                    f"{model}: its process ended while {runtime} ran it, for want of memory perhaps; take a smaller "
                    "--size or --batch"
                ) from error
        found.append(Footprint(str(model), runtime, model.stat().st_size, peak))
    return found


def _peak_bytes(model: Path, runtime: Runtime, size: Size, batch: int, threads: int) -> int:
    """Runs a model in this process, which must not have run any before."""
    if runtime == "openvino":  # the others are imported already
        importlib.import_module(runtime)
    before = _peak_of_this_process()
    call = prepare(model, runtime, size, batch, threads)
    for _ in range(_CALLS):
        call.run()
    return _peak_of_this_process() - before


def _peak_of_this_process() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
