"""Ends a stage when it no longer gets better."""

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override


class EarlyStopping(LightningEarlyStopping):
    """Lightning's, with its arguments; what it has decided holds when the fit is interrupted and goes on.

    Lightning's own forgets it, so a stage that is killed in its export would train for one epoch more. A fit that was
    stopped trains on only without this callback, whatever its arguments, and that is said.
    """

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True
            rank_zero_info(
                f"this fit was stopped before, and that holds ({self.stopping_reason_message}); to train on, give the "
                "same command without callbacks.EarlyStopping (configs/early_stopping.yaml)"
            )
