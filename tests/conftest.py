"""Fixtures that tests of several rooms share."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier, get_ident
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before anything imports albumentations
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start; see _one_thread

import onnx
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization.pt2e import qat_utils

from retinaface.compression import quantization
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

# A shell's background job ignores Ctrl-C, and hands that on to the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(autouse=True, scope="session")
def prepare_for_int8_sooner() -> Iterator[dict[tuple[ModuleType, str], Any]]:
    """Leaves out what takes most of the time of preparing a network for INT8 and always ends the same.

    Networks of one shape are traced once, without their weights, and torchao does not look for kinds of convolutions
    that no network here has. Gives what it takes the place of, by module and name.
    """
    graphs: dict[object, GraphModule] = {}
    trace, fuse = quantization._trace, qat_utils._fuse_conv_bn_qat_helper

    def trace_once(network: RetinaFace) -> GraphModule:
        state = network.state_dict()
        shape = (network.config, *((name, value.shape) for name, value in state.items()))
        if shape not in graphs:
            graphs[shape] = trace(network)
        graph = deepcopy(graphs[shape])
        graph.load_state_dict(state)
        return graph

    def fuse_two_dimensional(graph: GraphModule, convolution: object, *args: Any, **options: Any) -> GraphModule:
        return fuse(graph, convolution, *args, **options) if convolution is F.conv2d else graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "_trace", trace_once)
        patch.setattr(qat_utils, "_fuse_conv_bn_qat_helper", fuse_two_dimensional)
        yield {(quantization, "_trace"): trace, (qat_utils, "_fuse_conv_bn_qat_helper"): fuse}


@pytest.fixture(autouse=True)
def _leave_nothing_behind() -> Iterator[None]:
    """Every test starts from the same seed, restores the environment, and leaves nothing in the checkout."""
    torch.manual_seed(0)
    environment = dict(os.environ)
    names = _names()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():  # Lightning ignores SIGINT from the first one on
        signal.signal(number, handler)
    torch.set_num_threads(1)  # where the test chose another number
    os.environ.clear()
    os.environ.update(environment)
    left = sorted(_names() - names)
    assert not left, f"the test left {', '.join(left)} in the checkout"


def _names() -> set[str]:
    return {path.name for path in ROOT.iterdir()} - CACHES


@pytest.fixture
def in_own_process() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process of its own, for tests in which a loader process dies.

    torch tells of it in whatever Python does when any child process ends, so long as the loader exists. Not forked:
    threads that hold locks here would hold them there for ever.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result(timeout=120)


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
def onnx_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``float``: the network of ``tiny_network``; ``int8``: that of ``compressed``."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of the processes that share the tests writes them for all
        place = place.parent
    folder = place / "onnx" / "new folder"
    with FileLock(place / "onnx.lock"):
        if not (folder / "float.onnx").exists():
            export_onnx(request.getfixturevalue("compressed").int8, folder / "int8.onnx")
            export_onnx(make_network(channels=16).train(), folder / "float.onnx")
    return {path.stem: path for path in folder.iterdir()}


class NoWaiting(TorchDispatchMode):
    """Fails where the device would have to finish before Python can go on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket._qualified_op_name
        assert name not in {
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::is_nonzero",
            "aten::equal",
            "aten::unique_dim",
            "aten::_unique2",
        }, f"{name} waits for the device"
        if name == "aten::index":
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), (
                "boolean indexing waits"
            )
        return function(*args, **(kwargs or {}))


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a size, such as ``16k``: one that really gets full, which only root may make."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root can mount a small disk, where that is allowed")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> NoWaiting:
    """A context in which nothing may wait for the device, with the loss as it is on a GPU."""
    monkeypatch.setattr("retinaface.model.losses._most_wanted", lambda _, anchors: anchors)
    return NoWaiting()


@pytest.fixture
def in_two_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """Calls a function once with each of two arguments, in threads that take each other for another process."""
    barrier, given = Barrier(2, timeout=60), {}

    def all_reduce(counts: Tensor) -> None:
        given[get_ident()] = counts.clone()
        barrier.wait()
        total = sum(given.values())
        barrier.wait()
        counts.copy_(total)

    always = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=all_reduce
    )
    monkeypatch.setattr("retinaface.model.losses.distributed", always)

    def run(function: Callable[..., Tensor], *arguments: object) -> list[Tensor]:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(function, arguments))

    return run


@pytest.fixture
def quick_export(onnx_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export gives the network of ``tiny_network``, at once instead of in seconds."""
    model = onnx.load(onnx_files["float"])
    del model.metadata_props[:]
    content = model.SerializeToString()
    monkeypatch.setattr("retinaface.delivery.export._to_onnx", lambda form: onnx.ModelProto.FromString(content))


@contextmanager
def _wandb_offline(folder: Path) -> Iterator[Callable[[], list["WandbRun"]]]:
    import wandb

    def read() -> list[WandbRun]:
        wandb.finish()
        wandb.teardown()  # all is on the disk only then
        return [WandbRun.read(file) for file in sorted(folder.rglob("offline-run-*/*.wandb"))]

    wandb.teardown()  # what it knows of the environment, another test may have had it ask for
    home = folder / "wandb_home"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
            patch.setenv(f"WANDB_{name}", str(home))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("NETRC", str(home / "none"))
        for name in ("exit", "excepthook"):  # wandb puts its own in their place and leaves them there
            patch.setattr(sys, name, getattr(sys, name))
        yield read
        wandb.teardown()


@pytest.fixture(scope="session")
def start_wandb_offline() -> Callable[[Path], AbstractContextManager[Callable[[], list["WandbRun"]]]]:
    """A context in which nobody is logged in, and a folder takes what W&B is sent; it gives a function.

    That reads the runs back, in their order.
    """
    return _wandb_offline


@pytest.fixture
def wandb_offline(tmp_path: Path) -> Iterator[Callable[[], list["WandbRun"]]]:
    """The context of ``start_wandb_offline`` around a test, in its folder."""
    with _wandb_offline(tmp_path) as read:
        yield read


@dataclass
class WandbRun:
    """What an offline run of W&B has on the disk, read with the messages of its own SDK.

    ``history`` holds every value of a name in order; ``made`` and ``used`` are records of artifacts.
    """

    file: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[Any]] = field(default_factory=dict)
    made: list[Any] = field(default_factory=list)
    used: list[Any] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> "WandbRun":
        found = cls(file)
        for record in _wandb_records(file.read_bytes()):
            content = getattr(record, record.WhichOneof("record_type"))
            match record.WhichOneof("record_type"):
                case "run":
                    found.run = content
                    found.config |= _values(content.config.update)
                case "config":
                    found.config |= _values(content.update)
                case "summary":
                    found.summary |= _values(content.update)
                case "history":
                    for name, value in _values(content.item).items():
                        found.history.setdefault(name, []).append(value)
                case "artifact":
                    (found.used if content.use_after_commit else found.made).append(content)
        return found


def _values(items: Any) -> dict[str, Any]:
    """Names to values; a picture or a table is a mapping, of which each entry comes by itself."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, name = item.nested_key or [item.key]
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[name] = json.loads(item.value_json)
    return found


def _wandb_records(content: bytes) -> Iterator[Any]:
    """The messages in a log like LevelDB's: records in blocks of 32 KiB, those that cross a block's end in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, parts = 7, [b""]  # behind the file's own header
    while place + 7 <= len(content):
        left = -place % 32768
        if 0 < left < 7:  # no room for the header of another one
            place += left
            continue
        _, length, part = struct.unpack_from("<IHB", content, place)  # checksum, length, kind of part
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(b"".join(parts))
            parts.clear()
