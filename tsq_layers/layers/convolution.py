"""Convolutions: a matrix that multiplies patches of the input.

The weight (N, C/groups, *kernel) is the matrix (N, K), K = C/groups · ∏ kernel, and an input row is
the patch that the kernel lies on, flattened in the same order; padding is part of a patch, for the
layer sees it. With groups, each block of N/groups rows sees the patches of its own channels.

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
from tsq_layers.layers.kinds import LayerKind, is_plain, mark_twin
from tsq_layers.runtime.linear import QuantLinear

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class QuantConv(nn.Module):
    """A convolution with a packed weight; takes the place of ``nn.Conv1d``, ``2d`` or ``3d``.

    It computes in the dtype of its input (under autocast, in that of autocast) with the weight
    dequantised for each call. Gradients flow to the input and the bias; the dequantised weight is
    not kept for them, but made again.

    Args:
        matrix: the packed weight (N, K) and the bias.
        kernel_size: n numbers, one for each spatial dimension, as all that follow; n is 1, 2 or 3.
        stride: of the kernel.
        padding: of both sides, or ``"same"`` or ``"valid"``.
        dilation: distance of the kernel's entries.
        groups: blocks of channels that do not see one another.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Raises:
        LayerError: arguments that do not fit together.

    Example:
        >>> QuantConv(QuantLinear(4 * 9, 8, bits=4, group_size=None), kernel_size=(3, 3), padding=(1, 1), groups=2)
        QuantConv(
          8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2, padding_mode=zeros
          (matrix): QuantLinear(in_features=36, out_features=8, bits=4, group_size=36, symmetric=False, bias=True, bits_per_weight=5.78)
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
        self.kernel_size, self.stride, self.dilation = (
            tuple(v or ones) for v in (kernel_size, stride, dilation)
        )
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        self.groups, self.padding_mode = groups, padding_mode
        _check(self, matrix)
        self.matrix = matrix
        mark_twin(self)
        self.in_channels = matrix.in_features // math.prod(kernel_size) * groups
        self.out_channels = matrix.out_features

    @property
    def weight(self) -> Tensor:
        """The dequantised weight (N, C/groups, *kernel), made anew each time; changing it changes nothing."""
        return self.matrix.weight.view(self.out_channels, -1, *self.kernel_size)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (N,), which the matrix holds."""
        return self.matrix.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (so it is called in nn.Conv2d)
        """The convolution: (B, C, …) → (B, N, …) or (C, …) → (N, …), in the dtype of ``input`` or of autocast.

        Raises:
            LayerError: ``input`` is not floating point, or of another shape.
        """
        x, n = input, len(self.kernel_size)
        if (
            not x.is_floating_point()
            or x.dim() - n not in (1, 2)
            or x.shape[-n - 1] != self.in_channels
        ):
            raise LayerError(
                f"the input is {x.dtype} of shape {tuple(x.shape)}; this layer takes floating point of shape "
                f"(batch, {self.in_channels}, …) or ({self.in_channels}, …) with {n} spatial dimensions"
            )
        geometry = Geometry.of(self)
        if x.dim() == n + 1:
            return convolving.convolve(x.unsqueeze(0), self.matrix, geometry).squeeze(0)
        return convolving.convolve(x, self.matrix, geometry)

    def extra_repr(self) -> str:
        """What the layer is, for ``repr``."""
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        values = [f"{name}={getattr(self, name)}" for name in names]
        return ", ".join([str(self.in_channels), str(self.out_channels), *values])


def _check(layer: QuantConv, matrix: QuantLinear) -> None:
    n, kernel = len(layer.kernel_size), layer.kernel_size
    if n not in convolving.CONVOLUTIONS or {len(layer.stride), len(layer.dilation)} != {n}:
        raise LayerError(
            f"kernel_size={kernel}, stride={layer.stride}, dilation={layer.dilation}: give 1, 2 or 3 numbers, as many for each"
        )
    if layer.padding not in ("same", "valid") and (
        isinstance(layer.padding, str) or len(layer.padding) != n
    ):
        raise LayerError(f"padding={layer.padding!r}: give {n} numbers, 'same' or 'valid'")
    if layer.padding == "same" and set(layer.stride) != {1}:
        raise LayerError(
            f"padding='same' and stride={layer.stride}: only strides of 1 keep the size; give numbers"
        )
    if layer.padding_mode not in _PADDING_MODES:
        raise LayerError(
            f"padding_mode={layer.padding_mode!r}: give one of {', '.join(_PADDING_MODES)}"
        )
    if (
        layer.groups < 1
        or matrix.out_features % layer.groups
        or matrix.in_features % math.prod(kernel)
    ):
        raise LayerError(
            f"a matrix of {matrix.out_features}×{matrix.in_features} with kernel_size={kernel} and groups={layer.groups}: "
            "groups must divide its rows, and the size of the kernel its columns"
        )


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """The patches that a convolution multiplies, flattened like its weight.

    Args:
        module: an ``nn.Conv1d``, ``2d`` or ``3d``, or a :class:`QuantConv`.
        x: (B, C, …) or (C, …).

    Returns:
        (T, K), or (T, groups, K) with groups > 1: about ∏ kernel / ∏ stride times the size of ``x``.

    Example:
        >>> import torch
        >>> patches(nn.Conv1d(1, 1, kernel_size=3, padding=1), torch.tensor([[[1.0, 2, 3, 4]]]))
        tensor([[0., 1., 2.],
                [1., 2., 3.],
                [2., 3., 4.],
                [3., 4., 0.]])
    """
    kernel, stride, _, dilation, groups, _ = geometry = Geometry.of(module)
    padded = geometry.pad(x.unsqueeze(0) if x.dim() == len(kernel) + 1 else x)
    (batch, channels, *sizes), (to_image, to_channel, *to_next) = padded.shape, padded.stride()
    axes = list(zip(sizes, kernel, stride, dilation, to_next, strict=True))
    positions = [(size - d * (k - 1) - 1) // step + 1 for size, k, step, d, _ in axes]
    # Every patch where it lies in the input, (B, *positions, groups, channels, *kernel); only flatten copies.
    to_position, to_entry = (
        (step * to for _, _, step, _, to in axes),
        (d * to for _, _, _, d, to in axes),
    )
    view = padded.as_strided(
        (batch, *positions, groups, channels // groups, *kernel),
        (to_image, *to_position, channels // groups * to_channel, to_channel, *to_entry),
    )
    rows = view.flatten(len(kernel) + 2).flatten(0, len(kernel))
    return rows.squeeze(1) if groups == 1 else rows


# --- the kinds ---------------------------------------------------------------------------------


def _matches(base: Any) -> Callable[[nn.Module], bool]:
    def matches(module: nn.Module) -> bool:
        kind: Any = type(module)
        if not issubclass(kind, base) or issubclass(kind, LazyModuleMixin):
            return False  # a lazy one becomes plain once it has a shape
        unchanged = kind._conv_forward is base._conv_forward and "_conv_forward" not in vars(module)
        return unchanged and is_plain(module, base)

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
    """The twin of a convolution, of the same geometry."""
    layer: Any = module
    twin = form(
        matrix,
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )
    return twin.train(module.training)


def _kind(base: type[nn.Module]) -> LayerKind:
    return LayerKind(
        name=base.__name__,
        matches=_matches(base),
        to_matrix=_to_matrix,
        from_matrix=_from_matrix,
        inputs=patches,
        blocks=_groups,
        twin=packed_conv,
    )


CONVOLUTIONS: tuple[LayerKind, ...] = tuple(
    _kind(base) for base in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
)
"""The kinds of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``; subclasses only if they compute the same."""
