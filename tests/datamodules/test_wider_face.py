import shutil
import warnings
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from datamodules import WiderFaceDataModule
from retinaface.data.annotations import read_image
from retinaface.data.synthetic import write_synthetic_root
from retinaface.data.transforms import TransformOptions
from retinaface.errors import InputError, one_line


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_synthetic_root(tmp_path_factory.mktemp("data") / "root", train=13, val=5, size=96)


@pytest.fixture
def own_root(root, tmp_path):
    """A root that a test may damage."""
    return shutil.copytree(root, tmp_path / "root")


def trainer_of(rank, world_size):
    """As much of a trainer as the loaders look at."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(
        global_rank=rank,
        is_global_zero=rank == 0,
        world_size=world_size,
        num_devices=world_size,
        overfit_batches=0,
        fit_loop=fit_loop,
    )


def make(root, stage="fit", rank=0, world_size=1, **options):
    options = {"train_size": 64, "batch_size": 4, "num_workers": 0, **options}
    datamodule = WiderFaceDataModule(root, **options)
    datamodule.setup(stage)
    if world_size > 1:
        datamodule.trainer = trainer_of(rank, world_size)
    return datamodule


def epoch_of(datamodule, epoch=0):
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        for key, value in one.items():
            assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key], key


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_training_batches_are_as_agreed(root):
    batches = epoch_of(make(root))
    assert len(batches) == 3  # the 13th photo would not fill a batch
    for batch in batches:
        count = batch["labels"].shape[1]
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        assert {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()} == {
            "images": ((4, 3, 64, 64), torch.uint8),
            "boxes": ((4, count, 4), torch.float32),
            "landmarks": ((4, count, 5, 2), torch.float32),
            "has_landmarks": ((4, count), torch.bool),
            "labels": ((4, count), torch.int64),
        }
        assert batch["images"].is_contiguous()
        assert batch.keys() - tensors.keys() == {"names", "skipped"}
        assert len(batch["names"]) == 4
        assert batch["skipped"] == []
        assert set(batch["labels"].unique().tolist()) <= {-1, 0, 1}
        assert count >= 1
        assert (batch["labels"] != 0).sum(dim=1).max() in (count, 0)
        assert not batch["boxes"][batch["labels"] == 0].any()
        assert not batch["has_landmarks"][batch["labels"] == 0].any()


def test_same_batches_for_any_number_of_workers(root):
    expected = epoch_of(make(root), epoch=1)
    for workers in (1, 2):
        assert_same(epoch_of(make(root, num_workers=workers), epoch=1), expected)


def test_epochs_seeds_and_repetitions(root):
    datamodule = make(root)
    zeroth, first = epoch_of(datamodule, 0), epoch_of(datamodule, 1)
    assert not torch.equal(zeroth[0]["images"], first[0]["images"])
    assert_same(epoch_of(make(root), 1), first)  # a resumed run starts with a fresh datamodule
    assert not torch.equal(epoch_of(make(root, seed=1), 1)[0]["images"], first[0]["images"])


def test_a_photo_looks_different_in_each_epoch(root):
    dataset = make(root).train_dataloader().dataset
    pictures = {dataset[epoch * len(dataset)]["image"].tobytes() for epoch in range(4)}
    assert len(pictures) == 4


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_disjoint_photos(root, world_size):
    draws = []
    for rank in range(world_size):
        loader = make(root, rank=rank, world_size=world_size).train_dataloader()
        loader.sampler.set_epoch(2)
        draws.append(list(loader.sampler))
    assert len({len(own) for own in draws}) == 1
    everything = [draw for own in draws for draw in own]
    assert len(set(everything)) == len(everything) == 13 // world_size * world_size
    assert all(2 * 13 <= draw < 3 * 13 for draw in everything)


def test_ranks_validate_every_photo_and_as_many_each(root):
    loaders = [make(root, "validate", rank=rank, world_size=2).val_dataloader() for rank in (0, 1)]
    ids = [[int(batch["image_ids"]) for batch in loader] for loader in loaders]
    assert len(ids[0]) == len(ids[1]) == 3
    assert set(ids[0] + ids[1]) == set(range(5))


def test_validation_batches_are_whole_photos(root):
    datamodule = make(root, "validate", val_batch_size=2)
    batches = list(datamodule.val_dataloader())
    assert [batch["images"].shape[0] for batch in batches] == [2, 2, 1]
    position = 0
    for batch in batches:
        assert batch["images"].dtype == torch.uint8
        for row in range(len(batch["names"])):
            sample = datamodule.val_samples[position]
            faces = len(sample.boxes)
            picture = batch["images"][row].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(picture, read_image(sample.path))
            assert batch["sizes"][row].tolist() == [96, 96]
            assert float(batch["scales"][row]) == 1.0
            assert int(batch["image_ids"][row]) == position
            assert batch["names"][row] == sample.name
            np.testing.assert_array_equal(batch["boxes"][row, :faces].numpy(), sample.boxes)
            assert batch["labels"][row].tolist() == [1] * faces + [0] * (batch["labels"].shape[1] - faces)
            assert batch["counted"]["all"][row, :faces].tolist() == sample.counted["all"].tolist()
            assert not batch["counted"]["all"][row, faces:].any()
            position += 1
    for loader in (datamodule.test_dataloader(), datamodule.predict_dataloader()):
        assert loader.dataset.samples == datamodule.val_samples


def test_validation_photos_shrink_to_val_size_but_never_grow(root):
    batch = next(iter(make(root, "validate", val_size=48).val_dataloader()))
    assert batch["images"].shape == (1, 3, 48, 48)
    assert float(batch["scales"]) == 0.5
    whole = next(iter(make(root, "validate").val_dataloader()))
    assert torch.equal(batch["boxes"], whole["boxes"])  # boxes stay in the photo's own pixels
    grown = next(iter(make(root, "validate", val_size=500).val_dataloader()))
    assert torch.equal(grown["images"], whole["images"])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_photos_are_replaced_and_named_once(own_root, workers):
    expected = epoch_of(make(own_root))
    datamodule = make(own_root, num_workers=workers)
    broken = [str(datamodule.train_samples[index].path) for index in (2, 3)]
    for index in (2, 3):
        truncate(datamodule.train_samples[index].path)
    batches = epoch_of(datamodule)
    assert [batch["images"].shape for batch in batches] == [batch["images"].shape for batch in expected]
    skipped = [path for batch in batches for path in batch["skipped"]]
    assert set(skipped) <= set(broken)
    assert broken[0] in skipped or broken[1] in skipped
    assert_same(epoch_of(make(own_root)), batches)  # deterministic
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in [*batches, *epoch_of(datamodule, 1), *epoch_of(datamodule, 2)]:
            assert datamodule.on_after_batch_transfer(batch, 0) is batch
    assert datamodule.skipped_files == set(broken)
    messages = [str(warning.message) for warning in caught if "takes its place" in str(warning.message)]
    assert len(messages) == 2
    assert "(2 such files so far)" in messages[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_photo_is_a_one_line_error_in_validation(own_root, workers):
    datamodule = make(own_root, "validate", num_workers=workers)
    path = datamodule.val_samples[1].path
    truncate(path)
    with pytest.raises(InputError) as error:
        list(datamodule.val_dataloader())
    assert one_line(error.value).startswith(f"{path}: truncated or not a picture")


def test_unreadable_validation_photos_are_found_before_training(own_root):
    datamodule = make(own_root, "validate")
    for sample in datamodule.val_samples[1:3]:
        truncate(sample.path)
    with pytest.raises(InputError, match=r"truncated or not a picture.*and 1 more") as error:
        make(own_root, "fit")
    assert str(datamodule.val_samples[1].path) in str(error.value)


def test_overfit_batches_says_what_to_use(root):
    datamodule = make(root)
    datamodule.trainer = SimpleNamespace(global_rank=0, world_size=1, num_devices=1, overfit_batches=1)
    with pytest.raises(InputError, match=r"data\.init_args\.limit"):
        datamodule.train_dataloader()


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_training_photo_is_a_one_line_error(own_root, workers):
    datamodule = make(own_root, num_workers=workers)
    for sample in datamodule.train_samples:
        truncate(sample.path)
    with pytest.raises(InputError, match="all other 12 training photos are unreadable") as error:
        epoch_of(datamodule)
    assert one_line(error.value).startswith(str(own_root))


def test_too_large_batch_says_what_to_set(root):
    with pytest.raises(InputError, match="set batch_size to at most 13"):
        make(root, batch_size=14).train_dataloader()
    with pytest.raises(InputError, match="set batch_size to at most 6"):
        make(root, batch_size=7, world_size=2).train_dataloader()


def test_photos_faces_and_photos_without_faces_are_counted_once(own_root, caplog):
    file = own_root / "wider_face_split" / "label_train.txt"
    before, _, last = file.read_text().rpartition("# ")
    file.write_text(f"{before}# {last.splitlines()[0]}\n")  # the last photo loses its faces
    with caplog.at_level("INFO"):
        datamodule = make(own_root)
        datamodule.setup("fit")
        datamodule.setup("validate")
    faces = [int(sample.counted["all"].sum()) for sample in datamodule.train_samples]
    train, val = (record.getMessage() for record in caplog.records)
    assert train == f"{own_root}: 13 photos ({faces.count(0)} without faces) with {sum(faces)} faces to train on"
    assert faces[-1] == 0
    assert val.startswith(f"{own_root}: 5 photos (")


def test_limit_keeps_the_first_photos(root):
    datamodule = make(root, limit=4)
    assert [sample.name for sample in datamodule.train_samples] == [
        sample.name for sample in make(root).train_samples[:4]
    ]
    assert len(datamodule.val_samples) == 4


def test_stages_load_what_they_need(root, own_root):
    assert make(root, "validate").train_samples == []
    shutil.rmtree(own_root / "WIDER_train")
    for stage in ("test", "predict"):
        assert len(make(own_root, stage).val_samples) == 5
    with pytest.raises(InputError, match=r"WIDER_train/images: no such folder"):
        make(own_root, "fit")
    with pytest.raises(InputError, match="no such folder"):
        make(own_root / "nowhere")


@pytest.mark.parametrize(
    "wrong",
    [{"train_size": 0}, {"val_size": 8}, {"batch_size": 0}, {"val_batch_size": -1}, {"num_workers": -1}, {"limit": 0}],
)
def test_impossible_numbers_are_named(root, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        WiderFaceDataModule(root, **wrong)


class Recorder(L.LightningModule):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.sums: list[int] = []
        self.validated: list[str] = []

    def training_step(self, batch, _):
        self.sums.append(int(batch["images"].sum()))
        return self.weight.sum() * batch["images"].float().mean()

    def validation_step(self, batch, _):
        self.validated += batch["names"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_for(tmp_path, epochs, **options):
    return L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, default_root_dir=tmp_path, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*takes its place")
def test_a_resumed_fit_sees_what_an_uninterrupted_one_sees(own_root, tmp_path):
    whole, first, second = Recorder(), Recorder(), Recorder()
    truncate(make(own_root).train_samples[0].path)
    datamodule = make(own_root, num_workers=1)
    trainer_for(tmp_path, 3).fit(whole, datamodule)
    assert len(set(whole.sums)) == 9
    assert len(whole.validated) == 15
    assert len(datamodule.skipped_files) == 1
    trainer = trainer_for(tmp_path, 1)
    trainer.fit(first, make(own_root))
    trainer.save_checkpoint(tmp_path / "first.ckpt", weights_only=False)
    trainer_for(tmp_path, 3).fit(second, make(own_root), ckpt_path=tmp_path / "first.ckpt")
    assert first.sums + second.sums == whole.sums


class Crash(L.Callback):
    """Saves a checkpoint, in a hook after a number of steps, and ends the fit there."""

    def __init__(self, hook, step, path):
        self.step, self.path = step, path
        setattr(self, hook, self._crash)

    def _crash(self, trainer, *_):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("crash")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    "options", [{}, {"limit_train_batches": 2}, {"val_check_interval": 1}, {"check_val_every_n_epoch": 2}]
)
@pytest.mark.parametrize(
    ("hook", "step", "workers"),
    [("on_train_batch_end", 1, 2), ("on_train_batch_end", 3, 0), ("on_train_batch_end", 4, 0),
     ("on_before_backward", 1, 2), ("on_before_backward", 3, 0), ("on_train_epoch_end", 3, 0)],
)  # fmt: skip
def test_a_fit_resumed_within_an_epoch_continues_the_stream(root, tmp_path, hook, step, workers, options):
    """Three batches an epoch: a crash within a step, after one, at the end of an epoch; in the first and the second."""
    if "limit_train_batches" in options and hook == "on_train_epoch_end":
        step = 2
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer_for(tmp_path, 2, **options).fit(whole, make(root))
    trainer = trainer_for(tmp_path, 2, **options)
    trainer.callbacks.append(Crash(hook, step, tmp_path / "step.ckpt"))
    with pytest.raises(RuntimeError, match="crash"):
        trainer.fit(first, make(root, num_workers=workers))
    trainer = trainer_for(tmp_path, 2, **options)
    trainer.fit(second, make(root, num_workers=workers), ckpt_path=tmp_path / "step.ckpt")
    finished = first.sums[:step]  # the step within which it crashed is done again
    assert finished + second.sums == whole.sums
    assert trainer.global_step == len(whole.sums)
    assert torch.equal(second.weight, whole.weight)


def test_configuration_reaches_the_transform(root):
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    arguments = ["--data=datamodules.WiderFaceDataModule", f"--data.root={root}", "--data.transform.flip=0.25",
                 "--data.transform.crop_scale=[0.4, 0.9]"]  # fmt: skip
    datamodule = parser.instantiate(parser.parse_args(arguments)).data
    assert datamodule.transform == TransformOptions(flip=0.25, crop_scale=(0.4, 0.9))
    assert datamodule.root == root


@pytest.mark.parametrize("name", ["wider_face", "synthetic_faces"])
def test_every_option_of_the_augmentation_stands_in_the_configuration(name):
    file = Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml"
    transform = yaml.safe_load(file.read_text())["data"]["init_args"]["transform"]
    assert list(transform) == [field.name for field in fields(TransformOptions)]


def test_batches_survive_the_transfer_hook_unchanged(root):
    batch = next(iter(make(root, "validate").val_dataloader()))
    assert make(root, "validate").on_after_batch_transfer(batch, 0) is batch


@pytest.fixture
def photos(root):
    """Photos alone, 13."""
    return root / "WIDER_train" / "images"


def test_photos_without_labels_train_whole_and_are_counted_as_such(photos, caplog):
    with caplog.at_level("INFO"):
        datamodule = make(photos, labels=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"{photos}: 12 photos without labels to train on",
        f"{photos}: 1 photos without labels kept out of training",
    ]
    batches = epoch_of(datamodule)
    assert [batch["labels"].any().item() for batch in batches] == [False] * 3
    assert all(batch["boxes"].shape == (4, 1, 4) for batch in batches)
    assert all(picture.float().std() > 1 for batch in batches for picture in batch["images"])
    # The first crop that is drawn is taken, wherever it is.
    once = make(photos, labels=False, transform=TransformOptions(crop_tries=1))
    assert_same(epoch_of(once), batches)


def test_labelled_validation_photos_are_validated_on(root, caplog):
    with caplog.at_level("INFO"):
        datamodule = make(root, labels=False)
    train, val = (record.getMessage() for record in caplog.records)
    assert train == f"{root}: 13 photos without labels to train on"
    assert val.endswith("faces to validate on")
    assert [sample.name for sample in datamodule.val_samples] == [s.name for s in make(root, "validate").val_samples]


def test_nothing_is_measured_without_labels(photos, tmp_path):
    for stage in ("validate", "test"):
        with pytest.raises(InputError, match="validation photos have no labels, so no accuracy can be measured"):
            make(photos, stage, labels=False)
    assert len(make(photos, "predict", labels=False).predict_dataloader()) == 1
    module = Taught(weight=1.0)
    trainer = trainer_for(tmp_path, 2)
    trainer.fit(module, make(photos, labels=False))
    assert len(module.sums) == 6
    assert module.validated == []
    assert next(tmp_path.rglob("*.ckpt")).is_file()  # which usually waits for the validation


class Taught(Recorder):
    """Looks like a student with a teacher."""

    def __init__(self, weight):
        super().__init__()
        self.teacher = torch.nn.Identity()
        self.distillation = SimpleNamespace(weight=weight)


@pytest.mark.parametrize("module", [Recorder(), Taught(weight=0.7)], ids=["no teacher", "teacher and labels"])
def test_training_on_labels_refuses_photos_without(module, root, photos, tmp_path):
    with pytest.raises(InputError, match=r"labels: false.*distillation\.weight 1\.0") as error:
        trainer_for(tmp_path, 1).fit(module, make(photos, labels=False))
    assert str(error.value).startswith(f"{photos}: ")
    trainer_for(tmp_path, 0).fit(module, make(photos, labels=False))  # trains nothing
    assert module.sums == []
