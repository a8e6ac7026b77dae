"""Training and validation batches from any data root in WIDER FACE layout, or from photos without labels."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from retinaface.data.annotations import Sample, Split, load_split, load_unlabelled
from retinaface.data.check import find_unreadable
from retinaface.data.loading import (
    TrainDataset,
    TrainLoader,
    ValidationDataset,
    ValidationItem,
    collate_validation,
    default_workers,
    worker_options,
)
from retinaface.data.split_cache import load_cached_split
from retinaface.data.transforms import TrainTransform, TransformOptions
from retinaface.data.wider_archives import prepare_root
from retinaface.errors import InputError


class WiderFaceDataModule(L.LightningDataModule):
    """Batches from a data root in WIDER FACE layout; see ``retinaface.data.annotations.load_split``.

    Training batches are augmented squares with labels 1 (face), -1 (ignore) and 0 (padding); validation batches are
    whole photos. The batches depend on ``seed``, epoch, rank and number of ranks, not on workers or on what ran
    before, so a resumed epoch is the epoch that an uninterrupted run would have had.

    Without ``labels`` any folder with photos will do, to be learnt from a teacher alone; see
    ``retinaface.data.annotations.load_unlabelled``. Training batches then hold no faces, and validation photos that
    are not labelled take no part in a fit: nothing could be measured on them.

    Args:
        root: The data root.
        train_size: Side of the training pictures in pixels.
        val_size: Validation photos whose long side is above this are shrunk to it; None keeps their size.
        batch_size: Training photos per batch and process.
        val_batch_size: Validation photos per batch and process; above 1 the smaller ones are padded to the largest,
            which changes what is found near the padding a little, and so the figures.
        num_workers: Loader processes per process; None chooses by the CPUs that this process may use.
        seed: Seed of order and augmentation.
        transform: Probabilities and ranges of the augmentation.
        limit: Use only this many photos of each split, the first ones; None uses all.
        download: Download WIDER FACE into the root if photos or annotations are absent there; see
            ``retinaface.data.wider_archives.prepare_root``.
        labels: Whether the training photos have labels, and use them.

    Raises:
        InputError: A number is out of range; later, what ``prepare_root``, ``load_split`` and ``load_unlabelled``
            raise; or there are no labels for a training or a validation that needs them.
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
        download: bool = False,
        labels: bool = True,
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
        self.download = download
        self.labels = labels
        self.train_samples: list[Sample] = []
        self.val_samples: list[Sample] = []
        self.skipped_files: set[str] = set()
        """Unreadable training files met so far by this process."""

    @override
    def prepare_data(self) -> None:
        prepare_root(self.root, self.download)

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and not self.train_samples:
            self.train_samples = self._load("train")[: self.limit]
            rank_zero_info(f"{self.root}: {_counts(self.train_samples)} to train on")
        if not self.val_samples:
            self.val_samples = self._load("val")[: self.limit]
            use = "to validate on" if _labelled(self.val_samples) else "kept out of training"
            rank_zero_info(f"{self.root}: {_counts(self.val_samples)} {use}")
            if stage == "fit" and (self.trainer is None or self.trainer.is_global_zero):
                self._check_val_photos()
        if not _labelled(self.val_samples):
            self._without_validation(stage)

    def _check_val_photos(self) -> None:
        """An unreadable one is an error, and better now than when the first epoch is over."""
        if unreadable := find_unreadable(self.val_samples, "reading the validation photos"):
            more = f"; and {len(unreadable) - 1} more validation photos are unreadable" if len(unreadable) > 1 else ""
            raise InputError(f"{unreadable[0]}{more}")

    def _without_validation(self, stage: str) -> None:
        """There is nothing to measure on photos without labels: a fit goes on without."""
        if stage in ("validate", "test"):
            raise InputError(
                f"{self.root}: its validation photos have no labels, so no accuracy can be measured; put labelled ones "
                "into WIDER_val/images, and their labels into wider_face_split/"
            )
        if stage == "fit" and self.trainer is not None:
            if self.trainer.early_stopping_callbacks:
                raise InputError(
                    f"{self.root}: its validation photos have no labels, so early stopping has no AP to look at; leave "
                    "it out"
                )
            self.trainer.limit_val_batches = 0

    @override
    def train_dataloader(self) -> TrainLoader:
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise InputError("trainer.overfit_batches: not supported; use data.init_args.limit to train on few photos")
        self._check_labels()
        rank, world_size = self._rank()
        per_process = len(self.train_samples) // world_size
        if per_process < self.batch_size:
            raise InputError(
                f"{self.root}: {per_process} training photos per process do not fill a batch of {self.batch_size}; "
                f"set batch_size to at most {max(per_process, 1)}"
            )
        dataset = TrainDataset(self.train_samples, TrainTransform(self.train_size, self.transform), self.seed)
        return TrainLoader(dataset, self.batch_size, rank, world_size, self._workers(), self._batches_done)

    def _check_labels(self) -> None:
        """What trains on labels must have them; a stage that trains nothing needs none."""
        if _labelled(self.train_samples) or self.trainer is None or self.trainer.max_epochs == 0:
            return
        module: Any = self.trainer.lightning_module
        if getattr(module, "teacher", None) is None or module.distillation.weight < 1:
            raise InputError(
                f"{self.root}: is read without labels (data.init_args.labels: false), but this stage trains on them; "
                "train a CompressionModule with a teacher and model.init_args.distillation.weight 1.0, or give labels"
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
            **worker_options(self._workers()),
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
                    f"replace it or remove it{' from the annotations' if self.labels else ''}",
                    stacklevel=2,
                )
        return batch

    def _load(self, split: Split) -> list[Sample]:
        """The samples of a split; a run with a local folder of its own keeps there what was parsed."""
        if not self.labels:
            return load_unlabelled(self.root, split)
        folder = self.trainer.default_root_dir if self.trainer else None
        if folder is None or "://" in folder or Path(folder) == Path.cwd():
            return load_split(self.root, split)
        return load_cached_split(self.root, split, folder)

    def _rank(self) -> tuple[int, int]:
        """Rank and number of processes; 0 of 1 without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _batches_done(self) -> int:
        # Lightning's own count: a checkpoint may be saved at any moment, within a step too.
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return default_workers(self.trainer.num_devices if self.trainer else 1)


def _labelled(samples: Sequence[Sample]) -> bool:
    return all(sample.labelled for sample in samples)


def _counts(samples: Sequence[Sample]) -> str:
    if not _labelled(samples):
        return f"{len(samples):,} photos without labels"
    faces = [int(sample.counted["all"].sum()) for sample in samples]
    return f"{len(samples):,} photos ({faces.count(0):,} without faces) with {sum(faces):,} faces"
