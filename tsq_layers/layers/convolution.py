"""Define the kinds of layers of convolutions, whose weight is a matrix that multiplies patches of the input.

The weight (N, C/groups, *kernel) is the matrix (N, K), K = C/groups · ∏ kernel. An input row is the
patch of the input under the kernel, flattened in the same order; padding is part of a patch, because
the weight multiplies it too. With groups, each row block of N/groups rows has the patches of its own
channels.

Shapes: B batch, C channels in, N channels out, T patches (batch · positions of the output), K
columns, n spatial dimensions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from tsq_layers.errors import LayerError
from tsq_layers.layers import convolving
from tsq_layers.layers.convolving import Geometry
from tsq_layers.layers.kinds import LayerKind, is_plain, mark_replacement
from tsq_layers.runtime.linear import QuantLinear

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class QuantConv(nn.Module):
    """A convolution with a packed weight, the replacement of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

    It computes in the dtype of its input (under autocast, in the dtype of autocast), and dequantises
    its weight in each call. Gradients flow to the input and the bias; the backward pass dequantises the
    weight again.

    Args:
        matrix: the packed weight (N, K) and the bias (N,).
        kernel_size: n numbers, one for each spatial dimension; n is 1, 2 or 3.
        stride: n numbers; 1 by default.
        padding: n numbers, each for both sides of one dimension, or ``"same"`` or ``"valid"``.
        dilation: n numbers, the distances between neighbouring entries of the kernel; 1 by default.
        groups: number of blocks of channels; outputs of a block depend on inputs of the same block only.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Raises:
        LayerError: the arguments do not fit together.

    Example:
        >>> matrix = QuantLinear(4 * 9, 8, bits=4, group_size=None)
        >>> QuantConv(matrix, kernel_size=(3, 3), padding=(1, 1), groups=2)  # doctest: +ELLIPSIS
        QuantConv(
          8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2, padding_mode=zeros
          (matrix): QuantLinear(in_features=36, ...bits_per_weight=5.78)
        )
    """

    def __init__(
        self,
        matrix: QuantLinear,
        *,
        kernel_size: Sequence[int],
        stride: Sequence[int] | None = None,
        padding: str | Sequence[int] = "valid",
        dilation: Sequence[int] | None = None,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        ones = (1,) * len(kernel_size)
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride or ones)
        self.dilation = tuple(dilation or ones)
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        self.groups = groups
        self.padding_mode = padding_mode
        _check(self, matrix)
        self.matrix = matrix
        mark_replacement(self)
        self.in_channels = matrix.in_features // math.prod(kernel_size) * groups
        self.out_channels = matrix.out_features

    @property
    def weight(self) -> Tensor:
        """The weight (N, C/groups, *kernel), dequantised at each access; changes of it have no effect."""
        return self.matrix.weight.view(self.out_channels, -1, *self.kernel_size)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (N,) of the matrix, or ``None``."""
        return self.matrix.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (so it is called in nn.Conv2d)
        """Return the convolution, (B, C, …) → (B, N, …) or (C, …) → (N, …).

        Args:
            input: floating point, with n spatial dimensions.

        Returns:
            the output in the dtype of ``input``, or in that of autocast.

        Raises:
            LayerError: ``input`` is not floating point, or its shape is another one.
        """
        x = input
        n = len(self.kernel_size)
        has_shape = x.dim() - n in (1, 2) and x.shape[-n - 1] == self.in_channels
        if not x.is_floating_point() or not has_shape:
            raise LayerError(
                f"the input is {x.dtype} of shape {tuple(x.shape)}; this layer takes floating point of shape "
                f"(batch, {self.in_channels}, …) or ({self.in_channels}, …) with {n} spatial dimensions"
            )
        geometry = Geometry.of(self)
        if x.dim() == n + 1:
            return convolving.convolve(x.unsqueeze(0), self.matrix, geometry).squeeze(0)
        return convolving.convolve(x, self.matrix, geometry)

    def extra_repr(self) -> str:
        """Return the channels and the geometry, for ``repr``."""
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        values = [f"{name}={getattr(self, name)}" for name in names]
        return ", ".join([str(self.in_channels), str(self.out_channels), *values])


def _check(layer: QuantConv, matrix: QuantLinear) -> None:
    """Refuse arguments of :class:`QuantConv` that do not fit together."""
    _check_padding(layer)
    kernel = layer.kernel_size
    has_rows = layer.groups >= 1 and matrix.out_features % layer.groups == 0
    if not has_rows or matrix.in_features % math.prod(kernel):
        raise LayerError(
            f"a matrix of {matrix.out_features}×{matrix.in_features} with kernel_size={kernel} "
            f"and groups={layer.groups}: groups must divide its rows, "
            "and the size of the kernel its columns"
        )


