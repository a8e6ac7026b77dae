import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks import EarlyStopping


class Module(L.LightningModule):
    """Reaches figures that are given, one an epoch; counts epochs."""

    def __init__(self, figures):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.figures = figures
        self.epochs = []

    def training_step(self, batch):
        return self.layer(batch).sum()

    def on_train_epoch_start(self):
        self.epochs.append(self.current_epoch)

    def validation_step(self, batch):
        self.log("ap", self.figures[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(torch.ones(2, 1))

    val_dataloader = train_dataloader


class Killed(L.Callback):
    """Ends the fit where the export would be."""

    def on_fit_end(self, trainer, module):
        raise KeyboardInterrupt


def fit(folder, figures, *more, path=None, **options):
    module = Module(figures)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=len(figures), logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
        callbacks=[EarlyStopping("ap", mode="max", patience=1), *more, ModelCheckpoint(folder, "last")],
    )  # fmt: skip
    trainer.fit(module, ckpt_path=path)
    return module.epochs, trainer.global_step


@pytest.mark.filterwarnings("ignore")
def test_a_stage_that_was_stopped_stays_so_when_it_goes_on_and_says_so(tmp_path, caplog):
    figures = [0.5, 0.4, 0.6, 0.7]
    with pytest.raises(SystemExit), caplog.at_level(logging.INFO):  # what Lightning makes of an interruption
        fit(tmp_path, figures, Killed())
    assert "to train on" not in caplog.text
    with caplog.at_level(logging.INFO):
        assert fit(tmp_path, figures, path=tmp_path / "last.ckpt") == ([], 4)
    assert "this fit was stopped before, and that holds (Monitored metric ap did not improve" in caplog.text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("figures", [[0.5, 0.6, 0.7], [0.5, 0.4, 0.6, 0.7]])
def test_a_stage_that_may_not_stop_yet_goes_on(figures, tmp_path):
    """Interrupted after its second epoch, it trains for as long as it would have."""
    whole = fit(tmp_path, figures, min_epochs=3)
    cut = tmp_path / "cut"

    class KilledInThirdEpoch(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(cut, figures, KilledInThirdEpoch(), min_epochs=3)
    epochs, steps = fit(cut, figures, path=cut / "last.ckpt", min_epochs=3)
    assert ([0, 1, *epochs], steps) == whole
