"""The RetinaFace network: backbone, feature pyramid, context modules and heads.

Deng et al., "RetinaFace: Single-stage Dense Face Localisation in the Wild" (arXiv:1905.00641), in the form of the
widely used public PyTorch weights: features at strides 8, 16 and 32, two square anchors a position, five landmarks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet  # type: ignore[import-untyped]

from retinaface.data.annotations import MEAN_BGR
from retinaface.errors import InputError

Backbone = Literal["mobilenet0.25", "resnet50"]
Activation = Literal["leaky_relu", "relu"]

# class_logits (B, A, 2), box_deltas (B, A, 4), landmark_deltas (B, A, 10)
Outputs = tuple[Tensor, Tensor, Tensor]


def face_logit(class_logits: Tensor) -> Tensor:
    """Logit of a face ``(B, A)`` from those of both classes ``(B, A, 2)``.

    Its sigmoid is the softmax of the two, for which a CPU takes fifty times as long.
    """
    return class_logits[..., 1] - class_logits[..., 0]


SMALLEST_PICTURE = 64
BACKBONE_STRIDES = (4, 8, 16, 32)
BACKBONE_CHANNELS: dict[str, tuple[int, ...]] = {
    "mobilenet0.25": (32, 64, 128, 256),
    "resnet50": (256, 512, 1024, 2048),
}
PYRAMID_CHANNELS: dict[str, int] = {"mobilenet0.25": 64, "resnet50": 256}


@dataclass(frozen=True)
class NetworkConfig:
    """What it takes to build a RetinaFace network again.

    Attributes:
        backbone: Feature extractor.
        activation: ``leaky_relu`` as published, or ``relu``, which an INT8 runtime fuses into the convolution for free.
            ResNet-50 was published with ReLU throughout and takes no notice.
        channels: Width of feature pyramid and context modules; 0 takes the published one (64 or 256).
        anchor_sizes: Side lengths in pixels of the square anchors at each level.
        strides: Pixels between anchor centres at each level: the last of 4, 8, 16, 32, in order.
        keep_leaky_relu: Modules that keep LeakyReLU where ``activation`` is ``relu``, named as for
            :func:`matching_modules`: those that stay in float, which gain less, and whose accuracy others need.
    """

    backbone: Backbone = "mobilenet0.25"
    activation: Activation = "leaky_relu"
    channels: int = 0
    anchor_sizes: Sequence[Sequence[int]] = ((16, 32), (64, 128), (256, 512))
    strides: Sequence[int] = (8, 16, 32)
    keep_leaky_relu: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, choices in (("backbone", get_args(Backbone)), ("activation", get_args(Activation))):
            if getattr(self, name) not in choices:
                raise InputError(f"network: {name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        # Lists come from YAML and JSON; tuples compare equal and can be looked up in a cache.
        strides = tuple(self.strides)
        object.__setattr__(self, "strides", strides)
        object.__setattr__(self, "keep_leaky_relu", tuple(self.keep_leaky_relu))
        object.__setattr__(self, "anchor_sizes", tuple(tuple(sizes) for sizes in self.anchor_sizes))
        if not strides or strides != BACKBONE_STRIDES[-len(strides) :]:
            raise InputError(
                f"network: strides are {list(strides)}; expected the last of 4, 8, 16, 32, such as 8, 16, 32"
            )
        if len(self.anchor_sizes) != len(strides) or not all(self.anchor_sizes):
            raise InputError(
                f"network: {len(self.anchor_sizes)} lists of anchor sizes for {len(strides)} strides; "
                "expected one non-empty list per stride"
            )
        if self.channels < 0 or self.channels % 4:
            raise InputError(f"network: channels is {self.channels}; expected a multiple of 4 (0: as published)")


def with_activation(
    config: NetworkConfig, activation: Activation | None, keep_leaky_relu: Sequence[str] | None
) -> NetworkConfig:
    """The same network with another activation, and other modules that keep LeakyReLU; None: as they are."""
    return replace(
        config,
        activation=config.activation if activation is None else activation,
        keep_leaky_relu=config.keep_leaky_relu if keep_leaky_relu is None else keep_leaky_relu,
    )


def normalize(images: Tensor) -> Tensor:
    """Turns pictures into network input.

    Args:
        images: ``(B, 3, H, W)``, uint8 or float, BGR, 0-255.

    Returns:
        ``(B, 3, H, W)`` float32, the mean colour subtracted; nothing is divided.
    """
    return images.float() - _mean(images.device)


def as_input(image: NDArray[np.uint8]) -> Tensor:
    """Turns one picture into network input.

    Args:
        image: ``(H, W, 3)`` uint8 BGR, as OpenCV reads it.

    Returns:
        ``(1, 3, H, W)``, as from :func:`normalize`.
    """
    return normalize(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None])


def lies_in(name: str, module: str) -> bool:
    """Whether a dotted name is that of a module, or of one below it."""
    return name == module or name.startswith(f"{module}.")


def pad_small(images: Tensor) -> Tensor:
    """Fills pictures with a side below 64 pixels up to that, which every exported network takes.

    Args:
        images: ``(B, 3, H, W)`` as from :func:`normalize`, so that zero is the mean colour.

    Returns:
        The pictures, wider to the right and taller at the bottom where need be.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (0, max(0, SMALLEST_PICTURE - width), 0, max(0, SMALLEST_PICTURE - height)))


