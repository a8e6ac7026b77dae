import io
import threading
import time
from collections import Counter

import pytest
import torch
from rich.console import Console

from retinaface.delivery.runtime import Detector
from retinaface.errors import InputError
from retinaface.evaluation.throughput import Throughput, measure_throughput, throughput_table
from retinaface.model.network import NetworkConfig


class SlowDetector:
    """Takes 20 ms per call with one thread, 10 with two; counts calls."""

    runtime = "onnxruntime"

    def __init__(self, threads):
        self.threads = threads
        self.calls = Counter()
        self.most = self.now = 0
        self.lock = threading.Lock()

    def detect_batch(self, images):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.calls[len(images)] += 1
        time.sleep(0.02 / self.threads)
        with self.lock:
            self.now -= 1
        return [None] * len(images)


def test_every_combination_is_timed():
    detectors = {}
    results = measure_throughput(
        lambda threads: detectors.setdefault(threads, SlowDetector(threads)), [1, 3], [1, 2], [1, 2], 64, 6, 3
    )
    assert [(each.threads, each.batch, each.callers) for each in results] == [
        (threads, batch, callers) for threads in (1, 2) for batch in (1, 3) for callers in (1, 2)
    ]
    assert {(each.photos, each.rounds) for each in results} == {(6, 3)}
    for detector in detectors.values():
        assert detector.calls == {1: 4 * (6 + 6), 3: 4 * (2 + 2)}  # three rounds, and one that is not timed
        assert detector.most == 2
    for each in results:
        ideal = each.batch * each.callers * each.threads / 0.02
        assert 0.3 * ideal < each.median <= ideal
        assert each.p10 <= each.median <= each.p90


def test_photos_are_rounded_up_to_whole_calls():
    (result,) = measure_throughput(SlowDetector, [2], [2], [4], 64, 5, 1)
    assert result.photos == 8


def test_threads_of_torch_cannot_be_compared():
    def run(images):
        raise AssertionError

    before = torch.get_num_threads()
    with pytest.raises(InputError, match="threads: torch has one number"):
        measure_throughput(lambda _: Detector(NetworkConfig(), run, "torch"), [1], [1], [1, 2])
    assert torch.get_num_threads() == before


def test_table():
    results = [
        Throughput("onnxruntime", 1, batch, callers, 8, 5, 10.0 * batch + callers, 1.0, 99.0)
        for batch in (1, 4)
        for callers in (1, 2)
    ]
    console = Console(file=io.StringIO(), width=120)
    console.print(throughput_table(results, "model.onnx, 640x640"))
    lines = console.file.getvalue().splitlines()
    title = " ".join(" ".join(lines[:4]).split())
    assert title.startswith("model.onnx, 640x640, onnxruntime: photos/s, median of 5 rounds")
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells == [["1", "1", "11.0", "12.0"], ["1", "4", "41.0", "42.0*"]]
