"""Makes the moving average of a stage's weights its result."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from typing_extensions import override

from lightning_modules import RetinaFaceModule
from retinaface.errors import InputError

_CHECKPOINT_KEY = "weights_in_training"
_STATISTICS = ("running_mean", "running_var")


class WeightAveraging(L.Callback):
    """Averages the network's weights over the steps of a fit; the average is what the fit results in.

    It is what is validated, drawn, exported, and found by the next stage in the checkpoint, which holds the weights in
    training beside it, so that a killed fit goes on as if it had not been killed.

    The average moves exponentially, faster in the beginning: after step ``n`` it keeps ``min(decay, (1 + n)/(10 + n))``
    of itself, so that in a short stage too little is left of the weights that it began with. Averaged are the
    parameters and the statistics of the batch norms; all else, such as the ranges of activations in INT8, which are
    moving averages already, stays as it is in training. The teacher is left alone.

    Lightning's ``EMAWeightAveraging`` will not do: it copies the module in ``setup``, before it is known what pruning
    or the checkpoint of a pruned network leaves of it, averages and saves the frozen teacher too, and averages the
    switches of fake-quantization, which are integers.

    Args:
        decay: Share of itself that the average keeps in a step, from 0 (no average) to below 1.

    Raises:
        InputError: The share is out of range; when a fit begins, checkpoint.save_weights_only is set.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"weight averaging: decay is {decay}; expected a share from 0 to below 1, such as 0.999")
        self.decay = decay
        self._away: dict[str, Tensor] = {}  # the average, or while the network holds that, the weights in training
        self._network_holds_average = False
        self._steps = 0

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only:
                raise InputError(
                    "weight averaging: with checkpoint.save_weights_only the weights in training would be saved, not "
                    "their average; leave it false"
                )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not before: a fit whose epochs are all over ends without this, and with the average of its checkpoint.
        if self._away:
            self._exchange(pl_module)
        self._steps = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return  # gradients are being accumulated
        self._steps = trainer.global_step
        current = averaged_tensors(_network(pl_module))
        if not self._away:
            self._away = {name: value.clone() for name, value in current.items()}
            return
        kept = min(self.decay, (1 + self._steps) / (10 + self._steps))
        get_ema_multi_avg_fn(kept)(list(self._away.values()), list(current.values()), None)

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._away:
            self._exchange(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._away:
            self._exchange(pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._away:
            self._exchange(pl_module)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._away, self._network_holds_average = {}, False

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._away:
            return
        here = averaged_tensors(_network(pl_module))
        average, training = (here, self._away) if self._network_holds_average else (self._away, here)
        checkpoint["state_dict"] |= {f"network.{name}": value for name, value in average.items()}
        checkpoint[_CHECKPOINT_KEY] = training

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # The network has the average by now. A checkpoint of a fit without this callback has none: it begins here.
        if trainer.state.fn == "fit":
            self._away = dict(checkpoint.get(_CHECKPOINT_KEY, {}))
            self._network_holds_average = bool(self._away)

    @torch.no_grad()
    def _exchange(self, module: L.LightningModule) -> None:
        for name, here in averaged_tensors(_network(module)).items():
            away = self._away[name]
            self._away[name] = here.clone()
            here.copy_(away)
        self._network_holds_average = not self._network_holds_average


def averaged_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and statistics of batch norms by name, sharing memory with the network."""
    statistics = {name: value for name, value in network.named_buffers() if name.endswith(_STATISTICS)}
    return {name: value.detach() for name, value in [*network.named_parameters(), *statistics.items()]}


def _network(module: L.LightningModule) -> nn.Module:
    assert isinstance(module, RetinaFaceModule)
    return module.network
