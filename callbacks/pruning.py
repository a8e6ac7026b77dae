"""Removes channels from the student before it is trained."""

from collections.abc import Sequence

import lightning as L
from typing_extensions import override

from lightning_modules import RetinaFaceModule
from retinaface.compression.pruning import PruningSettings, apply_plan, make_plan
from retinaface.errors import InputError
from retinaface.model.network import RetinaFace


class ChannelPruning(L.Callback):
    """Prunes the network when a fit begins; the fit then fine-tunes what is left.

    It acts in ``setup``: before the network is wrapped for several processes and before the optimizer exists, both of
    which would go on with parameters that are no longer there. What was removed is kept in the module's structure, and
    so in its checkpoints.

    Args:
        ratio: Share of the channels of every layer to remove, 0 to 1.
        round_to: Channel counts are rounded down to a multiple of this, so narrow layers may lose more than ``ratio``.
        global_ranking: Rank the channels of all layers together.
        keep: Modules, with all below them, that lose none of their output channels, such as ``backbone.stage1``.
        max_ratio: No layer loses a larger share than this.

    Raises:
        InputError: A number is out of range; when a fit begins, ``keep`` names an unknown module, the network is
            quantized already, or the fit goes on from a checkpoint that was not pruned.
    """

    def __init__(
        self,
        ratio: float = 0.4,
        round_to: int = 8,
        global_ranking: bool = False,
        keep: Sequence[str] = (),
        max_ratio: float = 0.8,
    ) -> None:
        self.settings = PruningSettings(ratio, round_to, global_ranking, tuple(keep), max_ratio)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        assert isinstance(pl_module, RetinaFaceModule)
        network = pl_module.network
        if not isinstance(network, RetinaFace):
            raise InputError("pruning: the network is quantized already; prune in a stage before quantization")
        # One process decides, so that all remove the same.
        plan = trainer.strategy.broadcast(make_plan(network, self.settings) if trainer.is_global_zero else None)
        assert plan is not None
        apply_plan(network, plan)
        pl_module.structure.plans.append(plan)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RetinaFaceModule)
        # A checkpoint to go on from brings its own structure, and it may be that of another stage.
        if not pl_module.structure.plans or pl_module.structure.quantization is not None:
            raise InputError(
                f"{trainer.ckpt_path}: is not of a pruning stage, which cannot go on from it; give it as the "
                "student (--model.init_args.student)"
            )
