"""The same batches from photos that are rendered on first use."""

from pathlib import Path

from typing_extensions import override

from datamodules.wider_face import WiderFaceDataModule
from retinaface.data.synthetic import write_synthetic_root
from retinaface.data.transforms import TransformOptions


class SyntheticFacesDataModule(WiderFaceDataModule):
    """Renders photos with faces into ``root``, then works like ``WiderFaceDataModule``.

    Args:
        root: Where the photos go; kept and used again as long as the settings stay the same.
        train_photos: Number of training photos.
        val_photos: Number of validation photos.
        photo_size: Side of the photos in pixels; faces are 8 to 300 pixels high, at most 0.65 of this.
        photo_seed: Seed of the photos, apart from the seed of their order and augmentation.
        train_size: Side of the training pictures in pixels.
        val_size: Validation photos whose long side is above this are shrunk to it; None keeps their size.
        batch_size: Training photos per batch and process.
        val_batch_size: Validation photos per batch and process.
        num_workers: Loader processes per process; None chooses by the CPUs that this process may use.
        seed: Seed of order and augmentation.
        transform: Probabilities and ranges of the augmentation.

    Raises:
        InputError: A number is out of range, or the folder holds something that was not rendered.
    """

    def __init__(
        self,
        root: str | Path = "runs/synthetic_faces",
        train_photos: int = 1000,
        val_photos: int = 150,
        photo_size: int = 320,
        photo_seed: int = 0,
        train_size: int = 320,
        val_size: int | None = None,
        batch_size: int = 8,
        val_batch_size: int = 8,
        num_workers: int | None = None,
        seed: int = 0,
        transform: TransformOptions | None = None,
    ) -> None:
        super().__init__(root, train_size, val_size, batch_size, val_batch_size, num_workers, seed, transform)
        self.train_photos = train_photos
        self.val_photos = val_photos
        self.photo_size = photo_size
        self.photo_seed = photo_seed

    @override
    def prepare_data(self) -> None:
        write_synthetic_root(self.root, self.train_photos, self.val_photos, self.photo_size, self.photo_seed)
