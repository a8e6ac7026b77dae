"""Trains, validates and tests: ``python train.py fit --config configs/default.yaml --config ...``.

The LightningCLI: every argument of the classes in ``lightning_modules``, ``datamodules`` and ``callbacks``, and of the
Trainer, can be set in a YAML file or on the command line; see ``python train.py fit --help``.
"""

import logging
import sys
import warnings

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

import callbacks  # noqa: F401  so that their classes can be named in a configuration
import datamodules  # noqa: F401
import lightning_modules  # noqa: F401
from retinaface.errors import InputError, find_input_error, one_line
from retinaface.model.checkpoints import read_torch_file

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
            _check_resumable(path)

    def before_fit(self) -> None:
        """Tells the trainer now what it goes on from, so that callbacks know in their ``setup``; it would later.

        Lightning has no public function for what ``last`` and a requeued cluster job go on from.
        """
        arguments = self.config_init[self.config_init.subcommand]
        self.trainer.ckpt_path = self.trainer._checkpoint_connector._select_ckpt_path(
            TrainerFn.FITTING, arguments.ckpt_path, model_provided=True, model_connected=False
        )
        arguments.ckpt_path = None


def _check_resumable(path: str) -> None:
    """Lightning would answer a foreign file with a traceback."""
    content = read_torch_file(path)
    if not isinstance(content, dict) or not {"structure", "pytorch-lightning_version"} <= content.keys():
        raise InputError(
            f"{path}: not a checkpoint that train.py saved, and --ckpt_path goes on only from those; give weights to "
            "start from with --model.init_args.weights"
        )


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
