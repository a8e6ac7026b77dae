"""What a checkpoint must say, besides weights, for the network to be built again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from retinaface.compression.pruning import Plan, apply_plan
from retinaface.compression.quantization import FakeQuantizedRetinaFace, QuantizationSettings, prepare_for_training
from retinaface.errors import InputError
from retinaface.model.checkpoints import load_matching, load_pretrained, read_torch_file
from retinaface.model.network import Activation, NetworkConfig, RetinaFace, with_activation

Network = RetinaFace | FakeQuantizedRetinaFace

_PREFIX = "network."  # of the weights in a training checkpoint


@dataclass
class Structure:
    """How a network came to its shape.

    Attributes:
        network: The network before compression.
        plans: What each pruning removed, in order.
        quantization: How it was prepared for INT8; None for a float network.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    plans: list[Plan] = field(default_factory=list)
    quantization: QuantizationSettings | None = None

    def to_plain(self) -> dict[str, Any]:
        """As plain values, which load with ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Structure":
        """Inverse of :meth:`to_plain`."""
        quantization = values["quantization"]
        return cls(
            network=NetworkConfig(**values["network"]),
            plans=[[(name, list(indices)) for name, indices in plan] for plan in values["plans"]],
            quantization=None if quantization is None else QuantizationSettings(**quantization),
        )

    def build_float(self) -> RetinaFace:
        """Builds the float network, pruned, with fresh weights."""
        network = RetinaFace(self.network)
        for plan in self.plans:
            apply_plan(network, plan)
        return network

    def build(self) -> Network:
        """Builds the network, ready for its weights."""
        network = self.build_float()
        return network if self.quantization is None else prepare_for_training(network, self.quantization)


def load_network(path: Path | str) -> tuple[Network, Structure]:
    """Loads a network from one of this project's training checkpoints or a public RetinaFace file.

    Args:
        path: ``.ckpt`` or ``.pth``.

    Returns:
        The network in evaluation mode on the CPU, and its structure.

    Raises:
        InputError: The file cannot be read, or holds no network that this project can build.
    """
    content = read_torch_file(path)
    if not _has_structure(content):
        network = load_pretrained(path)
        return network, Structure(network.config)
    structure = _recorded_structure(path, content)
    try:
        weights = content["state_dict"]
        state = {key.removeprefix(_PREFIX): value for key, value in weights.items() if key.startswith(_PREFIX)}
        built = structure.build()
    except (AttributeError, KeyError, TypeError, ValueError, InputError) as error:
        raise _damaged(path, error) from error
    if isinstance(built, RetinaFace):
        load_matching(built, state, str(path))
    else:
        try:
            built.load_state_dict(state)  # observers take the shapes of their ranges from the file
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: the weights do not fit the structure recorded with them ({reason})") from error
    return built.eval(), structure


def load_structure(path: Path | str) -> Structure:
    """Reads the structure of a checkpoint without building the network.

    Args:
        path: ``.ckpt`` or ``.pth``.

    Raises:
        InputError: As :func:`load_network`.
    """
    content = read_torch_file(path)
    return _recorded_structure(path, content) if _has_structure(content) else Structure(load_pretrained(path).config)


def _has_structure(content: object) -> bool:
    return isinstance(content, Mapping) and "structure" in content


def _recorded_structure(path: Path | str, content: Mapping[str, Any]) -> Structure:
    try:
        return Structure.from_plain(content["structure"])
    except (AttributeError, KeyError, TypeError, ValueError, InputError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path | str, error: Exception) -> InputError:
    return InputError(
        f"{path}: the record of the network's structure is damaged ({type(error).__name__}: {error}); give "
        "a checkpoint as it was written, by this version"
    )


def load_float_network(
    path: Path | str, activation: Activation | None = None, keep_leaky_relu: Sequence[str] | None = None
) -> tuple[RetinaFace, Structure]:
    """Loads a network to train or compress further.

    Args:
        path: ``.ckpt`` or ``.pth``.
        activation: Activation to use from now on instead of the one in the file.
        keep_leaky_relu: With it, as in :class:`NetworkConfig`; None: as in the file.

    Returns:
        The network, and its structure.

    Raises:
        InputError: As :func:`load_network`; or the network is quantized already.
    """
    network, structure = load_network(path)
    if not isinstance(network, RetinaFace):
        raise InputError(f"{path}: is quantized already; give the checkpoint of the stage before")
    before = structure.network
    structure.network = with_activation(before, activation, keep_leaky_relu)
    if structure.network == before:
        return network, structure
    changed = structure.build_float()
    changed.load_state_dict(network.state_dict())
    return changed.eval(), structure
