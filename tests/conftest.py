"""Fixtures that tests of several rooms share."""

import os
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before anything imports albumentations
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start; see _one_thread

import onnx
import torch
from torch import nn

from retinaface.compression.pruning import PruningSettings, apply_plan, make_plan
from retinaface.compression.quantization import (
    FakeQuantizedRetinaFace,
    QuantizationSettings,
    prepare_for_training,
)
from retinaface.compression.structure import Network, Structure
from retinaface.data.synthetic import write_synthetic_root
from retinaface.delivery.export import export_onnx
from retinaface.model.network import NetworkConfig, RetinaFace

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"
CACHES = {".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"}

# Module names here, and those of the widely used public files.
PUBLIC_NAMES = [
    (r"^backbone\.", "body."),
    (r"^fpn\.lateral\.(\d)\.", lambda m: f"fpn.output{int(m[1]) + 1}."),
    (r"^fpn\.merge\.(\d)\.", lambda m: f"fpn.merge{int(m[1]) + 1}."),
    (r"^ssh\.(\d)\.conv7_3\.", lambda m: f"ssh{int(m[1]) + 1}.conv7x7_3."),
    (r"^ssh\.(\d)\.conv(\d)([_.])", lambda m: f"ssh{int(m[1]) + 1}.conv{m[2]}X{m[2]}{m[3]}"),
    (r"^class_heads\.(\d)\.", r"ClassHead.\1.conv1x1."),
    (r"^box_heads\.(\d)\.", r"BboxHead.\1.conv1x1."),
    (r"^landmark_heads\.(\d)\.", r"LandmarkHead.\1.conv1x1."),
]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring for tiny pictures, and sums in another order differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    """Every test starts from the same seed, restores the environment, and leaves nothing in the checkout."""
    torch.manual_seed(0)
    environment = dict(os.environ)
    names = _names()
    yield
    os.environ.clear()
    os.environ.update(environment)
    left = sorted(_names() - names)
    assert not left, f"the test left {', '.join(left)} in the checkout"


def _names() -> set[str]:
    return {path.name for path in ROOT.iterdir()} - CACHES


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of the optional reference weights and photographs."""
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE}")
    return REFERENCE


def make_network(**config: object) -> RetinaFace:
    """Builds a seeded network in evaluation mode whose batch norms do something, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = RetinaFace(NetworkConfig(**config))  # type: ignore[arg-type]
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.3, 0.5),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.6, 1.5),
            ):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return network.eval()


@pytest.fixture(scope="session")
def build_network() -> Callable[..., RetinaFace]:
    """The function :func:`make_network`, which takes the fields of ``NetworkConfig``."""
    return make_network


@pytest.fixture
def tiny_network() -> RetinaFace:
    """A narrow mobilenet0.25 network with seeded weights, in evaluation mode."""
    return make_network(channels=16)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of 8 training and 5 validation photos, 128 pixels wide."""
    return write_synthetic_root(tmp_path_factory.mktemp("photos") / "root", 8, 5, 128)


def save_network(network: Network, path: Path, structure: Structure | None = None) -> Path:
    """Writes that part of a training checkpoint which the next stage reads."""
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    structure = structure or Structure(network.config)
    torch.save({"structure": structure.to_plain(), "state_dict": weights}, path)
    return path


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[[RetinaFace, Path], Path]:
    """The function :func:`save_network`."""
    return save_network


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the network of ``tiny_network``."""
    return save_network(make_network(channels=16), tmp_path_factory.mktemp("checkpoint") / "tiny.ckpt")


def _public_state(network: nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in network.state_dict().items():
        for pattern, replacement in PUBLIC_NAMES:
            key = re.sub(pattern, replacement, key)
        state[key] = value
    return state


@pytest.fixture(scope="session")
def public_state() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    """A function that gives a network's weights under the names of the public files."""
    return _public_state


class Compressed(NamedTuple):
    """A network with ReLU on its way down."""

    original: RetinaFace
    pruned: RetinaFace
    int8: FakeQuantizedRetinaFace
    structure: Structure


@pytest.fixture(scope="session")
def compressed() -> Compressed:
    """A pruned network and the same prepared for INT8 with heads, pyramid and first convolution in float."""
    original = make_network(channels=32, activation="relu")
    pruned, plan = deepcopy(original), make_plan(original, PruningSettings(ratio=0.4))
    apply_plan(pruned, plan)
    settings = QuantizationSettings(keep_float=("*_heads", "backbone.*1.0", "fpn"), averaging=0.5)
    quantized = prepare_for_training(pruned, settings).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(3):
            quantized(torch.rand(2, 3, 64, 96, generator=generator) * 255 - 110)
    return Compressed(original, pruned, quantized.eval(), Structure(original.config, [plan], settings))


@pytest.fixture(scope="session")
def checkpoint_files(tmp_path_factory: pytest.TempPathFactory, compressed: Compressed) -> dict[str, Path]:
    """``public`` and ``float``: the network of ``tiny_network``; ``pruned`` and ``int8``: those of ``compressed``."""
    folder = tmp_path_factory.mktemp("checkpoints")
    network = make_network(channels=16)
    torch.save(_public_state(network), folder / "public.pth")
    save_network(network, folder / "float.ckpt")
    save_network(compressed.pruned, folder / "pruned.ckpt", replace(compressed.structure, quantization=None))
    save_network(compressed.int8, folder / "int8.ckpt", compressed.structure)
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def onnx_files(tmp_path_factory: pytest.TempPathFactory, compressed: Compressed) -> dict[str, Path]:
    """``float``: the network of ``tiny_network``; ``int8``: that of ``compressed``."""
    folder = tmp_path_factory.mktemp("onnx") / "new folder"
    export_onnx(make_network(channels=16).train(), folder / "float.onnx")
    export_onnx(compressed.int8, folder / "int8.onnx")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def quick_export(onnx_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export gives the network of ``tiny_network``, at once instead of in seconds."""
    model = onnx.load(onnx_files["float"])
    del model.metadata_props[:]
    content = model.SerializeToString()
    monkeypatch.setattr("retinaface.delivery.export._to_onnx", lambda form: onnx.ModelProto.FromString(content))
