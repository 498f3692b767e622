"""`QuantLinear`: a linear layer whose weight is packed codes, and scales and zero points, offsets, or look-up tables.

There may be a sparse part, another basis of the input, and 8-bit inputs beside them.

Shapes: N out_features, K in_features, G groups a row, W words a row.
"""

import dataclasses

import torch
from torch import Tensor, nn

from tsq_layers.errors import LayerError
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.runtime import forward as running
from tsq_layers.runtime.storage import PackedStorage


class QuantLinear(PackedStorage):
    """A linear layer with a packed weight: ``y = x Wᵀ + b``, W = scales · (codes − zeros).

    With ``offsets`` W = scales · codes + offsets, with ``tables`` W = table[code].

    All that it stores are plain buffers, so that it can be moved, copied and saved like any module.
    Words, zero points and the raw bits of scales, offsets and tables are integers: no change of dtype can touch them.
    ``.to(dtype)`` changes ``bias`` and the dtype of :attr:`weight`. The layer computes in the dtype
    of its input (under autocast, in that of autocast), and sums in at least float32.

    Args:
        in_features: K.
        out_features: N.
        format: what the packed weight is; or leave it out, and give its properties as keywords.
        bias: whether there is a bias. It is a parameter and, as in ``nn.Linear``, trainable.
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale, ``None`` for the whole row; it need not divide K.
        symmetric: the zero points are the constant 2^(bits−1) and not stored.
        scale_dtype: float16, bfloat16 or float32, of offsets and tables too. The state dict holds
            raw bits, so it must be loaded into a layer of the same ``scale_dtype``.
        offsets: each group has an offset in ``scale_dtype`` in the place of a zero point.
        tables: a look-up table for each ``"row"`` or each ``"group"``, in the place of scales and zero points.
        rotation: largest block of input columns that is rotated, a power of two; ``None`` is no rotation.
        channel_scaling: input columns are scaled. The codes are for the input in the changed basis, see
            :mod:`tsq_layers.numerics.basis`; :attr:`weight` is for the layer's own.
        outliers: entries of the sparse part, which is added to what the codes stand for.
        outlier_columns: whole columns of the sparse part instead; 0 is none.
        activation_bits: 8 rounds inputs too, in the changed basis, see :mod:`tsq_layers.numerics.activations`.
        device: of all tensors.
        dtype: of ``bias`` and of :attr:`weight`.

    The new layer is empty, for loading a state dict: all words, grids and biases are zero. Use
    :meth:`from_quantized` or :meth:`from_float` to make one from a quantised weight.

    Raises:
        LayerError: an argument that is not allowed.

    Example:
        >>> from tsq_layers.numerics import grid
        >>> linear = nn.Linear(64, 8)
        >>> scales, zeros = grid.minmax(linear.weight.detach(), bits=4, group_size=32, symmetric=False)
        >>> scales = grid.storable(scales, torch.float16)
        >>> codes = grid.quantize(linear.weight.detach(), scales, zeros, bits=4, group_size=32)
        >>> weight = QuantizedWeight(codes, scales.half(), zeros.to(torch.uint8), 4, 32, symmetric=False)
        >>> layer = QuantLinear.from_float(linear, weight)
        >>> layer(torch.zeros(20, 64)).shape
        torch.Size([20, 8])
        >>> layer  # doctest: +NORMALIZE_WHITESPACE
        QuantLinear(in_features=64, out_features=8, bits=4, group_size=32, symmetric=False,
        bias=True, bits_per_weight=5.00)
    """

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        activation_bits: int | None = None,
    ) -> "QuantLinear":
        """Pack a quantised weight, on its device.

        Args:
            weight: codes and grids; not changed, not kept.
            bias: (N,), copied. A parameter keeps its ``requires_grad``; of a plain tensor a
                trainable parameter is made.
            dtype: of ``bias`` and :attr:`weight`; by default that of ``bias``, or torch's default.
            activation_bits: 8 rounds inputs too.

        Raises:
            LayerError: ``bias`` has another shape than (N,).
        """
        rows, columns = weight.codes.shape
        if bias is not None and tuple(bias.shape) != (rows,):
            raise LayerError(
                f"bias has shape {tuple(bias.shape)}; a weight of shape {rows}×{columns} needs ({rows},)"
            )
        dtype = dtype or (None if bias is None else bias.dtype)
        form = dataclasses.replace(weight.format, activation_bits=activation_bits)
        # Made on meta: every tensor is replaced below.
        layer = cls(columns, rows, form, bias=False, device="meta", dtype=dtype)
        layer.take(weight)
        layer.dtype_marker = torch.empty(0, dtype=dtype, device=weight.codes.device)
        if bias is not None:
            trainable = bias.requires_grad if isinstance(bias, nn.Parameter) else True
            copy = bias.detach().to(weight.codes.device, dtype, copy=True)
            layer.bias = nn.Parameter(copy, requires_grad=trainable)
        return layer

    @classmethod
    def from_float(cls, linear: nn.Linear, weight: QuantizedWeight) -> "QuantLinear":
        """Put a quantised weight in the place of a layer: its bias, dtype, device and training flag.

        Args:
            linear: the layer that ``weight`` was made from; not changed.
            weight: on any device.

        Raises:
            LayerError: the shapes differ.
        """
        if weight.codes.shape != linear.weight.shape:
            raise LayerError(
                f"the quantised weight is {tuple(weight.codes.shape)} and the layer's "
                f"{tuple(linear.weight.shape)}; both must be the same (N, K)"
            )
        layer = cls.from_quantized(weight, linear.bias, dtype=linear.weight.dtype)
        return layer.to(linear.weight.device).train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight (N, K), made anew each time; changing it changes nothing."""
        return self.dequantize(self.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) in any floating dtype, computed in float32 (float64) and rounded once."""
        return running.dequantize(self.parts, self.format, self.in_features, dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of :attr:`weight`, bit-equal to ``weight[ids]`` (if not rotated); only these are dequantised.

        Args:
            ids: int32 or int64 of any shape (…), in 0 … N − 1, on the layer's device; they may repeat.

        Returns:
            (…, K) in :attr:`dtype`.

        Raises:
            LayerError: ``ids`` of another dtype.

        Example:
            >>> QuantLinear(64, 8, bits=4, group_size=32).rows(torch.tensor([[0, 7, 7]])).shape
            torch.Size([1, 3, 64])
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise LayerError(
                f"ids are {ids.dtype}; give int32 or int64, numbers of rows in 0 … {self.out_features - 1}"
            )
        numbers = ids.reshape(-1)
        rows = running.rows(numbers, self.parts, self.format, self.in_features, self.dtype)
        return rows.reshape(*ids.shape, self.in_features)

    def rounded_input(self, x: Tensor) -> Tensor:
        """Round an input to ``activation_bits``, for use with :attr:`weight`.

        Args:
            x: floating point (…, K), on any device.

        Returns:
            (…, K) in the dtype of ``x``; ``x`` itself if inputs are not rounded.
        """
        if self.activation_bits is None:
            return x
        return running.round_input(x, self.parts, self.format).to(x.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (so it is called in nn.Linear)
        """``x Wᵀ + b``: (…, K) → (…, N) in the dtype of ``input``, or in that of autocast.

        Raises:
            LayerError: the last dimension of ``input`` is not K, or it is not floating point.
        """
        return running.linear(input, self.bias, self.parts, self.format, self.in_features)

    def extra_repr(self) -> str:
        """Describe the layer, for ``repr``."""
        properties = self.format.to_dict()
        del properties["scale_dtype"]
        shown = "".join(f", {name}={value!r}" for name, value in properties.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}{shown}, "
            f"bias={self.bias is not None}, bits_per_weight={self.bits_per_weight:.2f}"
        )
