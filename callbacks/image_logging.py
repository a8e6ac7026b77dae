"""Shows what the detector is taught, and after every epoch what it finds on a few validation photos."""

from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from typing_extensions import override

from lightning_modules import RetinaFaceModule
from retinaface.evaluation.visualize import contact_sheet, draw_detections, draw_training_batch
from retinaface.model.postprocess import Detections, postprocess


class ImageLogging(L.Callback):
    """Draws the first training batch, and detections on the first photos of the first validation batches.

    The sheets are written to ``train_batch.jpg`` and ``detections/epoch_<n>.jpg`` in the trainer's root folder, and
    sent to W&B or TensorBoard where these are loggers. W&B gets the photos one by one too, with boxes to click on and
    to sort out by score.

    Args:
        photos: Number of validation photos.
        score_threshold: Faces with a lower score are not drawn.
    """

    def __init__(self, photos: int = 8, score_threshold: float = 0.5) -> None:
        self.photos = photos
        self.score_threshold = score_threshold
        self._found: list[tuple[NDArray[np.uint8], Detections]] = []

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.global_step == 0 and batch_idx == 0 and trainer.is_global_zero and not trial:
            _publish(trainer, contact_sheet(draw_training_batch(batch)), "train/batch", "train_batch.jpg")

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        wanted = self.photos - len(self._found)
        trial = trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if wanted <= 0 or trial or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, RetinaFaceModule)
        images = batch["images"][:wanted]
        found = postprocess(
            pl_module(images), images.shape[-2:], pl_module.structure.network, score_threshold=self.score_threshold
        )
        for image, (height, width), faces in zip(images, batch["sizes"].tolist(), found, strict=False):
            picture = np.ascontiguousarray(image[:, :height, :width].permute(1, 2, 0).cpu().numpy())
            self._found.append((picture, faces))

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._found:
            return
        found, self._found = self._found, []
        sheet = contact_sheet([_draw(picture, faces) for picture, faces in found])
        _publish(trainer, sheet, "val/detections", f"detections/epoch_{trainer.current_epoch:03d}.jpg")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                pictures = [_as_rgb(picture) for picture, _ in found]
                boxes = [wandb_boxes(faces) for _, faces in found]
                logger.log_image("val/faces", pictures, boxes=boxes)


def wandb_boxes(faces: Detections) -> dict[str, Any]:
    """Boxes as W&B lays them over a picture.

    Args:
        faces: Of one picture, in its pixels.

    Returns:
        What ``wandb.Image`` takes as ``boxes``.
    """
    rows = zip(faces.boxes.tolist(), faces.scores.tolist(), strict=True)
    return {
        "detections": {
            "box_data": [
                {
                    "position": dict(zip(("minX", "minY", "maxX", "maxY"), map(round, box), strict=True)),
                    "domain": "pixel",
                    "class_id": 0,
                    "box_caption": f"{score:.2f}",
                    "scores": {"score": score},
                }
                for box, score in rows
            ],
            "class_labels": {0: "face"},
        }
    }


def _draw(picture: NDArray[np.uint8], faces: Detections) -> NDArray[np.uint8]:
    return draw_detections(
        picture, faces.boxes.cpu().numpy(), faces.scores.cpu().numpy(), faces.landmarks.cpu().numpy()
    )


def _as_rgb(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(picture[..., ::-1])


def _publish(trainer: L.Trainer, sheet: NDArray[np.uint8], name: str, file: str) -> None:
    """Writes a sheet to the trainer's root folder and sends it to the loggers that take pictures."""
    path = Path(trainer.default_root_dir) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), sheet)
    send_picture(trainer, sheet, name)


def send_picture(trainer: L.Trainer, picture: NDArray[np.uint8], name: str) -> None:
    """Sends a picture to W&B and TensorBoard, where these are the logger.

    Args:
        trainer: Whose loggers.
        picture: ``(H, W, 3)`` uint8 BGR.
        name: What to call it there.
    """
    picture = _as_rgb(picture)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, trainer.global_step, dataformats="HWC")
