"""Makes channels easier to remove: those that matter least are pushed towards zero while the network is trained."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
import torch_pruning as tp
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules import RetinaFaceModule
from retinaface.compression.channel_groups import example_input, heads, modules_below
from retinaface.errors import InputError
from retinaface.model.network import RetinaFace

Method = Literal["group_lasso", "growing"]


class SparsityRegularization(L.Callback):
    """Adds a regularisation by groups of channels to the gradients, in the stage before pruning.

    ``group_lasso`` pulls every channel towards zero, the weakest of a group 16 times as strongly as the strongest
    (arXiv:2301.12900, section 3.4). ``growing`` pulls all alike at first, and harder after every epoch, the weaker a
    channel the more (arXiv:2012.09243). What can only be removed together is pulled together. Where all channels of a
    group matter alike, ``group_lasso`` leaves them alone.

    Every process adds the same to gradients that are the same already, so they stay in step. The weight decay of AdamW
    does not see these gradients; the gradient clipping does.

    Args:
        method: Which regularisation.
        strength: Its weight: the gradient of a channel's weights is raised by about this share of them.
        keep: Modules, with all below them, whose output channels are left alone; those that the pruning will ``keep``.

    Raises:
        InputError: A setting is out of range; when a fit begins, ``keep`` names an unknown module, the network is
            quantized, or the fit goes on from a checkpoint with another method or ``keep``.
    """

    def __init__(self, method: Method = "group_lasso", strength: float = 5e-4, keep: Sequence[str] = ()) -> None:
        if method not in get_args(Method):
            raise InputError(f"sparsity: method is {method!r}; expected one of {', '.join(get_args(Method))}")
        if strength <= 0:
            raise InputError(f"sparsity: strength is {strength}; expected more than 0")
        self.method = method
        self.strength = strength
        self.keep = tuple(keep)
        self._pruner: Any = None
        self._restored: dict[str, Any] | None = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RetinaFaceModule)
        network = pl_module.network
        if not isinstance(network, RetinaFace):
            raise InputError("sparsity: the network is quantized already; it belongs in a stage before pruning")
        training = network.training
        resting = [parameter for parameter in network.parameters() if not parameter.requires_grad]
        network.requires_grad_(True)  # the dependencies are followed along the gradients
        self._pruner = self._make_pruner(network, pl_module.device)
        for parameter in resting:
            parameter.requires_grad_(False)
        network.train(training)  # following the dependencies leaves it in evaluation mode
        if self._restored is not None:
            if (self._restored.get("method"), self._restored.get("keep")) != (self.method, list(self.keep)):
                raise InputError(
                    f"{trainer.ckpt_path}: was trained with another method or keep of the sparsity, which cannot "
                    "change within a fit; set what it began with"
                )
            if self.method == "growing":
                self._pruner.group_reg = dict(zip(self._pruner.group_reg, self._restored["strengths"], strict=True))

    def _make_pruner(self, network: RetinaFace, device: torch.device) -> Any:  # noqa: ANN401
        example = example_input().to(device)
        kept = [network.get_submodule(name) for name in modules_below(network, self.keep, "sparsity: keep")]
        ignored = [*heads(network), *kept]
        if self.method == "group_lasso":
            return tp.pruner.GroupNormPruner(
                network, example, _scores_that_differ, reg=self.strength, ignored_layers=ignored
            )
        return tp.pruner.GrowingRegPruner(
            network, example, _scores, reg=self.strength, delta_reg=self.strength, ignored_layers=ignored
        )

    def _grown(self) -> list[Tensor]:
        """How hard each channel of each group is pulled by now; nothing with ``group_lasso``."""
        return [] if self._pruner is None or self.method == "group_lasso" else [*self._pruner.group_reg.values()]

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._pruner.regularize(pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.method == "growing":
            self._pruner.update_reg()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"method": self.method, "keep": list(self.keep), "strengths": self._grown()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict


def _scores(group: tp.Group) -> Tensor:
    """How much each channel of a group matters, ``(C,)``, 1 on average; 0 where all weights are, as none does."""
    scores: Tensor = tp.importance.MagnitudeImportance(p=2)(group)
    return scores.nan_to_num(0.0)


def _scores_that_differ(group: tp.Group) -> Tensor:
    """As :func:`_scores`, but NaN where none is the weakest: such groups Torch-Pruning leaves alone.

    It divides by the difference between the strongest and the weakest, of their square roots.
    """
    scores = _scores(group)
    weakest, strongest = scores.aminmax()
    return torch.where(weakest.sqrt() < strongest.sqrt(), scores, torch.nan)
