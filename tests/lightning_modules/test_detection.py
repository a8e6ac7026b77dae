import math
from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from datamodules import WiderFaceDataModule
from lightning_modules import RetinaFaceModule
from lightning_modules.detection import OptimizerSettings, learning_rate_factor, parameter_groups, rate_factors
from retinaface.errors import InputError
from retinaface.evaluation.evaluate import evaluate
from retinaface.model.network import NetworkConfig, normalize
from retinaface.model.postprocess import Detections


@pytest.fixture(scope="module")
def fitted(tiny_root, tmp_path_factory):
    """A module after 2 epochs of 2 steps, its trainer, and its parameters before."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fit")
    module = RetinaFaceModule(NetworkConfig(channels=16), optimizer=OptimizerSettings(warmup=0.5))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[L.pytorch.callbacks.LearningRateMonitor()],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0))
    trainer.save_checkpoint(folder / "saved.ckpt")
    return module, trainer, before, folder


def test_every_parameter_is_trained_and_losses_are_logged(fitted):
    module, trainer, before, _ = fitted
    same = {name for name, value in module.named_parameters() if torch.equal(value, before[name])}
    # These photos are too small for faces of the larger anchors, and biases do not decay.
    assert same <= {f"network.{kind}_heads.{level}.bias" for kind in ("box", "landmark") for level in (1, 2)}
    logged = trainer.callback_metrics
    parts = [float(logged[f"train/{part}"]) for part in ("classes", "boxes", "landmarks")]
    assert all(part > 0 for part in parts)
    assert float(logged["train/loss"]) == pytest.approx(sum(parts), rel=1e-4)
    assert 0 <= logged["val/ap_all"] <= 1


def test_learning_rate_follows_the_schedule(fitted):
    module, _, _, folder = fitted
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("lr-AdamW/pg1")
    rates = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    expected = [module.optimizer.learning_rate * learning_rate_factor(s, 4, module.optimizer) for s in range(4)]
    assert rates == pytest.approx(expected)


def test_schedule_rises_then_falls_to_the_final_rate():
    settings = OptimizerSettings(learning_rate=0.1, final_learning_rate=0.001, warmup=0.1)
    factors = [learning_rate_factor(step, 100, settings) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == factors[9] == factors[10] == 1
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.01 + 0.99 / 2)  # half a cosine, half-way
    assert factors[100] == pytest.approx(0.01)
    assert learning_rate_factor(1000, 100, settings) == pytest.approx(0.01)
    assert math.isfinite(learning_rate_factor(0, 1, settings))


def test_biases_and_norms_do_not_decay(fitted):
    module, trainer, _, _ = fitted
    decayed, free = trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] == module.optimizer.weight_decay
    assert free["weight_decay"] == 0
    assert {p.ndim for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(module.parameters()))


def test_checkpoint_holds_plain_values_and_loads_without_arguments(fitted):
    module, _, _, folder = fitted
    content = torch.load(folder / "saved.ckpt", weights_only=True)
    assert content["structure"]["network"]["channels"] == 16
    loaded = RetinaFaceModule.load_from_checkpoint(folder / "saved.ckpt", map_location="cpu")
    assert loaded.structure.to_plain() == content["structure"] == module.structure.to_plain()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    module.eval()
    for expected, actual in zip(module(images), loaded.eval()(images), strict=True):
        assert torch.equal(expected, actual)


def test_weights_of_another_network_are_refused(tiny_checkpoint):
    for other, name in (
        (NetworkConfig("resnet50"), "backbone"),
        (NetworkConfig(anchor_sizes=((8, 16), (64, 128), (256, 512))), "anchor_sizes"),
    ):
        with pytest.raises(InputError, match=rf"tiny\.ckpt: its {name} .* is not .*; give weights of the same network"):
            RetinaFaceModule(other, weights=str(tiny_checkpoint))
    assert RetinaFaceModule(NetworkConfig(), weights=str(tiny_checkpoint)).structure.network.channels == 16


def test_activation_holds_with_and_without_weights(tiny_checkpoint):
    for start in ({"network": NetworkConfig(channels=16)}, {"weights": str(tiny_checkpoint)}):
        module = RetinaFaceModule(**start, activation="relu")
        assert module.structure.network.activation == "relu"
        assert module.structure.network.channels == 16
        assert not any(isinstance(submodule, torch.nn.LeakyReLU) for submodule in module.network.modules())


def test_leaky_relu_is_kept_where_that_is_wanted(tiny_checkpoint):
    for start in ({"network": NetworkConfig(channels=16)}, {"weights": str(tiny_checkpoint)}):
        module = RetinaFaceModule(**start, activation="relu", keep_leaky_relu=["backbone.*1"])
        leaky = [name for name, part in module.network.named_modules() if isinstance(part, torch.nn.LeakyReLU)]
        assert leaky
        assert all(name.startswith("backbone.stage1.") for name in leaky)
        assert module.structure.network.keep_leaky_relu == module.network.config.keep_leaky_relu == ("backbone.*1",)
    with pytest.raises(InputError, match="keep_leaky_relu says where LeakyReLU stays with activation: relu"):
        RetinaFaceModule(weights=str(tiny_checkpoint), keep_leaky_relu=["backbone.*1"])
    with pytest.raises(InputError, match=r"keep_leaky_relu names backbone\.stage9, which the network does not have"):
        RetinaFaceModule(weights=str(tiny_checkpoint), activation="relu", keep_leaky_relu=["backbone.stage9"])


def test_a_training_without_end_has_no_schedule():
    module = RetinaFaceModule()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, max_epochs=-1, enable_progress_bar=False)
    module.trainer.fit_loop.setup_data = lambda: None
    with pytest.raises(InputError, match=r"trainer\.max_epochs: -1 has no end"):
        module.configure_optimizers()


def test_modules_learn_at_rates_of_their_own(tiny_checkpoint):
    """Over the whole schedule; the last that is named counts, and what is outside of the network learns as usual."""
    rates = {"backbone": 0.1, "backbone.*1": 0.5, "*_heads": 2.0}
    module = RetinaFaceModule(weights=str(tiny_checkpoint), optimizer=OptimizerSettings(0.01, warmup=0.5, rates=rates))
    module.adapters = torch.nn.Conv2d(2, 3, 1)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, max_steps=8, enable_progress_bar=False)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    seen = []
    for _ in range(8):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    names = {parameter: name for name, parameter in module.named_parameters()}
    of = {names[p]: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    assert of.keys() == set(names.values())
    for name, factor in (
        ("network.backbone.stage1.0.0.weight", 0.5),
        ("network.backbone.stage2.0.0.weight", 0.1),
        ("network.backbone.stage3.0.1.bias", 0.1),
        ("network.class_heads.0.weight", 2.0),
        ("network.fpn.merge.0.0.weight", 1.0),
        ("adapters.weight", 1.0),
    ):
        expected = [0.01 * factor * learning_rate_factor(step, 8, module.optimizer) for step in range(8)]
        assert [rates[of[name]] for rates in seen] == pytest.approx(expected), name
    for group in optimizer.param_groups:
        (decays,) = {parameter.ndim > 1 for parameter in group["params"]}
        assert group["weight_decay"] == (module.optimizer.weight_decay if decays else 0)


def test_a_module_with_a_rate_of_0_stays_as_it_is(tiny_root, tiny_checkpoint, quiet_trainer):
    rates = {"backbone.*1": 0.0, "*_heads": 0.0}
    module = RetinaFaceModule(weights=str(tiny_checkpoint), optimizer=OptimizerSettings(0.01, warmup=0.0, rates=rates))
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    quiet_trainer.fit_loop.max_epochs = 2  # the validation in between must not wake it
    quiet_trainer.fit(module, WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0))
    assert quiet_trainer.global_step == 4
    for name, value in module.network.state_dict().items():
        rests = name.startswith("backbone.stage1.") or "_heads." in name
        assert torch.equal(value, before[name]) == rests, name
    assert all(parameter.grad is None for parameter in module.network.backbone.stage1.parameters())


def test_of_several_rates_the_last_says_what_rests(tiny_root, tiny_checkpoint, quiet_trainer):
    rates = {"backbone": 0.0, "backbone.stage3": 1.0, "backbone.stage2": 0.5}
    module = RetinaFaceModule(weights=str(tiny_checkpoint), optimizer=OptimizerSettings(0.01, warmup=0.0, rates=rates))
    quiet_trainer.fit_loop.max_epochs = 1
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    quiet_trainer.fit(module, WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0))
    backbone = {name: value for name, value in module.network.state_dict().items() if name.startswith("backbone.")}
    same = {name for name, value in backbone.items() if torch.equal(value, before[name])}
    assert same == {name for name in backbone if name.startswith("backbone.stage1.")}


def test_fake_quantized_networks_have_the_same_names(compressed):
    rates = {"backbone": 0.1, "ssh.0": 0.3}
    names = []
    for network in (compressed.pruned, compressed.int8):
        factors = rate_factors(network, rates)
        names.append({name: factors.get(p) for name, p in network.named_parameters()})
    expected, actual = names
    assert set(expected.values()) == {0.1, 0.3, None}
    assert {name.removeprefix("graph."): factor for name, factor in actual.items()} == expected


def test_without_rates_there_are_two_groups_in_the_order_of_the_parameters(tiny_network):
    parameters = list(tiny_network.parameters())
    decayed, free = parameter_groups(parameters, {}, OptimizerSettings(0.02, weight_decay=0.1))
    assert [id(p) for p in decayed["params"]] == [id(p) for p in parameters if p.ndim > 1]
    assert [id(p) for p in free["params"]] == [id(p) for p in parameters if p.ndim == 1]
    assert (decayed["lr"], decayed["weight_decay"], free["lr"], free["weight_decay"]) == (0.02, 0.1, 0.02, 0)


@pytest.mark.parametrize(
    ("name", "problem"), [("backbone.stage9", "does not have"), ("backbone.stage1.0.2", "holds no parameters")]
)
def test_rates_of_nothing_are_named(tiny_network, compressed, name, problem):
    networks = (tiny_network,) if problem == "holds no parameters" else (tiny_network, compressed.int8)
    for network in networks:
        with pytest.raises(InputError, match=rf"optimizer: rates names {name}, which .*{problem.split()[-1]}"):
            rate_factors(network, {"fpn": 0.5, name: 0.1})


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0}, {"final_learning_rate": -1}, {"warmup": 1.5}, {"rates": {"fpn": -0.1}}],
    ids=lambda value: next(iter(value)),
)
def test_bad_optimizer_settings_are_named(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        OptimizerSettings(**settings)


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled, and the sizes of the pictures that it ran with; nothing is really compiled."""
    calls = []

    def pretend(function, **options):
        def run(images):
            calls.append((options, tuple(images.shape)))
            return function(images)

        return run

    monkeypatch.setattr(torch, "compile", pretend)
    return calls


