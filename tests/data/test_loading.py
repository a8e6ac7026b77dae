import errno
import os
import re
import signal
from itertools import islice
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from retinaface.data.annotations import MEAN_BGR, Sample, load_split
from retinaface.data.loading import (
    EpochSampler,
    TrainDataset,
    TrainLoader,
    collate_train,
    collate_validation,
    default_workers,
    find_dead_worker,
)
from retinaface.data.synthetic import write_synthetic_root
from retinaface.data.transforms import TrainTransform


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = write_synthetic_root(tmp_path_factory.mktemp("data") / "root", train=13, val=1, size=96)
    return TrainDataset(load_split(root, "train"), TrainTransform(64), seed=0)


def test_epoch_sampler_yields_draws():
    sampler = EpochSampler(range(10), 1, 0, shuffle=True, seed=3)
    sampler.set_epoch(7)
    assert sorted(sampler) == list(range(70, 80))


def test_epoch_sampler_leaves_out_what_was_seen_once():
    sampler = EpochSampler(range(10), 1, 0, shuffle=True, seed=3)
    whole = list(sampler)
    sampler.skip = 4
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_leaves_out_the_batches_that_are_done(dataset, workers):
    whole = [batch["images"] for batch in TrainLoader(dataset, 4)]
    done = iter([1, 0, 3])
    loader = TrainLoader(dataset, 4, num_workers=workers, batches_done=lambda: next(done))
    assert len(loader) == 3
    for expected in (whole[1:], whole, []):
        found = [batch["images"] for batch in loader]
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))


def test_photos_of_several_shapes_are_padded_with_the_mean_colour():
    def item(height, width, faces):
        boxes = np.ones((faces, 4), dtype=np.float32)
        counted = {"all": np.ones(faces, dtype=bool), "easy": np.zeros(faces, dtype=bool)}
        sample = Sample(None, f"a/{height}", boxes, np.zeros((faces, 5, 2), dtype=np.float32), counted)
        return {"image": np.zeros((height, width, 3), np.uint8), "scale": 1.0, "image_id": height, "sample": sample}

    batch = collate_validation([item(10, 30, 0), item(20, 5, 2)])
    assert batch["images"].shape == (2, 3, 20, 30)
    assert batch["sizes"].tolist() == [[10, 30], [20, 5]]
    assert batch["labels"].tolist() == [[0, 0], [1, 1]]
    assert batch["counted"]["easy"].tolist() == [[False, False]] * 2
    mean = torch.tensor(MEAN_BGR, dtype=torch.uint8)
    assert (batch["images"][0, :, 10:] == mean[:, None, None]).all()
    assert (batch["images"][1, :, :, 5:] == mean[:, None, None]).all()
    assert not batch["images"][1, :, :, :5].any()


def test_batch_without_faces_has_room_for_one():
    empty = {
        "image": np.zeros((32, 32, 3), np.uint8),
        "boxes": np.zeros((0, 4), np.float32),
        "landmarks": np.zeros((0, 5, 2), np.float32),
        "has_landmarks": np.zeros(0, bool),
        "labels": np.zeros(0, np.int64),
        "name": "0--Parade/empty",
        "skipped": [],
    }
    batch = collate_train([empty, empty])
    assert batch["boxes"].shape == (2, 1, 4)
    assert batch["landmarks"].shape == (2, 1, 5, 2)
    assert not batch["labels"].any()
    assert batch["names"] == ["0--Parade/empty"] * 2


@pytest.mark.parametrize(
    ("cpus", "processes", "per_task", "tasks", "expected"),
    [(1, 1, None, None, 0), (2, 1, None, None, 1), (4, 1, None, None, 3), (64, 1, None, None, 16),
     (64, 8, None, None, 7), (8, 1, "", "", 7),
     (64, 8, "4", "8", 3), (64, 2, "16", "2", 15), (2, 2, "16", "2", 1),  # a task is a process
     (64, 2, "16", "1", 7), (64, 2, "16", None, 7), (64, 4, "8", None, 1), (64, 8, "4", "1", 0), (64, 1, "4", None, 3),
     (2, 1, "16", None, 1)],  # one task starts all processes
)  # fmt: skip
def test_default_number_of_workers(monkeypatch, cpus, processes, per_task, tasks, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)), raising=False)
    for name, value in (("SLURM_CPUS_PER_TASK", per_task), ("SLURM_NTASKS", tasks)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert default_workers(processes) == expected


def error_of_a_dead_worker(dataset):
    batches = iter(TrainLoader(dataset, 4, num_workers=1))
    next(batches)
    (worker,) = active_children()
    try:
        os.kill(worker.pid, signal.SIGKILL)
        for _ in islice(batches, 10):
            pass
    except (RuntimeError, OSError, EOFError) as dead:
        try:
            raise ValueError("in between") from dead
        except ValueError as error:
            return str(find_dead_worker(error))
    return "the loader went on without its process"


def test_a_dead_worker_is_told_from_other_errors(dataset, in_own_process):
    """Whether torch is told of its end first, or the loader finds the connection to it closed."""
    found = in_own_process(error_of_a_dead_worker, dataset)
    assert re.match(r"data: (DataLoader worker \(pid|a loader process is gone \().*\. Mostly .*num_workers", found)


class Unreadable(list):
    def __getitem__(self, index):
        raise ConnectionResetError("network drive")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_on_a_drive_that_is_gone_is_no_dead_worker(workers):
    with pytest.raises(ConnectionResetError) as failure:
        next(iter(DataLoader(Unreadable([1]), num_workers=workers)))
    assert find_dead_worker(failure.value) is None
    assert find_dead_worker(RuntimeError("something else")) is None
    assert find_dead_worker(None) is None


def _try_get_data(error):
    """Bears the name of the function of torch in which a closed connection is found."""
    raise error


def test_too_many_open_files_are_no_dead_worker():
    with pytest.raises(RuntimeError) as failure:  # noqa: PT012
        try:
            _try_get_data(ConnectionResetError())
        except OSError:
            raise RuntimeError("Too many open files. Communication with the workers is no longer possible") from None
    assert find_dead_worker(failure.value) is None
    for error, dead in ((OSError(errno.EMFILE, "Too many open files"), False), (ConnectionResetError(), True)):
        with pytest.raises(type(error)) as failure:
            _try_get_data(error)
        assert (find_dead_worker(failure.value) is not None) == dead


def test_what_torch_says_of_workers_gives_way_to_what_helps():
    bus = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's"
    assert "killed by signal: Bus error. Mostly" in str(find_dead_worker(RuntimeError(bus)))
    several = "DataLoader worker (pid(s) 7, 8) exited unexpectedly"
    assert "(pid(s) 7, 8) exited unexpectedly. Mostly" in str(find_dead_worker(RuntimeError(several)))
