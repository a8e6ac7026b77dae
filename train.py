"""Trains, validates and tests: ``python train.py fit --config configs/default.yaml --config ...``.

The LightningCLI: every argument of the classes in ``lightning_modules``, ``datamodules`` and ``callbacks``, and of the
Trainer, can be set in a YAML file or on the command line; see ``python train.py fit --help``. ``benchmark`` takes the
same and times a training step.
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and hasattr(signal, "pthread_sigmask"):
    # The imports take seconds, and a cluster may say within them that the time is over: it waits for callbacks.Requeue.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # nor is a fit that is over to fail by it

from retinaface.processes import die_with_parent, keep_freed_memory

if __name__ == "__main__" and os.environ.get("LOCAL_RANK", "0") != "0":
    die_with_parent()  # who started this one of several processes; it would wait for the first one for ever

# Read when torch is loaded. How long OpenMP's threads keep a core busy that wait for each other: by default so long
# that beside another busy process most of the time goes into it; not at all is slow where they have the cores alone.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

import callbacks  # noqa: F401  so that their classes can be named in a configuration
import datamodules  # noqa: F401
from callbacks.first_process import decided_by_first_process
from lightning_modules import CompressionModule
from lightning_modules.checkpoint_io import keep_for_this_process, newest_checkpoint, read_resumable
from lightning_modules.step_benchmark import BenchmarkTrainer, benchmark_options
from retinaface.data.loading import find_dead_worker
from retinaface.errors import find_input_error, one_line

# Warnings that ask for nothing, and why; all others are shown.
_HARMLESS = (
    ".*isinstance.treespec, LeafSpec.*",  # Lightning on torch 2.15, once per batch
    ".*`tensorboardX` has been removed.*",  # configs/default.yaml says which logger takes its place
    ".*in eval mode at the start of training.*",  # the frozen teacher, and the graph inside a quantized student
    ".*is smaller than the logging interval.*",  # few photos: the losses of some epochs are not logged
    ".*It is recommended to use `self.log.'val.*sync_dist=True.*",  # the metric is computed over all processes
)


class _NoClusterCheckpoints(_CheckpointConnector):
    """Lightning would take whatever ``hpc_ckpt_*`` lies in the run's folder, which may be another job's."""

    @property
    @override
    def _hpc_resume_path(self) -> None:
        return None


class RetinaFaceCLI(LightningCLI):
    """LightningCLI with checkpoints at a place that each run states, and a benchmark."""

    @override
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "benchmark": {"model", "datamodule"}}

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        if self.subcommand == "benchmark":
            arguments = self.config_init.benchmark
            kwargs |= benchmark_options(arguments.steps, arguments.warmup)
        trainer = super().instantiate_trainer(**kwargs)
        trainer._checkpoint_connector = _NoClusterCheckpoints(trainer)
        environment = _environment(trainer)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # it would save an hpc_ckpt_*, in the middle of a step
        return trainer

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path not in (None, "best", "last"):
            read_resumable(path)

    @override
    def before_instantiate_classes(self) -> None:
        """Takes the place that a logger writes to as lying in the run's folder, unless it is absolute."""
        trainer = self.config[self.config.subcommand].trainer
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            place = isinstance(logger, Namespace) and logger.init_args.get("save_dir")
            if place:
                logger.init_args.save_dir = str(Path(trainer.default_root_dir or "", place))

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})  # see the top of this file
        if self.subcommand in ("fit", "benchmark") and isinstance(self.model, CompressionModule):
            self.model.require_student()  # the callbacks' setup comes before the model's own, and may take minutes

    def before_fit(self) -> None:
        """Tells the trainer now what it goes on from, so that callbacks know in their ``setup``; it would later.

        ``last`` is the checkpoint furthest on that can be read, the one of a requeued cluster job included; Lightning
        would go by times of writing, and has no public function for what it would take.
        """
        arguments = self.config_init[self.config_init.subcommand]
        choose = partial(_choose_checkpoint, self.trainer, arguments.checkpoint.dirpath, arguments.ckpt_path)
        arguments.ckpt_path = _choose_together(self.trainer, choose)
        self.trainer.ckpt_path = self.trainer._checkpoint_connector._select_ckpt_path(
            TrainerFn.FITTING, arguments.ckpt_path, model_provided=True, model_connected=False
        )
        arguments.ckpt_path = None


def _choose_checkpoint(trainer: L.Trainer, folder: str | None, path: str | Path | None) -> str | Path | None:
    """What a fit goes on from, once no other one is writing into the folder."""
    if folder is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        keep_for_this_process(Path(folder))
    return newest_checkpoint(Path(folder)) if path == "last" and folder is not None else path


def _choose_together(trainer: L.Trainer, choose: Callable[[], str | Path | None]) -> str | Path | None:
    """The first process's choice, for which the others must wait if all have been started at the same time.

    Else the first one starts the others when it has chosen.
    """
    if trainer.world_size == 1 or isinstance(_environment(trainer), LightningEnvironment):
        return choose()
    _environment(trainer).validate_settings(trainer.num_devices, trainer.num_nodes)
    trainer.strategy.setup_environment()  # connects the processes; the fit finds them connected
    return decided_by_first_process(trainer, choose)


def _environment(trainer: L.Trainer) -> ClusterEnvironment:
    """Lightning's knowledge of who has started this process; only some strategies show it."""
    return trainer._accelerator_connector.cluster_environment


def main(args: list[str] | None = None) -> RetinaFaceCLI:
    """Runs one LightningCLI subcommand.

    Args:
        args: Command-line arguments; by default those of the process.

    Returns:
        The CLI, with its ``trainer``, ``model`` and ``datamodule``.

    Raises:
        SystemExit: With status 2 and a one-line message when the input is wrong, or the system killed a loader process.
    """
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    try:
        return RetinaFaceCLI(
            L.LightningModule,
            L.LightningDataModule,
            trainer_class=BenchmarkTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            args=args,
        )
    except Exception as error:
        wrong_input = find_input_error(error) or find_dead_worker(error)
        if wrong_input is None:
            raise
        print(f"error: {one_line(wrong_input)}", file=sys.stderr)
        sys.exit(2)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Lightning recommends packages of its makers at every start."""
    return "Tip: For seamless cloud" not in record.getMessage()


if __name__ == "__main__":
    keep_freed_memory()
    main()