@lru_cache
def _mean(device: torch.device) -> Tensor:
    """``(1, 3, 1, 1)``, cached so that no step waits for the copy to the device."""
    return torch.tensor(MEAN_BGR, dtype=torch.float32, device=device).view(1, 3, 1, 1)


# Batch, height and width of the input, left open for torch.export: any size from 33 pixels.
DYNAMIC_SHAPE = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)


def export_example() -> Tensor:
    """``(2, 3, 96, 128)``: an input to trace the network with; all sizes differ, so that none is taken for another."""
    return torch.zeros(2, 3, 96, 128)


def matching_modules(network: nn.Module, patterns: Sequence[str], what: str) -> list[str]:
    """Names of the modules that are meant by names with wildcards.

    Args:
        network: Where they are.
        patterns: Dotted names; within a part, ``*`` and ``?`` stand for any characters: ``ssh.*.conv5_1``,
            ``backbone.*1`` (``backbone.stage1`` of mobilenet0.25, ``backbone.conv1``, ``bn1`` and ``layer1`` of
            ResNet-50).
        what: The setting they come from, for the error.

    Returns:
        The names, in the order of the patterns.

    Raises:
        InputError: A pattern matches nothing.
    """
    names = [name for name, _ in network.named_modules() if name]
    found: list[str] = []
    for pattern in patterns:
        parts = pattern.split(".")
        matching = [
            name for name in names if len(own := name.split(".")) == len(parts) and all(map(fnmatchcase, own, parts))
        ]
        if not matching:
            raise InputError(
                f"{what} names {pattern}, which the network does not have; expected names such as backbone.*1, "
                "fpn.lateral.0, ssh.1 or class_heads"
            )
        found += matching
    return found


