"""Trains, validates and tests: ``python train.py fit --config configs/default.yaml --config ...``.

The LightningCLI: every argument of the classes in ``lightning_modules``, ``datamodules`` and ``callbacks``, and of the
Trainer, can be set in a YAML file or on the command line; see ``python train.py fit --help``.
"""

import logging
import sys
import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

import callbacks  # noqa: F401  so that their classes can be named in a configuration
import datamodules  # noqa: F401
import lightning_modules  # noqa: F401
from lightning_modules.checkpoint_io import check_resumable, newest_checkpoint
from retinaface.errors import find_input_error, one_line

# Warnings that ask for nothing, and why; all others are shown.
_HARMLESS = (
    ".*isinstance.treespec, LeafSpec.*",  # Lightning on torch 2.15, once per batch
    ".*`tensorboardX` has been removed.*",  # configs/default.yaml says which logger takes its place
    ".*in eval mode at the start of training.*",  # the frozen teacher, and the graph inside a quantized student
    ".*is smaller than the logging interval.*",  # few photos: the losses of some epochs are not logged
    ".*It is recommended to use `self.log.'val.*sync_dist=True.*",  # the metric is computed over all processes
)


class RetinaFaceCLI(LightningCLI):
    """LightningCLI with checkpoints at a place that each run states."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path not in (None, "best", "last", "hpc"):
            check_resumable(path)

    def before_fit(self) -> None:
        """Tells the trainer now what it goes on from, so that callbacks know in their ``setup``; it would later.

        ``last`` is the newest checkpoint that can be read, the one of a requeued cluster job included; Lightning would
        take the newest, and has no public function for what it would take.
        """
        arguments = self.config_init[self.config_init.subcommand]
        folder = arguments.checkpoint.dirpath
        if arguments.ckpt_path == "last" and folder is not None:
            arguments.ckpt_path = newest_checkpoint(Path(folder))
        self.trainer.ckpt_path = self.trainer._checkpoint_connector._select_ckpt_path(
            TrainerFn.FITTING, arguments.ckpt_path, model_provided=True, model_connected=False
        )
        arguments.ckpt_path = None


def main(args: list[str] | None = None) -> RetinaFaceCLI:
    """Runs one LightningCLI subcommand.

    Args:
        args: Command-line arguments; by default those of the process.

    Returns:
        The CLI, with its ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: With status 2 and a one-line message when the input is wrong.
    """
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    try:
        return RetinaFaceCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except Exception as error:
        wrong_input = find_input_error(error)
        if wrong_input is None:
            raise
        print(f"error: {one_line(wrong_input)}", file=sys.stderr)
        sys.exit(2)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Lightning recommends packages of its makers at every start."""
    return "Tip: For seamless cloud" not in record.getMessage()


if __name__ == "__main__":
    main()
