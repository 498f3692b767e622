"""The ``Conv2dSame`` of timm: it pads its input as TensorFlow does ("SAME"), by as much as the input's size asks for.

Strides and sizes: an output of ⌈size / stride⌉ positions, and what is missing for it is padded, half of it (rounded
down) before and the rest after.
"""

import dataclasses
import functools

import torch.nn.functional as F
from torch import Tensor, nn

from tsq_layers.layers.convolution import CONVOLUTIONS, QuantConv, packed_conv, patches
from tsq_layers.layers.convolving import Geometry
from tsq_layers.layers.kinds import is_class, is_plain


class QuantConvSame(QuantConv):
    """A convolution with a packed weight that pads its input so; takes the place of ``timm.layers.Conv2dSame``.

    Example:
        >>> import torch
        >>> from tsq_layers.runtime.linear import QuantLinear
        >>> layer = QuantConvSame(QuantLinear(4 * 9, 8, bits=4, group_size=None), kernel_size=(3, 3), stride=(2, 2))
        >>> layer(torch.zeros(1, 4, 7, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (so it is called in nn.Conv2d)
        """The convolution of the padded input; as :meth:`QuantConv.forward`."""
        return super().forward(pad_same(self, input))


def pad_same(layer: nn.Module, x: Tensor) -> Tensor:
    """Zeros around an input (…, height, width), for ⌈size / stride⌉ positions of the kernel.

    Example:
        >>> import torch
        >>> pad_same(nn.Conv2d(1, 1, kernel_size=3, stride=2), torch.ones(1, 1, 4, 5)).shape
        torch.Size([1, 1, 5, 7])
    """
    geometry = Geometry.of(layer)
    sides: list[int] = []
    axes = zip(
        x.shape[-len(geometry.kernel_size) :],
        geometry.kernel_size,
        geometry.stride,
        geometry.dilation,
        strict=True,
    )
    for size, kernel, stride, dilation in axes:
        missing = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
        sides = [
            missing // 2,
            missing - missing // 2,
            *sides,
        ]  # F.pad begins with the last dimension
    return F.pad(x, sides)


def _matches(module: nn.Module) -> bool:
    return is_class(module, "timm.layers.conv2d_same", "Conv2dSame") and is_plain(
        module, type(module)
    )


def _inputs(module: nn.Module, x: Tensor) -> Tensor:
    return patches(module, pad_same(module, x))


CONV_SAME = dataclasses.replace(
    CONVOLUTIONS[1],
    name="Conv2dSame",
    matches=_matches,
    inputs=_inputs,
    twin=functools.partial(packed_conv, form=QuantConvSame),
)
"""timm's convolution with TensorFlow's padding."""
