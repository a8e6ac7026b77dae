from types import SimpleNamespace

import pytest
import torch

from callbacks import TrainingSpeed


@pytest.fixture
def clock(monkeypatch):
    """Time as the test lets it pass."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("callbacks.training_speed.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def step(callback, images, device="cpu", processes=1):
    logged = []
    module = SimpleNamespace(device=torch.device(device), log_dict=lambda figures, batch_size: logged.append(figures))
    trainer = SimpleNamespace(world_size=processes)
    callback.on_train_batch_end(trainer, module, None, {"images": torch.empty(images, 3, 1, 1)}, 0)
    assert all(figure.device.type == "cpu" for figure in logged[0].values())  # others would wait for the GPU
    return {name: float(figure) for name, figure in logged[0].items()}


def test_images_a_second_of_all_processes_without_validation(clock):
    callback = TrainingSpeed()
    callback.on_train_epoch_start(None, None)
    clock.now = 2.0
    assert step(callback, 4) == {"train/images_per_second": 2.0}
    clock.now = 3.0
    assert step(callback, 2, processes=3) == {"train/images_per_second": 6.0}
    clock.now = 100.0
    callback.on_validation_end(None, None)
    clock.now = 101.0
    assert step(callback, 8) == {"train/images_per_second": 8.0}


def test_a_fit_that_goes_on_within_an_epoch_begins_to_count_there(clock):
    callback = TrainingSpeed()
    clock.now = 50.0
    callback.on_train_start(None, None)
    clock.now = 52.0
    assert step(callback, 4) == {"train/images_per_second": 2.0}


def test_memory_of_the_gpu(clock, monkeypatch):
    callback = TrainingSpeed()
    callback.on_train_epoch_start(None, None)
    clock.now = 1.0
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29 * (device.index + 1))
    assert step(callback, 4, "cuda:1")["train/gpu_memory_gib"] == 3.0
