from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser

from datamodules import SyntheticFacesDataModule, WiderFaceDataModule
from retinaface.data.transforms import TransformOptions
from retinaface.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def test_renders_once_and_then_behaves_like_any_root(tmp_path):
    datamodule = SyntheticFacesDataModule(
        tmp_path / "root", train_photos=5, val_photos=2, photo_size=64, train_size=64, batch_size=2, num_workers=0
    )
    datamodule.prepare_data()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*.jpg")}
    assert len(before) == 7
    datamodule.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    datamodule.setup("fit")
    (batch,) = list(datamodule.val_dataloader())
    assert batch["images"].shape == (2, 3, 64, 64)
    plain = WiderFaceDataModule(tmp_path / "root", train_size=64, batch_size=2, num_workers=0)
    plain.setup("fit")
    for one, two in zip(datamodule.train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(one["images"], two["images"])


def test_photo_seed_gives_other_photos_and_seed_does_not(tmp_path):
    def photos(**seeds):
        root = tmp_path / str(seeds)
        datamodule = SyntheticFacesDataModule(root, train_photos=1, val_photos=1, photo_size=64, **seeds)
        datamodule.prepare_data()
        return [path.read_bytes() for path in sorted(root.rglob("*.jpg"))]

    assert photos(seed=1) == photos(seed=2)
    assert photos(photo_seed=1) != photos(photo_seed=2)


def test_impossible_number_of_photos(tmp_path):
    with pytest.raises(InputError, match="train >= 1"):
        SyntheticFacesDataModule(tmp_path / "root", train_photos=0).prepare_data()


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_build(config):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    datamodule = parser.instantiate(parser.parse_args(["--config", str(config)])).data
    assert type(datamodule).__name__.lower().startswith(config.stem.replace("_", ""))
    if config.stem == "wider_face":  # the file that explains the options shows their defaults
        assert datamodule.transform == TransformOptions()
