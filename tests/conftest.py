"""Fixtures that tests of several rooms share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before anything imports albumentations
# Tiny tensors gain nothing from threads, and on a busy machine threads that wait for each other cost a hundredfold.
os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch, and for the processes that tests start

import torch
from torch import nn

from retinaface.compression.structure import Structure
from retinaface.data.synthetic import write_synthetic_root
from retinaface.model.network import NetworkConfig, RetinaFace

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring for tiny pictures, and sums in another order differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    """Every test starts from the same seed, restores the environment, and leaves no folder in the checkout."""
    torch.manual_seed(0)
    environment = dict(os.environ)
    folders = _folders()
    yield
    os.environ.clear()
    os.environ.update(environment)
    left = sorted(_folders() - folders)
    assert not left, f"the test left {', '.join(left)} in the checkout"


def _folders() -> set[str]:
    return {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}


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


def save_network(network: RetinaFace, path: Path) -> Path:
    """Writes that part of a training checkpoint which the next stage reads."""
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"structure": Structure(network.config).to_plain(), "state_dict": weights}, path)
    return path


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[[RetinaFace, Path], Path]:
    """The function :func:`save_network`."""
    return save_network


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the network of ``tiny_network``."""
    return save_network(make_network(channels=16), tmp_path_factory.mktemp("checkpoint") / "tiny.ckpt")
