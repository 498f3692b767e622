"""`QuantLinear`: a linear layer whose weight is packed codes, and scales and zero points, offsets, or look-up tables.

There may be a sparse part, another basis of the input, and 8-bit inputs beside them.

Shapes: N out_features, K in_features, G groups a row, W words a row.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsq_layers import grid, kernels, packing, running
from tsq_layers.basis import Basis
from tsq_layers.errors import LayerError
from tsq_layers.records import SCALE_DTYPES, Outliers, QuantizedWeight, check_kind


class QuantLinear(nn.Module):
    """A linear layer with a packed weight: ``y = x Wᵀ + b``, W = scales · (codes − zeros).

    With ``offsets`` W = scales · codes + offsets, with ``tables`` W = table[code].

    All that it stores are plain buffers, so that it can be moved, copied and saved like any module.
    Words, zero points and the raw bits of scales, offsets and tables are integers: no change of dtype can touch them.
    ``.to(dtype)`` changes ``bias`` and the dtype of :attr:`weight`. The layer computes in the dtype
    of its input (under autocast, in that of autocast), and sums in at least float32.

    Args:
        in_features: K.
        out_features: N.
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale, ``None`` for the whole row; it need not divide K.
        symmetric: the zero points are the constant 2^(bits−1) and not stored.
        bias: whether there is a bias. It is a parameter and, as in ``nn.Linear``, trainable.
        scale_dtype: float16, bfloat16 or float32, of offsets and tables too. The state dict holds
            raw bits, so it must be loaded into a layer of the same ``scale_dtype``.
        offsets: each group has an offset in ``scale_dtype`` in the place of a zero point.
        tables: a look-up table for each ``"row"`` or each ``"group"``, in the place of scales and zero points.
        rotation: largest block of input columns that is rotated, a power of two; ``None`` is no rotation.
        channel_scaling: input columns are scaled. The codes are for the input in the changed basis, see
            :mod:`tsq_layers.basis`; :attr:`weight` is for the layer's own.
        outliers: entries of the sparse part, which is added to what the codes stand for.
        outlier_columns: whole columns of the sparse part instead; 0 is none.
        activation_bits: 8 rounds inputs too, in the changed basis, see :mod:`tsq_layers.activations`.
        device: of all tensors.
        dtype: of ``bias`` and of :attr:`weight`.

    The new layer is empty, for loading a state dict: all words, grids and biases are zero. Use
    :meth:`from_quantized` or :meth:`from_float` to make one from a quantised weight.

    Raises:
        LayerError: an argument that is not allowed.

    Example:
        >>> from tsq_layers import grid
        >>> linear = nn.Linear(64, 8)
        >>> scales, zeros = grid.minmax(linear.weight.detach(), bits=4, group_size=32, symmetric=False)
        >>> scales = grid.storable(scales, torch.float16)
        >>> codes = grid.quantize(linear.weight.detach(), scales, zeros, bits=4, group_size=32)
        >>> weight = QuantizedWeight(codes, scales.half(), zeros.to(torch.uint8), 4, 32, symmetric=False)
        >>> layer = QuantLinear.from_float(linear, weight)
        >>> layer(torch.zeros(20, 64)).shape
        torch.Size([20, 8])
        >>> layer
        QuantLinear(in_features=64, out_features=8, bits=4, group_size=32, symmetric=False, bias=True, bits_per_weight=5.00)
    """

    words: Tensor
    scale_bits: Tensor | None
    zero_words: Tensor | None
    offset_bits: Tensor | None
    table_bits: Tensor | None
    bias: nn.Parameter | None
    dtype_marker: Tensor
    rotation_signs: Tensor | None
    column_scale_bits: Tensor | None
    outlier_bits: Tensor | None
    outlier_places: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int | None,
        symmetric: bool = False,
        bias: bool = True,
        scale_dtype: torch.dtype = torch.float16,
        offsets: bool = False,
        tables: Literal["row", "group"] | None = None,
        rotation: int | None = None,
        channel_scaling: bool = False,
        outliers: int = 0,
        outlier_columns: int = 0,
        activation_bits: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(in_features, out_features, bits, group_size, scale_dtype)
        _check_tables(bits, tables, symmetric=symmetric, offsets=offsets)
        _check_additions(rotation, outliers, outlier_columns, activation_bits)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size or in_features, symmetric
        self.scale_dtype, self.codebook = scale_dtype, tables
        groups = grid.group_count(in_features, self.group_size)

        def words(columns: int) -> Tensor:
            return torch.zeros(out_features, packing.word_count(columns, bits), dtype=torch.int32, device=device)

        def raw(*shape: int) -> Tensor:
            return torch.zeros(out_features, *shape, dtype=_bits_dtype(scale_dtype), device=device)

        levels = (1 if tables == "row" else groups, 1 << bits)
        self.register_buffer("words", words(in_features))
        self.register_buffer("scale_bits", None if tables else raw(groups))
        self.register_buffer("zero_words", None if symmetric or offsets or tables else words(groups))
        self.register_buffer("offset_bits", raw(groups) if offsets else None)
        self.register_buffer("table_bits", raw(*levels) if tables else None)
        self.rotation, self.activation_bits = rotation, activation_bits
        shape = (outliers,) if outliers else (out_features, outlier_columns)
        self._register_additions(shape if shape[-1] else None, channel_scaling, device)
        # Empty, and not saved: it only follows .to(dtype), as a weight would.
        self.register_buffer("dtype_marker", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self._absent_last()

    def _register_additions(
        self, outliers: tuple[int, ...] | None, channel_scaling: bool, device: torch.device | str | int | None
    ) -> None:
        """Buffers of the basis and of the sparse part, empty: no scaling, and places that are all 0."""
        columns, bits = self.in_features, _bits_dtype(self.scale_dtype)
        signs = None if self.rotation is None else torch.ones(columns, dtype=torch.int8, device=device)
        scaling = torch.ones(columns, device=device, dtype=torch.float32).view(torch.int32) if channel_scaling else None
        self.register_buffer("rotation_signs", signs)
        self.register_buffer("column_scale_bits", scaling)
        values = None if outliers is None else torch.zeros(outliers, dtype=bits, device=device)
        places = None if outliers is None else torch.zeros(outliers[-1], dtype=torch.int32, device=device)
        self.register_buffer("outlier_bits", values)
        self.register_buffer("outlier_places", places)

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
            raise LayerError(f"bias has shape {tuple(bias.shape)}; a weight of shape {rows}×{columns} needs ({rows},)")
        dtype = dtype or (None if bias is None else bias.dtype)
        # Made on meta: every tensor is replaced below.
        layer = cls(
            columns, rows, bits=weight.bits, group_size=weight.group_size, symmetric=weight.symmetric,
            bias=False, scale_dtype=weight.scales.dtype, offsets=weight.offsets is not None, tables=_codebook(weight),
            activation_bits=activation_bits, device="meta", dtype=dtype,
        )  # fmt: skip
        layer.words = packing.pack(weight.codes, weight.bits)
        layer.scale_bits = None if layer.scale_bits is None else _raw(weight.scales)
        layer.zero_words = None if layer.zero_words is None else packing.pack(weight.zeros, weight.bits)
        layer.offset_bits = None if weight.offsets is None else _raw(weight.offsets)
        layer.table_bits = None if weight.tables is None else _raw(weight.tables)
        layer.dtype_marker = torch.empty(0, dtype=dtype, device=weight.codes.device)
        layer._take_additions(weight)
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
                f"the quantised weight is {tuple(weight.codes.shape)} and the layer's {tuple(linear.weight.shape)}; both must be the same (N, K)"
            )
        layer = cls.from_quantized(weight, linear.bias, dtype=linear.weight.dtype)
        return layer.to(linear.weight.device).train(linear.training)

    def _take_additions(self, weight: QuantizedWeight) -> None:
        """Copies of the basis and of the sparse part of a weight."""
        if weight.basis is not None:
            signs, scaling = weight.basis.signs, weight.basis.scaling
            self.rotation = weight.basis.rotation
            self.rotation_signs = None if signs is None else signs.detach().clone()
            self.column_scale_bits = None if scaling is None else scaling.detach().clone().view(torch.int32)
        if weight.outliers is not None and len(weight.outliers.places):
            values = weight.outliers.values.detach().clone(memory_format=torch.contiguous_format)
            self.outlier_bits = values.view(_bits_dtype(values.dtype))
            self.outlier_places = weight.outliers.places.detach().clone()
        self._absent_last()

    def drop_scaling(self) -> None:
        """Forget the column scales, once whatever gives the layer its input applies them; changes :attr:`weight`."""
        self.column_scale_bits = None
        self._absent_last()

    def _absent_last(self) -> None:
        """Put buffers that are ``None`` behind the others: torch.export numbers them as if they were there."""
        for name in [name for name, buffer in self._buffers.items() if buffer is None]:
            self._buffers[name] = self._buffers.pop(name)

    @property
    def basis(self) -> Basis | None:
        """The basis of the input that the codes are in; ``None`` is the layer's own."""
        parts = self.parts
        if parts.signs is None and parts.scaling is None:
            return None
        return Basis(self.rotation, parts.signs, parts.scaling)

    @property
    def outliers(self) -> Outliers | None:
        """The sparse part, in the basis of the codes; ``None`` if there is none."""
        values, places = self.parts.values, self.outlier_places
        if values is None:
            return None
        return Outliers(values, places) if values.dim() == 1 else Outliers(values, columns=places)

    @property
    def parts(self) -> running.Parts:
        """The tensors, as they are run: views of the buffers."""
        scaling = None if self.column_scale_bits is None else self.column_scale_bits.view(torch.float32)
        values = None if self.outlier_bits is None else self.outlier_bits.view(self.scale_dtype)
        return running.Parts(
            self.words, self.grids, self.shifts, self.rotation_signs, scaling, values, self.outlier_places
        )

    @property
    def form(self) -> running.Form:
        """What the tensors do not say."""
        return running.Form(self.bits, self.group_size, self.in_features, self.rotation)

    @property
    def _is_plain(self) -> bool:
        additions = (self.rotation_signs, self.column_scale_bits, self.outlier_bits, self.activation_bits)
        return all(addition is None for addition in additions)

    @property
    def scales(self) -> Tensor:
        """Scales (N, G) in ``scale_dtype``: a view of ``scale_bits``. Beside tables there are none: (N, 0)."""
        if self.scale_bits is None:
            return torch.empty(self.out_features, 0, dtype=self.scale_dtype, device=self.words.device)
        return self.scale_bits.view(self.scale_dtype)

    @property
    def offsets(self) -> Tensor | None:
        """Offsets (N, G) in ``scale_dtype``: a view of ``offset_bits``."""
        return None if self.offset_bits is None else self.offset_bits.view(self.scale_dtype)

    @property
    def tables(self) -> Tensor | None:
        """Levels (N, T, 2^bits) in ``scale_dtype``, T = 1 or G: a view of ``table_bits``."""
        return None if self.table_bits is None else self.table_bits.view(self.scale_dtype)

    @property
    def grids(self) -> Tensor:
        """What :mod:`tsq_layers.kernels` calls so: tables, or else scales."""
        tables = self.tables
        return self.scales if tables is None else tables

    @property
    def shifts(self) -> Tensor | None:
        """What :mod:`tsq_layers.kernels` calls so: packed zero points, or offsets."""
        return self.zero_words if self.offset_bits is None else self.offsets

    @property
    def weight(self) -> Tensor:
        """The dequantised weight (N, K), made anew each time; changing it changes nothing."""
        return self.dequantize(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of :attr:`weight`; it follows ``.to(dtype)``."""
        return self.dtype_marker.dtype

    @property
    def bits_per_weight(self) -> float:
        """All stored bits of the weight (words, scales or tables, zero words, …) for each of its N·K entries."""
        stored = list(self.buffers(recurse=False))  # one of them is empty
        return (
            sum(tensor.numel() * tensor.element_size() for tensor in stored)
            * 8
            / (self.in_features * self.out_features)
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) in any floating dtype, computed in float32 (float64) and rounded once."""
        return running.dequantize(self.parts, self.form, dtype)

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
        rows = running.rows(ids.reshape(-1), self.parts, self.form, self.dtype)
        return rows.reshape(*ids.shape, self.in_features)

    def quantized_weight(self) -> QuantizedWeight:
        """Codes and grids, sparse part and basis; exact inverse of :meth:`from_quantized`."""
        codes = packing.unpack(self.words, self.bits, self.in_features)
        offsets, tables = (None if values is None else values.clone() for values in (self.offsets, self.tables))
        if offsets is None and tables is None:
            zeros = kernels.zero_points(self.scales, self.zero_words, self.bits)
        else:
            zeros = torch.zeros_like(self.scales, dtype=torch.uint8)
        return QuantizedWeight(
            codes, self.scales.clone(), zeros, self.bits, self.group_size, self.symmetric,
            offsets, tables, self.outliers, self.basis,
        )  # fmt: skip

    def rounded_input(self, x: Tensor) -> Tensor:
        """What is left of an input once it is rounded to ``activation_bits``, for use with :attr:`weight`.

        Args:
            x: floating point (…, K), on any device.

        Returns:
            (…, K) in the dtype of ``x``; ``x`` itself if inputs are not rounded.
        """
        if self.activation_bits is None:
            return x
        return running.round_input(x, self.parts, self.form).to(x.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (so it is called in nn.Linear)
        """``x Wᵀ + b``: (…, K) → (…, N) in the dtype of ``input``, or in that of autocast.

        Raises:
            LayerError: the last dimension of ``input`` is not K, or it is not floating point.
        """
        if not self._is_plain:
            return running.linear(input, self.bias, self.parts, self.form, self.activation_bits)
        return kernels.linear(
            input, self.words, self.grids, self.shifts, self.bias, self.bits, self.group_size, self.in_features
        )

    def extra_repr(self) -> str:
        """What the layer is, for ``repr``."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        grids = f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"
        more = "".join(f", {name}={value!r}" for name, value in self.additions().items() if value)
        return f"{shape}, {grids}{more}, bias={self.bias is not None}, bits_per_weight={self.bits_per_weight:.2f}"

    def additions(self) -> dict[str, Any]:
        """What the layer has beside codes, scales and zero points, by the names of the constructor's arguments."""
        shape = () if self.outlier_bits is None else self.outlier_bits.shape
        return {
            "offsets": self.offset_bits is not None,
            "tables": self.codebook,
            "rotation": self.rotation,
            "channel_scaling": self.column_scale_bits is not None,
            "outliers": shape[0] if len(shape) == 1 else 0,
            "outlier_columns": shape[1] if len(shape) == 2 else 0,
            "activation_bits": self.activation_bits,
        }


def _bits_dtype(scale_dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if scale_dtype.itemsize == 4 else torch.int16


def _raw(values: Tensor) -> Tensor:
    """A copy of the raw bits."""
    return values.detach().clone(memory_format=torch.contiguous_format).view(_bits_dtype(values.dtype))


def _codebook(weight: QuantizedWeight) -> Literal["row", "group"] | None:
    if weight.tables is None:
        return None
    return "row" if weight.tables.shape[1] == 1 else "group"


def _check_tables(bits: int, tables: str | None, *, symmetric: bool, offsets: bool) -> None:
    if tables not in (None, "row", "group"):
        raise LayerError(f"tables={tables!r}: give 'row', 'group' or None")
    check_kind(bits, symmetric=symmetric, offsets=offsets, tables=tables is not None)


def _check(in_features: int, out_features: int, bits: int, group_size: int | None, scale_dtype: torch.dtype) -> None:
    for name, value in (
        ("in_features", in_features),
        ("out_features", out_features),
        ("group_size", 1 if group_size is None else group_size),
    ):
        if value < 1:
            raise LayerError(f"{name}={value}: give a positive integer")
    if not 1 <= bits <= 8:
        raise LayerError(f"bits={bits}: give 1 to 8")
    if scale_dtype not in SCALE_DTYPES:
        raise LayerError(f"scale_dtype={scale_dtype}: give float16, bfloat16 or float32")


def _check_additions(rotation: int | None, outliers: int, outlier_columns: int, activation_bits: int | None) -> None:
    if rotation is not None and (rotation < 1 or rotation & (rotation - 1)):
        raise LayerError(f"rotation={rotation}: give a power of two, or None")
    if outliers < 0 or outlier_columns < 0 or (outliers and outlier_columns):
        raise LayerError(f"outliers={outliers}, outlier_columns={outlier_columns}: give one of them, the other 0")
    if activation_bits not in (None, 8):
        raise LayerError(f"activation_bits={activation_bits}: give 8, or None")
