import lightning as L
import pytest
from lightning.pytorch.loggers import WandbLogger
from matplotlib.image import imread

from callbacks import EvaluationPictures
from datamodules import WiderFaceDataModule
from lightning_modules import RetinaFaceModule
from retinaface.data.annotations import load_split
from retinaface.evaluation.wider_ap import PhotosSeen

NAMES = ["ap_by_size.png", "precision_recall.png", "worst_photos.png"]


def test_a_stage_ends_with_pictures(pruned_run):
    files = sorted((pruned_run.folder / "evaluation").iterdir())
    assert [file.name for file in files] == NAMES
    assert all(imread(file).std() > 0.01 for file in files)


class Logger(WandbLogger):
    """Without its service."""

    name = version = "fake"
    save_dir = log_dir = root_dir = experiment = None

    def __init__(self):
        self.pictures = []

    def log_image(self, key, images):
        self.pictures.append((key, images))

    def log_metrics(self, metrics, step=None): ...
    def log_hyperparams(self, *args, **kwargs): ...
    def log_graph(self, *args, **kwargs): ...
    def save(self): ...
    def finalize(self, status): ...


@pytest.fixture
def make_trainer(tmp_path):
    def make(**options):
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[EvaluationPictures()],
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            **options,
        )
        trainer.loggers = [Logger()]
        return trainer

    return make


@pytest.mark.parametrize("command", ["validate", "test"])
def test_pictures_of_the_measured_photos_go_to_wandb(command, make_trainer, tiny_root, tiny_checkpoint, monkeypatch):
    drawn = []
    save = "callbacks.evaluation_pictures.save_pictures"
    monkeypatch.setattr(save, lambda accuracies, photos, folder: drawn.append((accuracies, photos)) or {"x": folder})
    trainer = make_trainer()
    module = RetinaFaceModule(weights=str(tiny_checkpoint))
    data = WiderFaceDataModule(tiny_root, val_batch_size=2, num_workers=0)
    (measured,) = getattr(trainer, command)(module, datamodule=data, verbose=False)
    ((accuracies, photos),) = drawn
    assert accuracies["model"].ap["all"] == pytest.approx(measured["val/ap_all"], abs=1e-6)
    samples = load_split(tiny_root, "val")
    assert [photo.path for photo in photos] == [sample.path for sample in samples]
    assert all((photo.faces == sample.boxes).all() for photo, sample in zip(photos, samples, strict=True))
    assert trainer.loggers[0].pictures == [("evaluation/x", [f"{trainer.default_root_dir}/evaluation"])]


@pytest.mark.parametrize(
    "options",
    [{"max_epochs": 2}, {"max_steps": 2}, {"max_epochs": 3, "check_val_every_n_epoch": 2},
     {"max_epochs": 1, "val_check_interval": 1, "limit_train_batches": 2}],
)  # fmt: skip
def test_the_last_validation_of_a_fit_is_drawn_once(make_trainer, tiny_root, tiny_checkpoint, monkeypatch, options):
    drawn = []
    save = "callbacks.evaluation_pictures.save_pictures"
    monkeypatch.setattr(save, lambda accuracies, photos, folder: drawn.append(accuracies["model"].ap["all"]) or {})
    trainer = make_trainer(**{"limit_train_batches": 1, **options})
    data = WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0)
    trainer.fit(RetinaFaceModule(weights=str(tiny_checkpoint)), datamodule=data)
    assert drawn == [pytest.approx(float(trainer.callback_metrics["val/ap_all"]), abs=1e-6)]


def test_other_processes_take_part_but_draw_nothing(tiny_checkpoint, monkeypatch):
    module = RetinaFaceModule(weights=str(tiny_checkpoint))
    synchronised = []
    monkeypatch.setattr(module.val_ap, "photos_seen", lambda: synchronised.append(1) or PhotosSeen([], [], [], []))
    trainer = type("Trainer", (), {"is_global_zero": False})()
    EvaluationPictures()._keep_photos(trainer, module)
    assert synchronised == [1]
