"""Removes channels from the student before it is trained."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim.swa_utils import update_bn
from typing_extensions import override

from callbacks.first_process import decided_by_first_process
from callbacks.image_logging import send_picture
from lightning_modules import RetinaFaceModule
from retinaface.compression.channel_groups import Gradients, Importance, loss_gradients
from retinaface.compression.decision import data_settings, digest, kept_decision
from retinaface.compression.pruning import Plan, PruningSettings, PruningTarget, Ranking, apply_plan, make_plan
from retinaface.errors import InputError
from retinaface.evaluation.benchmark import Timing
from retinaface.evaluation.describe import Description, compare, kept_channels
from retinaface.evaluation.speedup import speedup_meter
from retinaface.evaluation.visualize import plot_kept_channels
from retinaface.model.network import RetinaFace, normalize
from retinaface.progress import with_progress

# What goes, the buffers of what is left, and how fast that is.
Decision = tuple[Plan, dict[str, Tensor], dict[str, float]]


class ChannelPruning(L.Callback):
    """Prunes the network when a fit begins; the fit then fine-tunes what is left.

    It acts in ``setup``: before the network is wrapped for several processes and before the optimizer exists, both of
    which would go on with parameters that are no longer there. What was removed is kept in the module's structure, and
    so in its checkpoints. One process decides, and all remove the same.

    What is left is drawn in ``kept_channels.png`` in the trainer's root folder, which goes to the loggers together with
    parameters, MACs and milliseconds before and after.

    With several processes the others wait for the first one. A search for a speed took 4 to 5 minutes on 2 cores: up to
    40 timings of ten seconds and as many exports. What such a search, or ``importance: taylor``, has found is written
    to ``pruning.pt`` in the trainer's root folder at once, with the batch norms' statistics: a fit that is killed
    before its first checkpoint and begins anew there, with the same settings and student, removes the same.

    Args:
        ratio: Share of the channels of every layer to remove, 0 to 1; without a ``target`` 0.4.
        target: How small or fast to become instead, one of ``{macs: 0.35}`` and ``{params: 0.35}`` (what is left) and
            ``{speedup: 2.0}`` (as FP32 in ONNX Runtime on this machine's CPU, against the network that the stage starts
            from).
        importance: How channels are scored: ``l1``, ``l2``, ``taylor``, ``bn_scale``, ``lamp``, ``fpgm`` or ``random``.
        ranking: ``local`` ranks channels within their layer, ``global`` against all others, ``isomorphic`` against
            those of layers that are built alike.
        ratios: Module, with all below it, to a ratio of its own.
        keep: Modules, with all below them, that lose none of their output channels, such as ``backbone.stage1``.
        round_to: Channel counts are rounded down to a multiple of this, so narrow layers may lose more than ``ratio``;
            with ``sensitivity`` they are rounded up.
        min_channels: No layer is left with fewer channels than this.
        max_ratio: No layer loses a larger share than this.
        sensitivity: File of ``python -m retinaface sensitivity`` that says which layers bear most; with ``target``.
        recalibrate: Training batches over which the batch norms' statistics are estimated anew after the surgery, also
            of modules that the optimizer's ``rates`` lets rest; 0 leaves them as they are.
        taylor_batches: Training batches that ``importance: taylor`` looks at.
        measure_speed: Whether to time the network before and after, which takes two exports. A target of ``speedup`` is
            measured in any case.
        size: Side in pixels of the picture for MACs and speed.
        threads: Threads for the speed; by default every physical core.

    Raises:
        InputError: A setting is out of range; when a fit begins, a setting names an unknown module, the target cannot
            be reached, the network is quantized already, the fit goes on from a checkpoint that was not pruned, or what
            was found cannot be written.
    """

    def __init__(
        self,
        ratio: float | None = None,
        target: PruningTarget | None = None,
        importance: Importance = "l1",
        ranking: Ranking = "local",
        ratios: Mapping[str, float] | None = None,
        keep: Sequence[str] = (),
        round_to: int = 8,
        min_channels: int = 1,
        max_ratio: float = 0.8,
        sensitivity: str | None = None,
        recalibrate: int = 20,
        taylor_batches: int = 20,
        measure_speed: bool = True,
        size: int = 640,
        threads: int | None = None,
    ) -> None:
        self.settings = PruningSettings(
            ratio,
            target,
            importance,
            ranking,
            dict(ratios or {}),
            tuple(keep),
            round_to,
            min_channels,
            max_ratio,
            sensitivity,
        )
        for name, value, least in (
            ("recalibrate", recalibrate, 0),
            ("taylor_batches", taylor_batches, 1),
            ("size", size, 64),
        ):
            if value < least:
                raise InputError(f"pruning: {name} is {value}; expected {least} or more")
        self.recalibrate = recalibrate
        self.taylor_batches = taylor_batches
        self.measure_speed = measure_speed
        self.size = size
        self.threads = threads
        self._plans_before = 0
        self._change: Change | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        assert isinstance(pl_module, RetinaFaceModule)
        network = pl_module.network
        if not isinstance(network, RetinaFace):
            raise InputError("pruning: the network is quantized already; prune in a stage before quantization")
        self._plans_before = len(pl_module.structure.plans)
        if trainer.ckpt_path is not None:
            return  # the checkpoint brings plan and weights
        with isolate_rng(include_cuda=False):  # what follows must not depend on when it was decided
            decision = decided_by_first_process(trainer, lambda: self._decide_once(trainer, pl_module))
        plan, statistics, timings = decision
        before = deepcopy(network)
        apply_plan(network, plan)
        network.load_state_dict(statistics, strict=False)
        pl_module.structure.plans.append(plan)
        if trainer.is_global_zero:
            self._change = Change(compare(before, network, self.size), timings)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RetinaFaceModule)
        # A checkpoint to go on from brings its own structure, and it may be that of another stage.
        if len(pl_module.structure.plans) <= self._plans_before or pl_module.structure.quantization is not None:
            raise InputError(
                f"{trainer.ckpt_path}: is not of this pruning stage, which cannot go on from it; give it as the "
                "student (--model.init_args.student)"
            )
        if self._change is not None and trainer.ckpt_path is None:
            self._publish(trainer, self._change)

    def _decide_once(self, trainer: L.Trainer, module: RetinaFaceModule) -> Decision:
        """As :meth:`_decide`, but what takes minutes, or rests on timings, is kept in a file."""
        target, importance = self.settings.target, self.settings.importance
        takes_minutes = importance == "taylor" or (target is not None and target.speedup is not None)
        if not takes_minutes or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return self._decide(trainer, module)
        made_for = {
            "settings": asdict(self.settings),
            "recalibrate": self.recalibrate,
            "taylor_batches": self.taylor_batches,
            "measure_speed": self.measure_speed,
            "size": self.size,
            "threads": self.threads,
            "structure": module.structure.to_plain(),
            "student": digest(module.network),
            "data": data_settings(getattr(trainer, "datamodule", None)),
            "loss": repr(module.loss),
            "sensitivity": self.settings.sensitivity and Path(self.settings.sensitivity).read_text("utf-8"),
        }
        file = Path(trainer.default_root_dir) / "pruning.pt"
        return kept_decision(file, made_for, lambda: self._decide(trainer, module), rank_zero_info)

    def _decide(self, trainer: L.Trainer, module: RetinaFaceModule) -> Decision:
        """Chooses what goes, times what is left, and estimates its batch norms' statistics."""
        network = module.network
        assert isinstance(network, RetinaFace)
        gradients = self._gradients(trainer, module) if self.settings.importance == "taylor" else None
        pruned = deepcopy(network)
        with speedup_meter(network, self.size, self.threads) as measure:

            def speedup(candidate: RetinaFace) -> float:
                ratio = measure(candidate)[1].ratio
                rank_zero_info(f"pruning: tried a network that is {ratio:.2f}x as fast")
                return ratio

            plan = make_plan(network, self.settings, gradients, speedup, self.size)
            apply_plan(pruned, plan)
            timed = self.measure_speed and not trainer.fast_dev_run  # type: ignore[attr-defined]
            timings = _figures(*measure(pruned)) if timed else {}
        if self.recalibrate:
            device = trainer.strategy.root_device
            batches = self._batches(trainer, self.recalibrate, "estimating batch statistics")
            update_bn((normalize(batch["images"]) for batch in batches), pruned.to(device))
        return plan, {name: value.cpu() for name, value in pruned.named_buffers()}, timings

    def _gradients(self, trainer: L.Trainer, module: RetinaFaceModule) -> Gradients:
        """Gradients of the loss against the labels, over the first batches of the first epoch."""
        samples = getattr(trainer.datamodule, "train_samples", ())  # type: ignore[attr-defined]
        if not all(sample.labelled for sample in samples):
            raise InputError(
                "pruning: importance taylor looks at the loss against labels, and the training photos have none; "
                "choose another importance"
            )
        network = deepcopy(module.network).to(trainer.strategy.root_device).eval().requires_grad_(True)
        assert isinstance(network, RetinaFace)
        batches = self._batches(trainer, self.taylor_batches, "gradients of the loss")
        losses = (module.task_loss(network(normalize(batch["images"])), batch).total for batch in batches)
        return loss_gradients(network, losses)

    @staticmethod
    def _batches(trainer: L.Trainer, count: int, description: str) -> Iterator[Any]:
        """This process's first training batches, on its device, with a progress bar."""
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            raise InputError(
                "pruning: recalibrate and importance taylor need a data module, as fit has its loaders only later; "
                "give one, or set recalibrate to 0 and choose another importance"
            )
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        batches = iter(loader)
        for _ in with_progress(range(min(count, len(loader))), description):
            yield move_data_to_device(next(batches), trainer.strategy.root_device)

    def _publish(self, trainer: L.Trainer, change: "Change") -> None:
        """Writes and logs what was removed."""
        figures = change.figures()
        rank_zero_info(f"pruning: {', '.join(f'{name} {value:.4g}' for name, value in figures.items())}")
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.log_metrics({f"pruning/{name}": value for name, value in figures.items()}, step=0)
        chart = Path(trainer.default_root_dir) / "kept_channels.png"
        plot_kept_channels(kept_channels(change.description.layers), chart)
        send_picture(trainer, np.asarray(cv2.imread(str(chart)), np.uint8), "pruning/kept_channels")


def _figures(before: Timing, after: Timing) -> dict[str, float]:
    return {"ms_before": float(before.median_ms), "ms": float(after.median_ms), "speedup": float(after.ratio)}


@dataclass(frozen=True)
class Change:
    """What pruning made of a network.

    Attributes:
        description: What is left, layer by layer.
        timings: Milliseconds before and after, and how many times as fast it is; empty where it was not timed.
    """

    description: Description
    timings: Mapping[str, float]

    def figures(self) -> dict[str, float]:
        """What changed, before and after."""
        return {
            "params_before": self.description.params_before,
            "params": self.description.params,
            "macs_before": self.description.macs_before,
            "macs": self.description.macs,
            **self.timings,
        }
