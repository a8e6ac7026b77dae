"""Makes channels easier to remove: those that matter least are pushed towards zero while the network is trained."""

from typing import Any, Literal, get_args

import lightning as L
import torch
import torch_pruning as tp
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules import RetinaFaceModule
from retinaface.compression.channel_groups import example_input, heads
from retinaface.errors import InputError
from retinaface.model.network import RetinaFace

Method = Literal["group_lasso", "growing"]


class SparsityRegularization(L.Callback):
    """Adds a regularisation by groups of channels to the gradients, in the stage before pruning.

    ``group_lasso`` pulls every channel towards zero, the weakest of a group 16 times as strongly as the strongest
    (arXiv:2301.12900, section 3.4). ``growing`` pulls all alike at first, and harder after every epoch, the weaker a
    channel the more (arXiv:2012.09243). What can only be removed together is pulled together.

    Every process adds the same to gradients that are the same already, so they stay in step. The weight decay of AdamW
    does not see these gradients; the gradient clipping does.

    Args:
        method: Which regularisation.
        strength: Its weight: the gradient of a channel's weights is raised by about this share of them.

    Raises:
        InputError: A setting is out of range; when a fit begins, the network is quantized.
    """

    def __init__(self, method: Method = "group_lasso", strength: float = 5e-4) -> None:
        if method not in get_args(Method):
            raise InputError(f"sparsity: method is {method!r}; expected one of {', '.join(get_args(Method))}")
        if strength <= 0:
            raise InputError(f"sparsity: strength is {strength}; expected more than 0")
        self.method = method
        self.strength = strength
        self._pruner: Any = None
        self._restored: list[Tensor] = []

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RetinaFaceModule)
        network = pl_module.network
        if not isinstance(network, RetinaFace):
            raise InputError("sparsity: the network is quantized already; it belongs in a stage before pruning")
        training = network.training
        self._pruner = self._make_pruner(network, pl_module.device)
        network.train(training)  # following the dependencies leaves it in evaluation mode
        if self._restored:
            self._pruner.group_reg = dict(zip(self._pruner.group_reg, self._restored, strict=True))

    def _make_pruner(self, network: RetinaFace, device: torch.device) -> Any:  # noqa: ANN401
        example, importance = example_input().to(device), tp.importance.MagnitudeImportance(p=2)
        if self.method == "group_lasso":
            return tp.pruner.GroupNormPruner(
                network, example, importance, reg=self.strength, ignored_layers=heads(network)
            )
        return tp.pruner.GrowingRegPruner(
            network, example, importance, reg=self.strength, delta_reg=self.strength, ignored_layers=heads(network)
        )

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._pruner.regularize(pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.method == "growing":
            self._pruner.update_reg()

    @override
    def state_dict(self) -> dict[str, Any]:
        grown = [] if self._pruner is None or self.method == "group_lasso" else [*self._pruner.group_reg.values()]
        return {"strengths": grown}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["strengths"]
