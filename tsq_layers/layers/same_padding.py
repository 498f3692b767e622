"""Define the kind of ``Conv2dSame`` of timm, a convolution with the padding "SAME" of TensorFlow.

The output has ⌈size / stride⌉ positions in each dimension. The input is padded with as many zeros as
this needs, half of them (rounded down) before it and the rest after it.
"""

import dataclasses
import functools

import torch.nn.functional as F
from torch import Tensor, nn

from tsq_layers.layers.convolution import CONVOLUTIONS, QuantConv, packed_conv, patches
from tsq_layers.layers.convolving import Geometry
from tsq_layers.layers.kinds import is_class, is_plain


class QuantConvSame(QuantConv):
    """A convolution with a packed weight and the padding of this file, the replacement of ``timm.layers.Conv2dSame``.

    Args and exceptions are those of :class:`QuantConv`.


    Example:
        >>> import torch
        >>> from tsq_layers.runtime.linear import QuantLinear
        >>> matrix = QuantLinear(4 * 9, 8, bits=4, group_size=None)
        >>> layer = QuantConvSame(matrix, kernel_size=(3, 3), stride=(2, 2))
        >>> layer(torch.zeros(1, 4, 7, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (so it is called in nn.Conv2d)
        """Pad the input and return its convolution; see :meth:`QuantConv.forward`."""
        return super().forward(pad_same(self, input))


def pad_same(layer: nn.Module, x: Tensor) -> Tensor:
    """Pad an input (…, height, width) with zeros, so that the output has ⌈size / stride⌉ positions.

    Args:
        layer: the convolution, an ``nn.Conv2d`` or a :class:`QuantConv`.
        x: its input.

    Example:
        >>> import torch
        >>> pad_same(nn.Conv2d(1, 1, kernel_size=3, stride=2), torch.ones(1, 1, 4, 5)).shape
        torch.Size([1, 1, 5, 7])
    """
    geometry = Geometry.of(layer)
    spatial_sizes = x.shape[-len(geometry.kernel_size) :]
    sides: list[int] = []
    for axis, size in enumerate(spatial_sizes):
        stride = geometry.stride[axis]
        positions = -(-size // stride)
        reach = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)
        total = max((positions - 1) * stride + reach + 1 - size, 0)
        # F.pad takes the last dimension first.
        sides = [total // 2, total - total // 2, *sides]
    return F.pad(x, sides)


def _matches(module: nn.Module) -> bool:
    is_conv_same = is_class(module, "timm.layers.conv2d_same", "Conv2dSame")
    return is_conv_same and is_plain(module, type(module))


def _inputs(module: nn.Module, x: Tensor) -> Tensor:
    return patches(module, pad_same(module, x))


CONV_SAME = dataclasses.replace(
    CONVOLUTIONS[1],
    name="Conv2dSame",
    matches=_matches,
    inputs=_inputs,
    replacement=functools.partial(packed_conv, form=QuantConvSame),
)
"""``Conv2dSame`` of timm; everything else is as in ``nn.Conv2d``."""
