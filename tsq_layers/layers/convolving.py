"""Run a convolution whose weight is packed: padding, dequantising, gradients.

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
"""By the number of spatial dimensions."""


class Geometry(NamedTuple):
    """How a convolution lays its kernel on the input; one number for each spatial dimension.

    Args:
        kernel_size: of the weight.
        stride: of the kernel.
        padding: entries added before and after the input.
        dilation: distance of the kernel's entries.
        groups: blocks of channels that do not see one another.
        mode: as ``padding_mode`` of ``nn.Conv2d``.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    mode: str

    @staticmethod
    def of(layer: Any) -> "Geometry":
        """That of an ``nn.Conv1d``, ``2d``, ``3d`` or a ``QuantConv``."""
        if layer.padding == "valid":
            padding = tuple((0, 0) for _ in layer.kernel_size)
        elif layer.padding == "same":
            totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            padding = tuple((total // 2, total - total // 2) for total in totals)
        else:
            padding = tuple((p, p) for p in layer.padding)
        return Geometry(
            layer.kernel_size,
            layer.stride,
            padding,
            layer.dilation,
            layer.groups,
            layer.padding_mode,
        )

    @property
    def own_padding(self) -> tuple[int, ...]:
        """Padding that torch's convolution can do itself: zeros, as many before as after."""
        return tuple(before if self.mode == "zeros" else 0 for before, _ in self.padding)

    def pad(self, batch: Tensor, done: Sequence[int] | None = None) -> Tensor:
        """Pad the input (B, C, …); ``done`` numbers less on both sides."""
        done = done or (0,) * len(self.padding)
        margins = [
            (before - d, after - d) for (before, after), d in zip(self.padding, done, strict=True)
        ]
        if not any(before or after for before, after in margins):
            return batch
        flat = [
            side for margin in reversed(margins) for side in margin
        ]  # F.pad begins with the last dimension
        return F.pad(batch, flat, mode="constant" if self.mode == "zeros" else self.mode)


def convolve(x: Tensor, matrix: QuantLinear, geometry: Geometry) -> Tensor:
    """Convolve with a packed weight and its bias, in the dtype of ``x`` (that of autocast, if it is on).

    Gradients flow to ``x`` and the bias; the dequantised weight is not kept for them.

    Args:
        x: floating point (B, C, …).
        matrix: the weight (N, K), K = C/groups · ∏ kernel, and the bias.
        geometry: of the convolution.

    Returns:
        (B, N, …).

    Example:
        >>> geometry = Geometry((3,), (1,), ((1, 1),), (1,), 1, "zeros")
        >>> convolve(torch.zeros(2, 4, 10), QuantLinear(4 * 3, 8, bits=4, group_size=None), geometry).shape
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