def _check_padding(layer: QuantConv) -> None:
    n = len(layer.kernel_size)
    stride = layer.stride
    if n not in convolving.CONVOLUTIONS or {len(stride), len(layer.dilation)} != {n}:
        raise LayerError(
            f"kernel_size={layer.kernel_size}, stride={stride}, dilation={layer.dilation}: "
            "give 1, 2 or 3 numbers, as many for each"
        )
    if layer.padding not in ("same", "valid"):
        if isinstance(layer.padding, str) or len(layer.padding) != n:
            raise LayerError(f"padding={layer.padding!r}: give {n} numbers, 'same' or 'valid'")
    elif layer.padding == "same" and set(stride) != {1}:
        raise LayerError(
            f"padding='same' and stride={stride}: only strides of 1 keep the size; give numbers"
        )
    if layer.padding_mode not in _PADDING_MODES:
        raise LayerError(
            f"padding_mode={layer.padding_mode!r}: give one of {', '.join(_PADDING_MODES)}"
        )


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """Return the patches of an input that a convolution multiplies, flattened in the order of its weight.

    Args:
        module: an ``nn.Conv1d``, ``2d`` or ``3d``, or a :class:`QuantConv`.
        x: (B, C, …) or (C, …).

    Returns:
        (T, K), or (T, groups, K) if groups > 1. This is about ∏ kernel / ∏ stride times the size of ``x``.

    Example:
        >>> import torch
        >>> patches(nn.Conv1d(1, 1, kernel_size=3, padding=1), torch.tensor([[[1.0, 2, 3, 4]]]))
        tensor([[0., 1., 2.],
                [1., 2., 3.],
                [2., 3., 4.],
                [3., 4., 0.]])
    """
    geometry = Geometry.of(module)
    n = len(geometry.kernel_size)
    groups = geometry.groups
    padded_input = geometry.pad(x.unsqueeze(0) if x.dim() == n + 1 else x)
    batch, channels, *sizes = padded_input.shape
    image_stride, channel_stride, *axis_strides = padded_input.stride()
    positions: list[int] = []
    position_strides: list[int] = []
    entry_strides: list[int] = []
    for axis in range(n):
        stride = geometry.stride[axis]
        dilation = geometry.dilation[axis]
        reach = dilation * (geometry.kernel_size[axis] - 1)
        positions.append((sizes[axis] - reach - 1) // stride + 1)
        position_strides.append(stride * axis_strides[axis])
        entry_strides.append(dilation * axis_strides[axis])
    # A view of every patch where it lies in the input: (B, *positions, groups, channels, *kernel).
    # Only flatten copies.
    group_channels = channels // groups
    view = padded_input.as_strided(
        (batch, *positions, groups, group_channels, *geometry.kernel_size),
        (
            image_stride,
            *position_strides,
            group_channels * channel_stride,
            channel_stride,
            *entry_strides,
        ),
    )
    rows = view.flatten(n + 2).flatten(0, n)
    return rows.squeeze(1) if groups == 1 else rows


# --- the kinds ---------------------------------------------------------------------------------


def _matches(base: Any) -> Callable[[nn.Module], bool]:
    """Return the ``matches`` of the kind of a convolution of torch."""

    def matches(module: nn.Module) -> bool:
        cls: Any = type(module)
        # A lazy layer has no shape yet; it becomes a layer of the base in its first call.
        if not issubclass(cls, base) or issubclass(cls, LazyModuleMixin):
            return False
        if cls._conv_forward is not base._conv_forward or "_conv_forward" in vars(module):
            return False
        return is_plain(module, base)

    return matches


def _to_matrix(module: nn.Module, weight: Tensor) -> Tensor:  # noqa: ARG001
    return weight.flatten(1)


def _from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
    return matrix.reshape(matrix.shape[0], -1, *Geometry.of(module).kernel_size)


def _groups(module: nn.Module) -> int:
    return Geometry.of(module).groups


def packed_conv(
    module: nn.Module, matrix: QuantLinear, *, form: type[QuantConv] = QuantConv
) -> nn.Module:
    """Return the replacement of a convolution, with the same geometry.

    Args:
        module: a convolution of torch.
        matrix: its packed weight (N, K) and bias.
        form: class of the replacement.
    """
    layer: Any = module
    replacement = form(
        matrix,
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )
    return replacement.train(module.training)


def _kind(base: type[nn.Module]) -> LayerKind:
    return LayerKind(
        name=base.__name__,
        matches=_matches(base),
        to_matrix=_to_matrix,
        from_matrix=_from_matrix,
        inputs=patches,
        blocks=_groups,
        replacement=packed_conv,
    )


CONVOLUTIONS: tuple[LayerKind, ...] = tuple(
    _kind(base) for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
)
"""The kinds of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, and of their subclasses that compute the same."""
