"""Sends a stage's models to Weights & Biases."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from callbacks.export import ExportOnnx

# Arguments of the modules that name a checkpoint to start from.
_INPUTS = ("weights", "student", "teacher")


class WandbModels(L.Callback):
    """Where W&B is a logger: sends checkpoint and ONNX file of a fit as artifacts, and what the fit started from.

    W&B draws from these how the teacher became the pruned model and that the INT8 one. All settings of the fit become
    the run's configuration.
    """

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in _wandb_loggers(trainer):
            from retinaface.evaluation.dashboard import use_model  # has W&B imported, which takes a second

            settings = _settings(trainer)
            logger.log_hyperparams(settings)
            for file in _input_files(settings):
                use_model(logger.experiment, file)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not in on_fit_end, where other callbacks still write these files.
        for logger in _wandb_loggers(trainer) if stage == "fit" else []:
            from retinaface.evaluation.dashboard import log_model

            callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            exported = [each.file(trainer) for each in callbacks if isinstance(each, ExportOnnx)]
            for checkpoint in _checkpoints(trainer):
                log_model(logger.experiment, checkpoint, [file for file in exported if file.is_file()])


def _wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    """Of the first process; the others log nothing."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger) and trainer.is_global_zero]


def _settings(trainer: L.Trainer) -> dict[str, Any]:
    """What ``train.py`` was told, from the callback that saves it to a file; empty where there is none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            settings: dict[str, Any] = callback.config.as_dict()
            return settings
    return {}


def _input_files(settings: dict[str, Any]) -> list[Path]:
    """The checkpoints that a fit starts from, each once."""
    given = settings.get("model", {}).get("init_args", {})
    return list(dict.fromkeys(Path(given[name]) for name in _INPUTS if given.get(name) is not None))


def _checkpoints(trainer: L.Trainer) -> list[Path]:
    """What the fit ended with; a stage that trains nothing saves it by the name that it has after a training."""
    files = [
        Path(callback.best_model_path or Path(callback.dirpath or trainer.default_root_dir) / "last.ckpt")
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
    ]
    return [file for file in files if file.is_file()]
