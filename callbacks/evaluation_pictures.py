"""Draws what a validation measured, once there is a final figure."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from lightning_modules import RetinaFaceModule
from retinaface.evaluation.evaluate import Photo, measure_accuracy, save_pictures


class EvaluationPictures(L.Callback):
    """Draws precision and recall, average precision by face size, and the worst photos.

    That is done after ``validate`` and ``test``, and after a ``fit`` for its last validation. The PNG files are written
    to ``evaluation/`` in the trainer's root folder, and sent to W&B where that is a logger, with the curves as a chart.
    """

    def __init__(self) -> None:
        self._photos: list[Photo] = []

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._keep_photos(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # In a fit only at its end: which validation is the last is not known before, and no checkpoint has to wait.
        if trainer.state.fn != "fit":
            self._draw(trainer)

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_validation_epoch_end(trainer, pl_module)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer)

    def _keep_photos(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RetinaFaceModule)
        with pl_module.val_ap.sync_context():  # every process takes part: each has seen some of the photos
            seen = pl_module.val_ap.photos_seen()
        if not trainer.is_global_zero:
            return
        samples = trainer.datamodule.val_samples  # type: ignore[attr-defined]
        self._photos = [
            Photo(samples[index].path, samples[index].name, detections, faces, counted)
            for index, detections, faces, counted in zip(*seen, strict=True)
        ]

    def _draw(self, trainer: L.Trainer) -> None:
        photos, self._photos = self._photos, []
        if not photos:
            return
        folder = Path(trainer.default_root_dir) / "evaluation"
        accuracy = measure_accuracy(photos)
        files = save_pictures({"model": accuracy}, photos, folder)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                from retinaface.evaluation.dashboard import precision_recall_chart  # has W&B imported: a second

                for name, file in files.items():
                    logger.log_image(f"evaluation/{name}", [str(file)])
                logger.log_metrics({"evaluation/curves": precision_recall_chart(accuracy.curves)})