def _activation(kind: str) -> nn.Module:
    return nn.ReLU(inplace=True) if kind == "relu" else nn.LeakyReLU(0.1, inplace=True)


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def conv_bn_act(inputs: int, outputs: int, activation: str, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation and activation."""
    return nn.Sequential(*_conv_bn(inputs, outputs, kernel, stride), _activation(activation))


def depthwise_separable(inputs: int, outputs: int, activation: str, stride: int = 1) -> nn.Sequential:
    """Depthwise 3x3 then pointwise 1x1 convolution, each normalised and activated (arXiv:1704.04861)."""
    return nn.Sequential(
        *_conv_bn(inputs, inputs, 3, stride, groups=inputs),
        _activation(activation),
        *_conv_bn(inputs, outputs, 1),
        _activation(activation),
    )


class MobileNet025(nn.Module):
    """MobileNet v1 at width 0.25 without its classifier; features at strides 4, 8, 16 and 32."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            conv_bn_act(3, 8, activation, stride=2),
            depthwise_separable(8, 16, activation),
            depthwise_separable(16, 32, activation, stride=2),
            depthwise_separable(32, 32, activation),
            depthwise_separable(32, 64, activation, stride=2),
            depthwise_separable(64, 64, activation),
        )
        self.stage2 = nn.Sequential(
            depthwise_separable(64, 128, activation, stride=2),
            *(depthwise_separable(128, 128, activation) for _ in range(5)),
        )
        self.stage3 = nn.Sequential(
            depthwise_separable(128, 256, activation, stride=2),
            depthwise_separable(256, 256, activation),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns the features at strides 4, 8, 16 and 32."""
        stride4 = self.stage1[:4](images)
        stride8 = self.stage1[4:](stride4)
        stride16 = self.stage2(stride8)
        return [stride4, stride8, stride16, self.stage3(stride16)]


class BottleneckOwnActivations(Bottleneck):
    """torchvision's bottleneck with one activation module per place instead of one shared by three.

    Pruning and quantization look at modules by place; a shared one has three.
    """

    def __init__(self, *args: int, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        del self.relu
        self.relu1, self.relu2, self.relu3 = (nn.ReLU(inplace=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Residual block: 1x1, 3x3 and 1x1 convolutions around a shortcut."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu3(out + shortcut)
        return result


class ResNet50(ResNet):
    """torchvision's ResNet-50 without its classifier; features at strides 4, 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__(BottleneckOwnActivations, [3, 4, 6, 3])
        del self.avgpool, self.fc

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns the features at strides 4, 8, 16 and 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class FeaturePyramid(nn.Module):
    """Feature pyramid (arXiv:1612.03144): laterals to one width, summed from coarse to fine, smoothed where summed."""

    def __init__(self, inputs: Sequence[int], channels: int, activation: str) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(conv_bn_act(width, channels, activation, kernel=1) for width in inputs)
        self.merge = nn.ModuleList(conv_bn_act(channels, channels, activation) for _ in inputs[1:])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps features, finest first, to as many levels of equal width."""
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for index in range(len(self.merge) - 1, -1, -1):
            coarser = F.interpolate(levels[index + 1], size=levels[index].shape[-2:], mode="nearest")
            levels[index] = self.merge[index](levels[index] + coarser)
        return levels


class ContextModule(nn.Module):
    """SSH context module (arXiv:1708.03979): receptive fields of 3, 5 and 7 side by side."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        # Published as one ReLU after the concatenation; one per branch is the same, and fuses with its convolution.
        self.conv3 = conv_bn_act(channels, half, "relu")
        self.conv5_1 = conv_bn_act(channels, quarter, activation)
        self.conv5_2 = conv_bn_act(quarter, quarter, "relu")
        self.conv7_2 = conv_bn_act(quarter, quarter, activation)
        self.conv7_3 = conv_bn_act(quarter, quarter, "relu")

    def forward(self, level: Tensor) -> Tensor:
        """Keeps the shape ``(B, channels, H, W)``."""
        shared = self.conv5_1(level)
        return torch.cat([self.conv3(level), self.conv5_2(shared), self.conv7_3(self.conv7_2(shared))], dim=1)


class RetinaFace(nn.Module):
    """The detector. Fully convolutional: any batch, height and width.

    Args:
        config: What to build.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        activation = "leaky_relu" if config.backbone == "mobilenet0.25" else "relu"
        channels = config.channels or PYRAMID_CHANNELS[config.backbone]
        first = BACKBONE_STRIDES.index(config.strides[0])
        self.levels = slice(first, first + len(config.strides))
        anchors = [len(sizes) for sizes in config.anchor_sizes]

        self.backbone = MobileNet025(activation) if config.backbone == "mobilenet0.25" else ResNet50()
        self.fpn = FeaturePyramid(BACKBONE_CHANNELS[config.backbone][self.levels], channels, activation)
        self.ssh = nn.ModuleList(ContextModule(channels, activation) for _ in anchors)
        self.class_heads = nn.ModuleList(nn.Conv2d(channels, 2 * count, 1) for count in anchors)
        self.box_heads = nn.ModuleList(nn.Conv2d(channels, 4 * count, 1) for count in anchors)
        self.landmark_heads = nn.ModuleList(nn.Conv2d(channels, 10 * count, 1) for count in anchors)
        kept = matching_modules(self, config.keep_leaky_relu, "network: keep_leaky_relu")
        if config.activation == "relu":
            _leaky_relu_to_relu(self, kept)

    def forward(self, images: Tensor) -> Outputs:
        """Runs the detector.

        Args:
            images: ``(B, 3, H, W)`` float32 from :func:`normalize`.

        Returns:
            ``class_logits (B, A, 2)`` (background, face), ``box_deltas (B, A, 4)`` and ``landmark_deltas (B, A, 10)``,
            the anchors in the order of :func:`retinaface.model.anchors.make_anchors`.
        """
        levels = self.fpn(self.backbone(images)[self.levels])
        contexts = [context(level) for context, level in zip(self.ssh, levels, strict=True)]
        class_logits, box_deltas, landmark_deltas = (
            torch.cat([_per_anchor(head(context), width) for head, context in zip(heads, contexts, strict=True)], dim=1)
            for heads, width in ((self.class_heads, 2), (self.box_heads, 4), (self.landmark_heads, 10))
        )
        return class_logits, box_deltas, landmark_deltas


def _leaky_relu_to_relu(network: nn.Module, kept: Sequence[str]) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.LeakyReLU) and not any(lies_in(name, each) for each in kept):
            network.set_submodule(name, _activation("relu"))


def _per_anchor(maps: Tensor, width: int) -> Tensor:
    """Maps ``(B, anchors * width, H, W)`` to ``(B, H * W * anchors, width)``."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, width)
