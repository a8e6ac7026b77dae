"""How much faster a pruned network runs than the one it was pruned from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from retinaface.delivery.export import export_onnx
from retinaface.evaluation.benchmark import Timing, benchmark
from retinaface.model.network import RetinaFace

_FEWEST_ROUNDS, _MOST_ROUNDS = 30, 300


@contextmanager
def speedup_meter(
    original: RetinaFace, size: int = 640, threads: int | None = None, seconds: float = 10.0
) -> Iterator[Callable[[RetinaFace], tuple[Timing, Timing]]]:
    """Makes a function that times networks against one, as FP32 in ONNX Runtime on the CPU.

    Args:
        original: What they are compared with; left as it was until the first call.
        size: Side of the picture in pixels.
        threads: Threads to compute with; None takes every physical core that this process may use.
        seconds: How long about the two take turns each time, for 30 to 300 rounds.

    Yields:
        The function: from a network to the timings of the original and of it; the latter's ``ratio`` is the speed-up.
    """
    with TemporaryDirectory() as folder:
        baseline, candidate = Path(folder) / "original.onnx", Path(folder) / "pruned.onnx"
        rounds = 0

        def measure(network: RetinaFace) -> tuple[Timing, Timing]:
            nonlocal rounds
            if not rounds:  # takes seconds, and often nothing is timed at all
                export_onnx(original, baseline)
                trial = benchmark([baseline], size, threads, warmup=2, rounds=5)[0]
                rounds = min(max(round(500 * seconds / trial.median_ms), _FEWEST_ROUNDS), _MOST_ROUNDS)
            export_onnx(network, candidate)
            before, after = benchmark([baseline, candidate], size, threads, warmup=5, rounds=rounds)
            return before, after

        yield measure
