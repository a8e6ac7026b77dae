import time

import pytest
from rich.console import Console

from retinaface.data.annotations import load_split
from retinaface.data.loading import TrainDataset, TrainLoader
from retinaface.data.synthetic import write_synthetic_root
from retinaface.data.transforms import TrainTransform
from retinaface.evaluation.benchmark_data import loader_table, sample_table, time_loader, time_samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return load_split(write_synthetic_root(tmp_path_factory.mktemp("data") / "root", train=5, val=1, size=96), "train")


def shown(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_every_step_of_every_photo_is_timed(samples):
    timings = time_samples(samples, TrainTransform(64), batch_size=2, photos=3, repeats=3)
    for step in (timings.decode, timings.read, timings.crop, timings.transform):
        assert len(step) == 6  # the first of three passes warms up
        assert min(step) > 0
    assert len(timings.collate) == 5  # batches of 2 of 9 samples
    assert timings.ratio == pytest.approx((sum(timings.read) + sum(timings.transform)) / sum(timings.decode))
    assert f"{timings.ratio:.2f}x cv2.imread" in shown(sample_table(timings))
    assert len(time_samples(samples, TrainTransform(64), batch_size=2, photos=50, repeats=2).read) == 5


def test_slow_steps_show_up_where_they_are(samples, monkeypatch):
    real = TrainTransform.__call__

    def slow(self, *arguments):
        time.sleep(0.03)
        return real(self, *arguments)

    monkeypatch.setattr(TrainTransform, "__call__", slow)
    timings = time_samples(samples, TrainTransform(64), batch_size=2, photos=2, repeats=2)
    assert min(timings.transform) >= 30
    assert max(timings.read) < 30


def test_waiting_for_data_is_told_from_training(samples, monkeypatch):
    dataset = TrainDataset(samples, TrainTransform(64), seed=0)
    real = TrainDataset.__getitem__

    def slow(self, draw):
        time.sleep(0.01)
        return real(self, draw)

    def loader(workers):
        return TrainLoader(dataset, batch_size=2, num_workers=workers)

    steps = []

    def train_step(batch):
        steps.append(tuple(batch["images"].shape))
        time.sleep(0.02)

    fast = time_loader(loader, 0, train_step, batches=6)
    assert steps == [(2, 3, 64, 64)] * 7  # more than the two batches of an epoch; one is not timed
    monkeypatch.setattr(TrainDataset, "__getitem__", slow)
    waiting = time_loader(loader, 0, train_step, batches=6)
    assert waiting.images_per_second < 100  # 10 ms each
    assert 0.3 < waiting.wait_share < 0.8  # 20 ms of 40 and a little
    assert fast.wait_share < waiting.wait_share - 0.1
    assert waiting.training_images_per_second < fast.training_images_per_second
    table = shown(loader_table([fast, waiting], "title"))
    assert f"{waiting.wait_share:.1%}" in table