def test_training_alone_is_compiled(tiny_root, tiny_checkpoint, quiet_trainer, compiled):
    module = RetinaFaceModule(weights=str(tiny_checkpoint), compile_network=True)
    names = list(module.state_dict())
    quiet_trainer.fit_loop.max_epochs = 1
    quiet_trainer.fit(module, datamodule=WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0))
    assert compiled == [({"dynamic": False}, (4, 3, 64, 64))] * 2
    assert quiet_trainer.callback_metrics["val/ap_all"] >= 0
    assert list(module.state_dict()) == names


@pytest.mark.parametrize("channels_last", [None, True, False])
def test_training_arranges_pictures_in_memory(tiny_checkpoint, channels_last):
    """The values stay the same; the network computes in what it gets, and gives the same but for the last bits."""
    module = RetinaFaceModule(weights=str(tiny_checkpoint), channels_last=channels_last).eval()
    kept = []
    module.network.ssh[0].register_forward_hook(lambda _, images, maps: kept.append(maps))
    batch = {"images": torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)}
    images = module.training_images(batch)
    assert torch.equal(images, normalize(batch["images"]))
    for actual, expected in zip(module.training_outputs(images), module(batch["images"]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for maps in (images, kept[0]):
        assert maps.is_contiguous(memory_format=torch.channels_last) == (channels_last is not False)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tiny_root, tiny_checkpoint, tmp_path, monkeypatch):
    """With a backend that only traces, forward and backward."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: original(*args, backend="aot_eager", **options))
    states = []
    for compiles in (False, True):
        module = RetinaFaceModule(weights=str(tiny_checkpoint), compile_network=compiles)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, datamodule=WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0))
        states.append(module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_of_another_type_are_refused(tiny_root, tiny_checkpoint, tmp_path, precision):
    trainer = L.Trainer(
        accelerator="cpu", precision=precision, fast_dev_run=True, logger=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    data = WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0)
    with pytest.raises(InputError, match=rf"precision {precision} weights are not float32.*bf16-mixed"):
        trainer.fit(RetinaFaceModule(weights=str(tiny_checkpoint)), datamodule=data)


def test_validation_boxes_are_in_the_photos_own_pixels(tiny_checkpoint):
    """With half the scale the same outputs mean boxes of twice the size."""
    module = RetinaFaceModule(weights=str(tiny_checkpoint)).eval()
    seen = []
    module.val_ap.update = lambda ids, found, faces, counted: seen.append((found, faces, counted))
    batch = {
        "images": torch.zeros(1, 3, 64, 96, dtype=torch.uint8),
        "scales": torch.tensor([0.5]),
        "image_ids": torch.tensor([3]),
        "boxes": torch.tensor([[[10.0, 10, 50, 60], [0, 0, 0, 0]]]),
        "labels": torch.tensor([[1, 0]]),
        "counted": {"all": torch.tensor([[True, False]])},
    }
    with torch.no_grad():
        module.validation_step(batch, 0)
        batch["scales"] = torch.tensor([1.0])
        module.validation_step(batch, 0)
    (halved, faces, counted), (whole, _, _) = seen
    assert len(whole[0])
    assert torch.allclose(halved[0][:, :4], 2 * whole[0][:, :4])
    assert torch.equal(halved[0][:, 4], whole[0][:, 4])
    assert faces[0].tolist() == [[10, 10, 50, 60]]  # without padding
    assert counted[0]["all"].tolist() == [True]


@pytest.fixture
def quiet_trainer(tmp_path):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


def test_validation_measures_what_evaluate_does_and_starts_anew_each_time(tiny_root, tiny_checkpoint, quiet_trainer):
    module = RetinaFaceModule(weights=str(tiny_checkpoint))
    data = WiderFaceDataModule(tiny_root, num_workers=0)
    (first,) = quiet_trainer.validate(module, datamodule=data, verbose=False)
    expected = evaluate(tiny_checkpoint, tiny_root).accuracy.ap["all"]
    assert expected > 0
    assert first["val/ap_all"] == pytest.approx(expected, abs=1e-6)
    for head in module.network.class_heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    (second,) = quiet_trainer.validate(module, datamodule=data, verbose=False)
    assert second["val/ap_all"] != first["val/ap_all"]


def test_cudnn_does_not_try_all_its_ways_on_photos_of_every_size(
    tiny_root, tiny_checkpoint, quiet_trainer, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []
    module = RetinaFaceModule(weights=str(tiny_checkpoint))
    module.network.register_forward_hook(
        lambda network, *_: seen.append((network.training, torch.backends.cudnn.benchmark))
    )
    quiet_trainer.fit_loop.max_epochs = 2
    quiet_trainer.fit(module, datamodule=WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0))
    assert set(seen) == {(True, True), (False, False)}


def test_tiny_photos_can_be_validated(tiny_checkpoint):
    """Also by a network that was exported for training in INT8, which takes 33 pixels or more."""
    module = RetinaFaceModule(weights=str(tiny_checkpoint)).eval()
    shapes = []
    module.network.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    batch = {"images": torch.zeros(1, 3, 20, 90, dtype=torch.uint8), "scales": torch.tensor([1.0])}
    with torch.no_grad():
        (found,) = module.predict_step(batch, 0)
    assert shapes == [(1, 3, 64, 90)]
    assert isinstance(found, Detections)


def test_predictions_are_in_the_photos_own_pixels(tiny_checkpoint):
    module = RetinaFaceModule(weights=str(tiny_checkpoint)).eval()
    images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    with torch.no_grad():
        shrunk, whole = module.predict_step({"images": images, "scales": torch.tensor([0.5, 1.0])}, 0)
    assert isinstance(shrunk, Detections)
    assert len(whole.boxes)
    assert torch.allclose(shrunk.boxes, 2 * whole.boxes)
    assert torch.allclose(shrunk.landmarks, 2 * whole.landmarks)
    assert torch.equal(shrunk.scores, whole.scores)


def test_predicts_every_validation_photo(tiny_root, tiny_checkpoint, quiet_trainer):
    module = RetinaFaceModule(weights=str(tiny_checkpoint))
    batches = quiet_trainer.predict(module, datamodule=WiderFaceDataModule(tiny_root, val_batch_size=2, num_workers=0))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert all(isinstance(found, Detections) for batch in batches for found in batch)
