"""Run a convolution with a packed weight: pad the input, dequantise the weight, and compute gradients.

Shapes: B batch, C channels in, N channels out, K columns of the weight matrix, n spatial dimensions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.numerics.weight import WeightFormat
from tsq_layers.runtime import forward as running
from tsq_layers.runtime.environment import autocast
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.parts import Parts

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""Torch's convolutions by the number of spatial dimensions."""


class Geometry(NamedTuple):
    """The geometry of a convolution; each tuple has one entry for each spatial dimension.

    Args:
        kernel_size: size of the kernel.
        stride: distance between neighbouring positions of the kernel.
        padding: numbers of entries that are added before and after the input.
        dilation: distance between neighbouring entries of the kernel.
        groups: number of blocks of channels; outputs of a block depend on inputs of the same block only.
        mode: kind of padding, as ``padding_mode`` of ``nn.Conv2d``.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    mode: str

    @staticmethod
    def of(layer: Any) -> "Geometry":
        """Return the geometry of an ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` or ``QuantConv``."""
        padding: list[tuple[int, int]] = []
        for axis, size in enumerate(layer.kernel_size):
            if layer.padding == "valid":
                padding.append((0, 0))
            elif layer.padding == "same":
                total = layer.dilation[axis] * (size - 1)
                padding.append((total // 2, total - total // 2))
            else:
                padding.append((layer.padding[axis], layer.padding[axis]))
        return Geometry(
            layer.kernel_size,
            layer.stride,
            tuple(padding),
            layer.dilation,
            layer.groups,
            layer.padding_mode,
        )

    @property
    def own_padding(self) -> tuple[int, ...]:
        """Padding on both sides that torch's convolution can do itself: zeros only, so 0 for other modes.

        For ``padding="same"`` with an odd number in all, the last entry after the input is not in it.
        """
        if self.mode != "zeros":
            return (0,) * len(self.padding)
        return tuple(before for before, _ in self.padding)

    def pad(self, batch: Tensor, done: Sequence[int] | None = None) -> Tensor:
        """Pad an input (B, C, …).

        Args:
            batch: the input.
            done: numbers of entries that something else will add on both sides of each dimension; 0 by
                default.
        """
        sides: list[int] = []
        for axis, (before, after) in enumerate(self.padding):
            rest = 0 if done is None else done[axis]
            # F.pad takes the last dimension first.
            sides = [before - rest, after - rest, *sides]
        if not any(sides):
            return batch
        return F.pad(batch, sides, mode="constant" if self.mode == "zeros" else self.mode)


def convolve(x: Tensor, matrix: QuantLinear, geometry: Geometry) -> Tensor:
    """Convolve an input with a packed weight, and add the bias.

    It is computed in the dtype of ``x``, or in that of autocast. Gradients flow to ``x`` and the bias;
    the backward pass dequantises the weight again.

    Args:
        x: floating point (B, C, …).
        matrix: the weight (N, K), K = C/groups · ∏ kernel, and the bias.
        geometry: the geometry of the convolution.

    Returns:
        (B, N, …).

    Example:
        >>> geometry = Geometry((3,), (1,), ((1, 1),), (1,), 1, "zeros")
        >>> matrix = QuantLinear(4 * 3, 8, bits=4, group_size=None)
        >>> convolve(torch.zeros(2, 4, 10), matrix, geometry).shape
        torch.Size([2, 8, 10])
    """
    padded = geometry.pad(autocast(x), done=geometry.own_padding)
    bias = None if matrix.bias is None else matrix.bias.to(padded.dtype)
    arguments = (padded, bias, matrix.format, geometry, *matrix.parts)
    differentiable = torch.is_grad_enabled() and (
        padded.requires_grad or (bias is not None and bias.requires_grad)
    )
    if (
        differentiable
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
    ):
        output: Tensor = _Convolution.apply(*arguments)
        return output
    return _forward(*arguments)


def _forward(
    x: Tensor, bias: Tensor | None, form: WeightFormat, geometry: Geometry, *parts: Tensor | None
) -> Tensor:
    columns = x.shape[1] // geometry.groups * math.prod(geometry.kernel_size)
    weight = _weight(parts, form, columns, geometry, x.dtype)
    convolution = CONVOLUTIONS[len(geometry.kernel_size)]
    return convolution(
        x, weight, bias, geometry.stride, geometry.own_padding, geometry.dilation, geometry.groups
    )


def _weight(
    parts: Sequence[Tensor | None],
    form: WeightFormat,
    columns: int,
    geometry: Geometry,
    dtype: torch.dtype,
) -> Tensor:
    weight_NK = running.dequantize(Parts(*parts), form, columns, dtype)  # type: ignore[arg-type]
    return weight_NK.view(weight_NK.shape[0], -1, *geometry.kernel_size)


class _Convolution(torch.autograd.Function):
    """Keeps the packed weight, neither the dequantised one nor the input, for the gradient of the input."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        form: WeightFormat,
        geometry: Geometry,
        *parts: Tensor | None,
    ) -> Tensor:
        return _forward(x, bias, form, geometry, *parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        x, _, ctx.form, ctx.geometry, *parts = inputs
        ctx.save_for_backward(*parts)
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            geometry: Geometry = ctx.geometry
            columns = ctx.shape[1] // geometry.groups * math.prod(geometry.kernel_size)
            weight = _weight(ctx.saved_tensors, ctx.form, columns, geometry, gradient.dtype)
            x = gradient.new_empty(1).expand(ctx.shape)  # only its shape is used
            to_x, _, _ = torch.ops.aten.convolution_backward(
                gradient,
                x,
                weight,
                None,
                geometry.stride,
                geometry.own_padding,
                geometry.dilation,
                False,
                (0,) * len(geometry.stride),
                geometry.groups,
                (True, False, False),
            )
        if ctx.needs_input_grad[1]:
            to_bias = gradient.sum((0, *range(2, gradient.dim())))
        return to_x, to_bias, None, None, *(None for _ in ctx.saved_tensors)
