import torch

from datamodules import WiderFaceDataModule
from lightning_modules import RetinaFaceModule
from lightning_modules.bare_step import make_bare_step
from retinaface.model.network import NetworkConfig


def test_every_step_trains(tiny_root):
    datamodule = WiderFaceDataModule(tiny_root, train_size=64, batch_size=2, num_workers=0)
    datamodule.setup("fit")
    batch = next(iter(datamodule.train_dataloader()))
    module = RetinaFaceModule(NetworkConfig(channels=16))
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    losses = []
    step = make_bare_step(module)
    for _ in range(6):
        step(batch)
        with torch.no_grad():
            images = batch["images"].to(module.device)
            losses.append(float(module.task_loss(module(images), batch).total))
    assert losses[-1] < losses[0]
    moved = [not torch.equal(before[name], parameter.cpu()) for name, parameter in module.named_parameters()]
    assert all(moved)
