"""Trains, validates and tests: ``python train.py fit --config configs/default.yaml --config ...``.

The LightningCLI: every argument of the classes in ``lightning_modules``, ``datamodules`` and ``callbacks``, and of the
Trainer, can be set in a YAML file or on the command line; see ``python train.py fit --help``.
"""

import sys
import warnings

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import callbacks  # noqa: F401  so that their classes can be named in a configuration
import datamodules  # noqa: F401
import lightning_modules  # noqa: F401
from retinaface.errors import InputError, one_line


class RetinaFaceCLI(LightningCLI):
    """LightningCLI with checkpoints at a place that each run states."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")


def main(args: list[str] | None = None) -> RetinaFaceCLI:
    """Runs one LightningCLI subcommand.

    Args:
        args: Command-line arguments; by default those of the process.

    Returns:
        The CLI, with its ``trainer``, ``model`` and ``datamodule``.
    """
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning on torch 2.15
    return RetinaFaceCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
