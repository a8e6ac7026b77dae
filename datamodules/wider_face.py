"""Training and validation batches from any data root in WIDER FACE layout."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import cv2
import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from retinaface.cpus import usable_cpus
from retinaface.data.annotations import MEAN_BGR, Sample, load_split, read_image
from retinaface.data.transforms import FACE, IGNORED, TrainTransform, TransformedSample, TransformOptions
from retinaface.errors import InputError

_MOST_WORKERS = 8


class TrainItem(TransformedSample):
    """An augmented sample; ``skipped`` names the unreadable files that it stands in for."""

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
                image = read_image(sample.path)
            except InputError:
                skipped.append(str(sample.path))
                continue
            labels = np.where(sample.counted["all"], FACE, IGNORED)
            seed = int(np.random.SeedSequence((self.seed, draw)).generate_state(1)[0])
            result = self.transform(image, sample.boxes, sample.landmarks, labels, seed)
            return {**result, "skipped": skipped}
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
        image = read_image(sample.path)
        height, width = image.shape[:2]
        scale = min(1.0, (self.longest or np.inf) / max(height, width))
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        return {"image": image, "scale": scale, "image_id": index, "sample": sample}


class EpochSampler(DistributedSampler):
    """Yields draw numbers, ``epoch * len(dataset) + index``, so that the dataset knows the epoch in every worker."""

    @override
    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (start + index for index in super().__iter__())


class WiderFaceDataModule(L.LightningDataModule):
    """Batches from a data root in WIDER FACE layout; see ``retinaface.data.annotations.load_split``.

    Training batches are augmented squares with labels 1 (face), -1 (ignore) and 0 (padding); validation batches are
    whole photos. The batches depend on ``seed``, epoch, rank and number of ranks, not on workers or on what ran
    before, so a resumed epoch is the epoch that an uninterrupted run would have had.

    Args:
        root: The data root.
        train_size: Side of the training pictures in pixels.
        val_size: Validation photos whose long side is above this are shrunk to it; None keeps their size.
        batch_size: Training photos per batch and process.
        val_batch_size: Validation photos per batch and process; the smaller ones are padded to the largest.
        num_workers: Loader processes per process; None chooses by the CPUs that this process may use.
        seed: Seed of order and augmentation.
        transform: Probabilities and ranges of the augmentation.
        limit: Use only this many photos of each split, the first ones; None uses all.

    Raises:
        InputError: A number is out of range; later, in ``setup``, what ``load_split`` raises.
    """

    def __init__(
        self,
        root: str | Path,
        train_size: int = 640,
        val_size: int | None = None,
        batch_size: int = 8,
        val_batch_size: int = 1,
        num_workers: int | None = None,
        seed: int = 0,
        transform: TransformOptions | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        at_least = {
            "train_size": (train_size, 32),
            "val_size": (val_size, 32),
            "batch_size": (batch_size, 1),
            "val_batch_size": (val_batch_size, 1),
            "num_workers": (num_workers, 0),
            "seed": (seed, 0),
            "limit": (limit, 1),
        }
        for name, (value, least) in at_least.items():
            if value is not None and value < least:
                raise InputError(f"{name}: expected at least {least}, found {value}")
        self.root = Path(root)
        self.train_size = train_size
        self.val_size = val_size
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.transform = transform or TransformOptions()
        self.limit = limit
        self.train_samples: list[Sample] = []
        self.val_samples: list[Sample] = []
        self.skipped_files: set[str] = set()
        """Unreadable training files met so far by this process."""

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and not self.train_samples:
            self.train_samples = load_split(self.root, "train")[: self.limit]
        if not self.val_samples:
            self.val_samples = load_split(self.root, "val")[: self.limit]

    @override
    def train_dataloader(self) -> DataLoader[TrainItem]:
        rank, world_size = self._rank()
        per_process = len(self.train_samples) // world_size
        if per_process < self.batch_size:
            raise InputError(
                f"{self.root}: {per_process} training photos per process do not fill a batch of {self.batch_size}; "
                f"set batch_size to at most {max(per_process, 1)}"
            )
        dataset = TrainDataset(self.train_samples, TrainTransform(self.train_size, self.transform), self.seed)
        sampler = EpochSampler(dataset, world_size, rank, shuffle=True, seed=self.seed, drop_last=True)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=collate_train,
            **self._loader_options(),
        )

    @override
    def val_dataloader(self) -> DataLoader[ValidationItem]:
        rank, world_size = self._rank()
        dataset = ValidationDataset(self.val_samples, self.val_size)
        # It repeats photos until every rank has as many; the metric counts an image_id once.
        sampler: DistributedSampler[ValidationItem] = DistributedSampler(dataset, world_size, rank, shuffle=False)
        return DataLoader(
            dataset,
            batch_size=self.val_batch_size,
            sampler=sampler,
            collate_fn=collate_validation,
            **self._loader_options(),
        )

    @override
    def test_dataloader(self) -> DataLoader[ValidationItem]:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[ValidationItem]:
        return self.val_dataloader()

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes unreadable training files that the workers met, and warns of each once."""
        for path in batch.get("skipped", ()):
            if path not in self.skipped_files:
                self.skipped_files.add(path)
                warnings.warn(
                    f"{path}: unreadable, another photo takes its place ({len(self.skipped_files)} such files so far); "
                    "replace it or remove it from the annotations",
                    stacklevel=2,
                )
        return batch

    def _rank(self) -> tuple[int, int]:
        """Rank and number of processes; 0 of 1 without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader_options(self) -> dict[str, Any]:
        workers = self.num_workers
        if workers is None:
            workers = default_workers(self.trainer.num_devices if self.trainer else 1)
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": _start_worker,
        }


def collate_train(items: Sequence[TrainItem]) -> dict[str, Any]:
    """Stacks augmented samples, faces padded to the largest number in the batch.

    Args:
        items: ``B`` samples of one size.

    Returns:
        ``images`` uint8 ``(B, 3, S, S)``; ``boxes`` float32 ``(B, M, 4)``, ``landmarks`` float32 ``(B, M, 5, 2)``,
        ``has_landmarks`` bool ``(B, M)`` and ``labels`` int64 ``(B, M)`` with ``M >= 1``; ``skipped`` list of paths.
    """
    return {
        "images": _stack_images([item["image"] for item in items]),
        "boxes": _pad([item["boxes"] for item in items]),
        "landmarks": _pad([item["landmarks"] for item in items]),
        "has_landmarks": _pad([item["has_landmarks"] for item in items]),
        "labels": _pad([item["labels"] for item in items]),
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
    nothing to gain from a second process. Beyond eight, memory and start-up cost more than they bring: a worker makes
    a few hundred samples per second.

    Args:
        processes: Training processes that share this machine's CPUs.

    Returns:
        0 to 8.
    """
    # The CPUs of this machine may not all be this job's: affinity and SLURM tell.
    own = len(usable_cpus())
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if per_task.isdecimal():
        own = min(own, int(per_task))
    # SLURM starts one process per task; within a single task Lightning starts them, and they share its CPUs.
    if not per_task or os.environ.get("SLURM_NTASKS", "1") == "1":
        own //= max(processes, 1)
    return max(0, min(own - 1, _MOST_WORKERS))


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's threads would fight over the same CPUs


def _stack_images(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """``(B, 3, H, W)``, padded at the right and the bottom with the mean colour."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    stack = np.empty((len(images), height, width, 3), dtype=np.uint8)
    stack[:] = MEAN_BGR
    for row, image in zip(stack, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(np.ascontiguousarray(stack.transpose(0, 3, 1, 2)))


def _pad(arrays: Sequence[NDArray[Any]]) -> Tensor:
    """``(B, M, ...)``: arrays ``(N, ...)`` filled up with zeros to the longest, at least 1."""
    longest = max(1, *(len(array) for array in arrays))
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded)
