"""Times the parts of a training step, for ``python train.py benchmark``."""

import json as json_format
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators.cuda import get_nvidia_gpu_stats
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from typing_extensions import override

from retinaface.errors import InputError
from retinaface.evaluation.benchmark import machine_facts
from retinaface.evaluation.benchmark_step import OTHER, StepTimings, step_table, step_timings

_STEP = "run_training_batch"

# Ends of the names under which Lightning profiles what it does; its own training step only holds other parts.
_LIGHTNING = {
    ".train_dataloader_next": "data",
    ".batch_to_device": "transfer",
    ".training_step": OTHER,
    ".backward": "backward",
    ".optimizer_step": "optimizer",
    ".optimizer_zero_grad": "optimizer",
}


class BenchmarkTrainer(L.Trainer):
    """Lightning's trainer, with a benchmark."""

    def benchmark(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        steps: int = 20,
        warmup: int = 5,
        json: Path | None = None,
    ) -> None:
        """Time the parts of a training step: data, forward, teacher, loss, backward, optimizer.

        It is a fit that leaves nothing behind, with the options of one: stage, callbacks, precision, devices. There is
        no validation, and ``keep_float: auto`` measures nothing: all becomes INT8. A step is a batch; with accumulated
        gradients not every one has an optimizer step.

        Args:
            model: What is trained.
            datamodule: With what; it has a ``batch_size``.
            steps: Steps to time.
            warmup: Steps before these.
            json: Also write the figures to this file.

        Raises:
            InputError: The stage trains no steps, or the file cannot be written.
        """
        self.limit_val_batches = 0
        self.fit_loop.max_epochs = -1  # as many epochs as the steps take
        profiler = self.profiler = StepProfiler(self.strategy.root_device)
        facts: dict[str, Any] = {"machine": machine_facts(), **_conditions(self)}

        def stop_after_last(*_: object) -> None:
            if self.fit_loop.epoch_loop.total_batch_idx + 1 >= warmup + steps:
                self.should_stop = True

        watch = LambdaCallback(
            on_train_batch_end=stop_after_last,
            on_train_end=lambda *_: facts.update(gpu=_gpu_facts(self)),  # it has been working until then
        )
        self.callbacks.append(watch)  # type: ignore[attr-defined]
        self.fit(model, datamodule=datamodule)
        batch_size = self.datamodule.batch_size  # type: ignore[attr-defined]
        timings = profiler.timings(warmup, batch_size * self.world_size)
        if not timings.steps:
            raise InputError("benchmark: this stage trains no steps; give the configuration of one that does")
        facts |= {"batch_size": batch_size, **timings.figures()}
        if self.is_global_zero:
            _show(timings, facts)
            if json is not None:
                _write(json, facts)


def benchmark_options(steps: int, warmup: int) -> dict[str, Any]:
    """What a trainer has to be made with for a benchmark.

    Raises:
        InputError: A number is out of range.
    """
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if value < least:
            raise InputError(f"{name}: expected at least {least}, found {value}")
    return {"fast_dev_run": warmup + steps}  # callbacks, loggers and checkpoints leave nothing behind then


def _conditions(trainer: L.Trainer) -> dict[str, Any]:
    return {
        "processes": trainer.world_size,
        "precision": trainer.precision,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "computing_threads": torch.get_num_threads(),
    }


def _gpu_facts(trainer: L.Trainer) -> dict[str, Any] | None:
    """Name, most memory that tensors took, and utilisation, the last as far as the system tells; None on a CPU."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    utilisation = None
    with suppress(FileNotFoundError, CalledProcessError, KeyError):
        utilisation = get_nvidia_gpu_stats(device)["utilization.gpu (%)"]
    return {
        "name": torch.cuda.get_device_name(device),
        "memory_mb": torch.cuda.max_memory_allocated(device) / 1e6,
        "utilisation_percent": utilisation,
    }


def _show(timings: StepTimings, facts: dict[str, Any]) -> None:
    machine, gpu = facts["machine"], facts["gpu"]
    place = f"{facts['computing_threads']} threads of {machine['cpu']}"
    if gpu is not None:
        place = f"{gpu['name']} ({gpu['memory_mb']:.0f} MB, {gpu['utilisation_percent']} % busy at the end)"
    title = (
        f"{len(timings.steps)} steps with {facts['processes']} x {facts['batch_size']} pictures, {facts['precision']}, "
        f"{place}, torch {machine['torch']}"
    )
    Console(markup=False, highlight=False, soft_wrap=True).print(step_table(timings, title))


def _write(path: Path, facts: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_format.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --json") from error


class StepProfiler(Profiler):
    """Notes when each part of a step begins and ends; what is none of them belongs to the part around it.

    On a GPU the times are those at which the GPU gets there, so nothing waits for the measurement, and ``data`` is the
    time in which the GPU has nothing to do because there is no batch.

    Args:
        device: Where the network is trained.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._now: Callable[[], float | torch.cuda.Event] = _gpu_mark if device.type == "cuda" else time.perf_counter
        self._around = [OTHER]
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []

    @override
    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Begins; only now has the process chosen its GPU, on which alone marks can be compared."""
        super().setup(stage, local_rank, log_dir)
        self._marks.append((OTHER, self._now()))

    @override
    def start(self, action_name: str) -> None:
        part = _part(action_name)
        if part is not None:
            self._around.append(part)
            self._marks.append((part, self._now()))

    @override
    def stop(self, action_name: str) -> None:
        if _part(action_name) is not None:
            self._around.pop()
            self._marks.append((self._around[-1], self._now()))
        elif action_name == _STEP:
            self._marks.append((None, self._now()))

    def timings(self, warmup: int, images_per_step: int) -> StepTimings:
        """See :func:`retinaface.evaluation.benchmark_step.step_timings`; waits until a GPU has finished."""
        first = self._marks[0][1]
        return step_timings([(part, _milliseconds(first, mark)) for part, mark in self._marks], warmup, images_per_step)


def _part(action: str) -> str | None:
    if action in ("forward", "teacher", "loss"):
        return action
    if action.startswith("[Callback]"):  # may be called as Lightning's own parts are
        return None
    return next((part for end, part in _LIGHTNING.items() if action.endswith(end)), None)


def _gpu_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(first: float | torch.cuda.Event, mark: float | torch.cuda.Event) -> float:
    if isinstance(first, torch.cuda.Event):
        assert isinstance(mark, torch.cuda.Event)
        mark.synchronize()
        elapsed: float = first.elapsed_time(mark)
        return elapsed
    assert not isinstance(mark, torch.cuda.Event)
    return (mark - first) * 1e3
