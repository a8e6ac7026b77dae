import cv2
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from callbacks import ImageLogging
from callbacks.image_logging import wandb_boxes
from datamodules import WiderFaceDataModule
from lightning_modules import RetinaFaceModule
from retinaface.model.network import NetworkConfig
from retinaface.model.postprocess import Detections


def test_a_sheet_an_epoch(pruned_run):
    sheets = sorted((pruned_run.folder / "detections").iterdir())
    assert [sheet.name for sheet in sheets] == ["epoch_000.jpg", "epoch_001.jpg", "epoch_002.jpg"]
    picture = cv2.imread(str(sheets[0]))
    assert picture.shape[1] == 1600
    assert picture.std() > 10  # photos, not a blank sheet


@pytest.mark.parametrize(
    ("logger_class", "method"), [(WandbLogger, "log_image"), (TensorBoardLogger, "experiment.add_image")]
)
def test_sheet_of_the_first_photos_goes_to_the_logger(
    logger_class, method, tiny_root, tmp_path, monkeypatch, mocker_for
):
    logger, calls = mocker_for(logger_class, method)
    drawn = []
    real = ImageLogging.on_validation_batch_end

    def count(self, *arguments):
        real(self, *arguments)
        drawn.append(len(self._found))

    monkeypatch.setattr(ImageLogging, "on_validation_batch_end", count)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[ImageLogging(photos=3)],
        max_epochs=1,
        limit_train_batches=1,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.loggers = [logger]
    module = RetinaFaceModule(NetworkConfig(channels=16))
    data = WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, val_batch_size=2, num_workers=0)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)  # draws nothing: the sheet is that of an epoch
    assert drawn == [2, 3, 3, 0, 0, 0]
    files = {"train/batch": "train_batch.jpg", "val/detections": "detections/epoch_000.jpg"}
    calls = [call for call in calls if call[0] != "val/faces"]
    assert [name for name, *_ in calls] == list(files)
    for name, sheet, *_ in calls:
        sheet = np.asarray(sheet[0] if isinstance(sheet, list) else sheet)
        written = cv2.imread(str(tmp_path / files[name]))
        assert np.abs(sheet[..., ::-1].astype(int) - written).mean() < 6  # RGB there, BGR here; JPEG in between


def test_boxes_that_wandb_lays_over_a_photo():
    faces = Detections(torch.tensor([[1.2, 2.6, 30.0, 40.4], [5, 6, 7, 8]]), torch.tensor([0.75, 0.5]), torch.empty(0))
    first, second = wandb_boxes(faces)["detections"]["box_data"]
    assert first["position"] == {"minX": 1, "minY": 3, "maxX": 30, "maxY": 40}
    assert (first["domain"], first["scores"]) == ("pixel", {"score": 0.75})
    assert second["box_caption"] == "0.50"


@pytest.fixture
def mocker_for(monkeypatch):
    """A logger of a class, without its service, and the calls of one of its methods."""

    def make(logger_class, method):
        calls = []

        class Fake(logger_class):
            name = version = "fake"
            save_dir = log_dir = root_dir = None
            experiment = None

            def __init__(self):
                pass

            def log_metrics(self, metrics, step=None): ...
            def log_hyperparams(self, *args, **kwargs): ...
            def log_graph(self, *args, **kwargs): ...
            def save(self): ...
            def finalize(self, status): ...

        logger = Fake()
        if method.startswith("experiment."):
            Fake.experiment = type("Experiment", (), {"add_image": lambda self, *args, **kwargs: calls.append(args)})()
        else:
            setattr(logger, method, lambda *args, **options: calls.append((*args, options)))
        return logger, calls

    return make
