"""From samples to batches: augmented draws for training, whole photos for validation, and loaders for both."""

import errno
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from retinaface.cpus import usable_cpus
from retinaface.data.annotations import MEAN_BGR, Sample
from retinaface.data.transforms import FACE, IGNORED, TrainTransform, TransformedSample
from retinaface.errors import InputError

_MOST_WORKERS = 16
_DEAD_WORKER = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")  # how torch says so


class TrainItem(TransformedSample):
    """An augmented sample, the photo's ``name``, and in ``skipped`` the unreadable files that it stands in for."""

    name: str
    skipped: list[str]


class ValidationItem(TypedDict):
    """A whole photo ``(H, W, 3)``, its scale (network pixels per photo pixel) and its index in the split."""

    image: NDArray[np.uint8]
    scale: float
    image_id: int
    sample: Sample


class TrainDataset(Dataset[TrainItem]):
    """Augmented samples by draw number.

    A draw is ``epoch * len(samples) + index``: it alone, with ``seed``, decides the augmentation. So neither the
    worker that makes a sample nor what was made before it matters.

    Args:
        samples: The photos, at least one.
        transform: The augmentation.
        seed: Seed of all draws.
    """

    def __init__(self, samples: Sequence[Sample], transform: TrainTransform, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    @override
    def __getitem__(self, draw: int) -> TrainItem:
        skipped: list[str] = []
        for step in range(len(self)):
            sample = self.samples[(draw + step) % len(self)]
            try:
                image = sample.read()
            except InputError:
                skipped.append(str(sample.path))
                continue
            labels = np.where(sample.counted["all"], FACE, IGNORED)
            seed = int(np.random.SeedSequence((self.seed, draw)).generate_state(1)[0])
            result = self.transform(image, sample.boxes, sample.landmarks, labels, seed)
            return {**result, "name": sample.name, "skipped": skipped}
        raise InputError(f"{skipped[0]} and all other {len(self) - 1} training photos are unreadable; check the disk")


class ValidationDataset(Dataset[ValidationItem]):
    """Whole photos in their own shape.

    Args:
        samples: The photos.
        longest: Photos whose long side is above this are shrunk to it; None keeps every photo as it is.
    """

    def __init__(self, samples: Sequence[Sample], longest: int | None = None) -> None:
        self.samples = samples
        self.longest = longest

    def __len__(self) -> int:
        return len(self.samples)

    @override
    def __getitem__(self, index: int) -> ValidationItem:
        sample = self.samples[index]
        image = sample.read()
        height, width = image.shape[:2]
        scale = min(1.0, (self.longest or np.inf) / max(height, width))
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        return {"image": image, "scale": scale, "image_id": index, "sample": sample}


class EpochSampler(DistributedSampler):
    """Yields draw numbers, ``epoch * len(dataset) + index``, so that the dataset knows the epoch in every worker.

    Attributes:
        skip: Draws at the beginning of this process's next epoch that are left out, for that epoch only.
    """

    skip = 0

    @override
    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        skip, self.skip = self.skip, 0
        return (start + index for index in list(super().__iter__())[skip:])


class TrainLoader(DataLoader[TrainItem]):
    """Augmented batches; goes on within an epoch where an interrupted fit has to.

    Args:
        dataset: The draws.
        batch_size: Draws per batch.
        rank: Number of this process among those that share out the photos.
        world_size: How many these are.
        num_workers: Loader processes; 0 loads in this process.
        batches_done: Asked when a pass begins: how many batches of the epoch were trained with already. Whoever trains
            knows; the loader does not, as it gives batches away before they are used.
    """

    def __init__(
        self,
        dataset: TrainDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        batches_done: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=EpochSampler(dataset, world_size, rank, shuffle=True, seed=dataset.seed, drop_last=True),
            drop_last=True,
            collate_fn=collate_train,
            **worker_options(num_workers),
        )
        self.batches_done = batches_done

    @override
    def __iter__(self) -> Any:
        # A generator: it starts with the first batch, when the trainer knows where it is and the sampler its epoch.
        assert isinstance(self.sampler, EpochSampler)
        assert self.batch_size is not None
        self.sampler.skip = self.batches_done() * self.batch_size
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep; that it is there tells Lightning that an epoch can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def collate_train(items: Sequence[TrainItem]) -> dict[str, Any]:
    """Stacks augmented samples, faces padded to the largest number in the batch.

    Args:
        items: ``B`` samples of one size.

    Returns:
        ``images`` uint8 ``(B, 3, S, S)``; ``boxes`` float32 ``(B, M, 4)``, ``landmarks`` float32 ``(B, M, 5, 2)``,
        ``has_landmarks`` bool ``(B, M)`` and ``labels`` int64 ``(B, M)`` with ``M >= 1``; ``names`` of the photos and
        ``skipped`` paths, lists of str.
    """
    return {
        "images": _stack_images([item["image"] for item in items]),
        "boxes": _pad([item["boxes"] for item in items]),
        "landmarks": _pad([item["landmarks"] for item in items]),
        "has_landmarks": _pad([item["has_landmarks"] for item in items]),
        "labels": _pad([item["labels"] for item in items]),
        "names": [item["name"] for item in items],
        "skipped": [path for item in items for path in item["skipped"]],
    }


def collate_validation(items: Sequence[ValidationItem]) -> dict[str, Any]:
    """Stacks photos, padded at the right and the bottom with the mean colour, and their faces.

    Args:
        items: ``B`` photos.

    Returns:
        ``images`` uint8 ``(B, 3, H, W)``; ``sizes`` int64 ``(B, 2)`` height and width without padding; ``scales``
        float32 ``(B,)`` network pixels per photo pixel; ``image_ids`` int64 ``(B,)``; ``boxes`` float32 ``(B, M, 4)``
        in photo pixels; ``labels`` int64 ``(B, M)``, 1 or 0 for padding; ``counted`` subset to bool ``(B, M)``;
        ``names`` list of str.
    """
    samples = [item["sample"] for item in items]
    subsets = sorted({subset for sample in samples for subset in sample.counted})
    return {
        "images": _stack_images([item["image"] for item in items]),
        "sizes": torch.tensor([item["image"].shape[:2] for item in items], dtype=torch.int64),
        "scales": torch.tensor([item["scale"] for item in items], dtype=torch.float32),
        "image_ids": torch.tensor([item["image_id"] for item in items], dtype=torch.int64),
        "boxes": _pad([sample.boxes for sample in samples]),
        "labels": _pad([np.full(len(sample.boxes), FACE, dtype=np.int64) for sample in samples]),
        "counted": {subset: _pad([sample.counted[subset] for sample in samples]) for subset in subsets},
        "names": [sample.name for sample in samples],
    }


def default_workers(processes: int = 1) -> int:
    """Loader processes for one training process.

    One CPU per training process is left for the process itself, which drives the device; with a single CPU there is
    nothing to gain from a second process. Beyond sixteen, memory and start-up cost more than they bring: one makes
    about 50 samples of 640 pixels per second from photos of 1600x898 (``python -m retinaface benchmark-data``).

    Args:
        processes: Training processes that share this machine's CPUs.

    Returns:
        0 to 16.
    """
    # The CPUs of this machine may not all be this job's: affinity and SLURM tell.
    own = usable_cpus()
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if per_task.isdecimal():
        own = min(own, int(per_task))
    # SLURM starts one process per task; within a single task Lightning starts them, and they share its CPUs.
    if not per_task or os.environ.get("SLURM_NTASKS", "1") == "1":
        own //= max(processes, 1)
    return max(0, min(own - 1, _MOST_WORKERS))


def worker_options(num_workers: int) -> dict[str, Any]:
    """What every loader here tells a DataLoader about its processes."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _start_worker,
    }


def find_dead_worker(error: BaseException | None) -> InputError | None:
    """What to do about a loader process that has died, if that is what is behind an exception.

    torch raises a plain RuntimeError, in the middle of whatever the training process is doing; or the training process
    finds the connection closed through which it was to get a batch.
    """
    while error is not None and not (_says_so(error) or _is_closed_connection(error)):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if error is None:
        return None
    what = str(error).partition("Details are lost")[0].partition("It is possible")[0].strip().rstrip(".")
    what = what if _says_so(error) else f"a loader process is gone ({what or type(error).__name__})"
    return InputError(
        f"data: {what}. Mostly the system kills one for want of memory, or of shared memory (/dev/shm): lower "
        "data.init_args.num_workers (0 needs no such processes) or data.init_args.batch_size, or give the job more "
        "memory. Start the same command again; a fit goes on from its last checkpoint with --ckpt_path=last"
    )


def _says_so(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith(_DEAD_WORKER)


def _is_closed_connection(error: BaseException) -> bool:
    """What a loader process itself raises comes through another function of torch."""
    if not isinstance(error, OSError | EOFError) or getattr(error, "errno", None) == errno.EMFILE:
        return False  # with too many open files nothing has died
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code.co_name == "_try_get_data" for frame in frames)


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's threads would fight over the same CPUs


def _stack_images(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """``(B, 3, H, W)``, padded at the right and the bottom with the mean colour."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    stack = np.empty((len(images), 3, height, width), dtype=np.uint8)
    for planes, image in zip(stack, images, strict=True):
        if image.shape[:2] != (height, width):
            planes[:] = np.array(MEAN_BGR, dtype=np.uint8)[:, None, None]
        # Channel by channel: moving the axis of colours in one go takes twenty times as long.
        for plane, channel in zip(planes, cv2.split(image), strict=True):
            plane[: image.shape[0], : image.shape[1]] = channel
    return torch.from_numpy(stack)


def _pad(arrays: Sequence[NDArray[Any]]) -> Tensor:
    """``(B, M, ...)``: arrays ``(N, ...)`` filled up with zeros to the longest, at least 1."""
    longest = max(1, *(len(array) for array in arrays))
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded)
