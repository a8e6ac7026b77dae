"""Reading files of weights, and those that others published."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from retinaface.errors import InputError
from retinaface.model.network import PYRAMID_CHANNELS, Activation, Backbone, NetworkConfig, RetinaFace
from retinaface.whole_file import whole_file

DAMAGED = (
    "damaged, its checksums do not fit its content; restore it, or start without it (if it was saved without any, by "
    "torch.serialization.set_crc32_options: save it anew)"
)

Rename = tuple[str, str | Callable[[re.Match[str]], str]]

# Module names of the public files and what they are called here.
_RENAMES: list[Rename] = [
    (r"^body\.", "backbone."),
    (r"^fpn\.output(\d)\.", lambda m: f"fpn.lateral.{int(m[1]) - 1}."),
    (r"^fpn\.merge(\d)\.", lambda m: f"fpn.merge.{int(m[1]) - 1}."),
    (r"^ssh(\d)\.", lambda m: f"ssh.{int(m[1]) - 1}."),
    (r"^(ssh\.\d)\.conv([357])[Xx]\2", r"\1.conv\2"),
    (r"^ClassHead\.(\d)\.conv1x1\.", r"class_heads.\1."),
    (r"^BboxHead\.(\d)\.conv1x1\.", r"box_heads.\1."),
    (r"^LandmarkHead\.(\d)\.conv1x1\.", r"landmark_heads.\1."),
]


def read_torch_file(path: Path | str, mmap: bool = False) -> Any:  # noqa: ANN401  whatever the file holds
    """Reads a torch file onto the CPU without running code from it (``weights_only=True``).

    Args:
        path: The file.
        mmap: Whether tensors stay in the file until they are used; only for files that ``torch.save`` writes today.
            Then their content is not checked, see :func:`is_whole`.

    Raises:
        InputError: The file is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a checkpoint (.pth or .ckpt)")
    if path.suffix.lower() == ".onnx":
        raise InputError(f"{path}: is an ONNX file; expected a checkpoint (.pth or .ckpt)")
    if not mmap and is_zipfile(path) and not is_whole(path):
        raise InputError(f"{path}: {DAMAGED}{_way_out(path)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever the bytes of another kind of file make of the unpickler
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path}: not a checkpoint that can be read safely ({reason[:160]}); expected a file written by torch.save "
            f"that holds only tensors and plain values{_way_out(path)}"
        ) from error


def _way_out(path: Path) -> str:
    """What else to do about a damaged file that has the one before it beside it."""
    previous = path.with_name(f"{path.name}.previous")
    if not previous.is_file():
        return ""
    return f"; {previous.name} is the one before, from which compress.py goes on when the stage's ONNX file is deleted"


def write_torch_file(content: object, path: Path) -> None:
    """Writes what :func:`read_torch_file` reads, whole or not at all; makes the folder if need be.

    Raises:
        OSError: It cannot be written.
    """
    written = io.BytesIO()  # on a full disk torch.save itself would raise something else
    torch.save(content, written)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_bytes(written.getbuffer())


def is_whole(path: Path) -> bool:
    """Whether a file that ``torch.save`` writes today is there with all its content unchanged.

    Its checksums fit then, which torch does not look at.
    """
    try:
        with ZipFile(path) as content:
            return content.testzip() is None
    except Exception:  # zipfile raises several kinds for what is damaged
        return False


def load_pretrained(path: Path | str, activation: Activation = "leaky_relu") -> RetinaFace:
    """Loads one of the widely used public RetinaFace files.

    Args:
        path: A state dict, bare or under the key ``state_dict``, with or without the prefix ``module.``, with the
            public key names (``body.``, ``fpn.``, ``ssh1.``, ``ClassHead.0.conv1x1.`` ...). The backbone is inferred.
        activation: Activation of the network to build; anything but the published one changes its outputs.

    Returns:
        The network in evaluation mode.

    Raises:
        InputError: The file cannot be read or does not match the network entirely.
    """
    state = _state_dict(path)
    backbone = _infer_backbone(path, state)
    network = RetinaFace(NetworkConfig(backbone, activation=activation, channels=_infer_channels(state, backbone)))
    load_matching(network, state, str(path))
    return network.eval()


def load_matching(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads a state dict that must match the module entirely.

    Raises:
        InputError: Naming missing, unexpected and mis-shaped keys.
    """
    own = module.state_dict()
    # Files saved before torch 0.4.1 do not count batches; the count is only used with momentum=None.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if keys
    ]
    if problems:
        raise InputError(
            f"{source}: does not fit this network: {'; '.join(problems)}; give a checkpoint of the same network"
        )
    module.load_state_dict(dict(state), strict=False)


def load_imagenet_backbone(network: RetinaFace, weights: Path | str) -> None:
    """Loads ImageNet weights into the backbone.

    Args:
        network: Changed in place.
        weights: A file with the backbone's weights, or ``imagenet`` for torchvision's (ResNet-50; downloaded once).

    Raises:
        InputError: No such weights, no network to download them, or weights of another backbone.
    """
    if str(weights) == "imagenet":
        state = _torchvision_resnet50(network)
    else:
        state = {re.sub(r"^(module\.)?(body\.)?", "", key): value for key, value in _state_dict(weights, ()).items()}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    load_matching(network.backbone, state, str(weights))


def _torchvision_resnet50(network: RetinaFace) -> dict[str, Tensor]:
    from torchvision.models import ResNet50_Weights  # type: ignore[import-untyped]

    if network.config.backbone != "resnet50":
        raise InputError("imagenet: torchvision has no mobilenet0.25 weights; give a file with them, or none")
    try:
        state: dict[str, Tensor] = ResNet50_Weights.IMAGENET1K_V2.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, or an incomplete file
        raise InputError(
            f"imagenet: could not download {ResNet50_Weights.IMAGENET1K_V2.url} ({error}); fetch it by hand and give "
            "the file's path instead"
        ) from error
    # Those weights expect RGB divided by 255 and by the deviations; here come BGR values on the 0-255 scale.
    deviation = torch.tensor([0.225, 0.224, 0.229]).view(1, 3, 1, 1) * 255
    state["conv1.weight"] = state["conv1.weight"].flip(1) / deviation
    return state


def _state_dict(path: Path | str, renames: Sequence[Rename] = tuple(_RENAMES)) -> dict[str, Tensor]:
    content = read_torch_file(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path}: holds no state dict; expected a mapping from parameter names to tensors")
    state = {}
    for key, value in content.items():
        name = str(key).removeprefix("module.")
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    return state


def _infer_backbone(path: Path | str, state: Mapping[str, Tensor]) -> Backbone:
    if "backbone.stage1.0.0.weight" in state:
        return "mobilenet0.25"
    if "backbone.layer1.0.conv1.weight" in state:
        return "resnet50"
    raise InputError(
        f"{path}: not a RetinaFace checkpoint with a mobilenet0.25 or ResNet-50 backbone (keys such as "
        f"{', '.join(list(state)[:3])}); expected keys such as body.stage1.0.0.weight or body.layer1.0.conv1.weight"
    )


def _infer_channels(state: Mapping[str, Tensor], backbone: Backbone) -> int:
    lateral = state.get("fpn.lateral.0.0.weight")
    return PYRAMID_CHANNELS[backbone] if lateral is None else int(lateral.shape[0])
