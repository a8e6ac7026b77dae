"""Decisions that took minutes and rest on timings, in a file: a training that is killed early goes on with them."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from retinaface.errors import InputError
from retinaface.model.checkpoints import read_torch_file, write_torch_file

_T = TypeVar("_T")


def kept_decision(
    file: Path, made_for: Mapping[str, Any], decide: Callable[[], _T], report: Callable[[str], None] = lambda _: None
) -> _T:
    """Takes a decision from a file, or makes it and writes it there at once.

    Args:
        file: Where it is kept; its folder is made if need be. Deleted, it is decided anew.
        made_for: What the decision depends on, as plain values. One that was made for something else, or whose file is
            damaged, is made anew.
        decide: Makes it, of tensors and plain values.
        report: Is told where a file is used or not fit for it.

    Returns:
        The decision.

    Raises:
        InputError: The file cannot be written, or ``decide`` raised one.
    """
    if file.is_file():
        try:
            content = read_torch_file(file)
            if content["made_for"] == made_for:
                report(f"{file}: decided before for this student and these settings; delete it to decide anew")
                decision: _T = content["decision"]
                return decision
            report(f"{file}: was decided for another student or other settings, so it is decided anew")
        except (InputError, KeyError, TypeError):
            report(f"{file}: is damaged, so it is decided anew")
    decision = decide()
    try:
        write_torch_file({"made_for": dict(made_for), "decision": decision}, file)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be written ({error.strerror or error}); make room, or choose another folder"
        ) from error
    return decision


def data_settings(data: object) -> dict[str, str]:
    """What decides which pictures a data module gives, in words."""
    names = ("root", "train_size", "batch_size", "seed", "limit", "labels", "transform")
    return {name: repr(getattr(data, name, None)) for name in names}


def digest(network: nn.Module) -> str:
    """A fingerprint of a network's parameters and buffers, names and shapes included."""
    found = hashlib.sha256()
    for name, value in network.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
