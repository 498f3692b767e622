"""What a packed layer stores: buffers of integers, and views of them as what they mean.

Shapes: N out_features, K in_features, G groups a row, W words a row.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsq_layers.errors import LayerError
from tsq_layers.numerics import grid, packing
from tsq_layers.numerics.basis import Basis
from tsq_layers.numerics.weight import SCALE_DTYPES, Outliers, QuantizedWeight, check_kind
from tsq_layers.runtime import forward as running


class PackedStorage(nn.Module):
    """The buffers of a :class:`~tsq_layers.runtime.linear.QuantLinear`, which describes the arguments; it computes nothing.

    Raises:
        LayerError: an argument that is not allowed.

    Example:
        >>> storage = PackedStorage(64, 8, bits=4, group_size=32)
        >>> storage.words.shape, storage.scales.shape, storage.bits_per_weight
        (torch.Size([8, 8]), torch.Size([8, 2]), 5.0)
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
            return torch.zeros(
                out_features, packing.word_count(columns, bits), dtype=torch.int32, device=device
            )

        def raw(*shape: int) -> Tensor:
            return torch.zeros(out_features, *shape, dtype=_bits_dtype(scale_dtype), device=device)

        levels = (1 if tables == "row" else groups, 1 << bits)
        self.register_buffer("words", words(in_features))
        self.register_buffer("scale_bits", None if tables else raw(groups))
        self.register_buffer(
            "zero_words", None if symmetric or offsets or tables else words(groups)
        )
        self.register_buffer("offset_bits", raw(groups) if offsets else None)
        self.register_buffer("table_bits", raw(*levels) if tables else None)
        self.rotation, self.activation_bits = rotation, activation_bits
        shape = (outliers,) if outliers else (out_features, outlier_columns)
        self._register_additions(shape if shape[-1] else None, channel_scaling, device)
        # Empty, and not saved: it only follows .to(dtype), as a weight would.
        self.register_buffer(
            "dtype_marker", torch.empty(0, dtype=dtype, device=device), persistent=False
        )
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )
        self._absent_last()

    def _register_additions(
        self,
        outliers: tuple[int, ...] | None,
        channel_scaling: bool,
        device: torch.device | str | int | None,
    ) -> None:
        """Buffers of the basis and of the sparse part, empty: no scaling, and places that are all 0."""
        columns, bits = self.in_features, _bits_dtype(self.scale_dtype)
        signs = (
            None if self.rotation is None else torch.ones(columns, dtype=torch.int8, device=device)
        )
        scaling = (
            torch.ones(columns, device=device, dtype=torch.float32).view(torch.int32)
            if channel_scaling
            else None
        )
        self.register_buffer("rotation_signs", signs)
        self.register_buffer("column_scale_bits", scaling)
        values = None if outliers is None else torch.zeros(outliers, dtype=bits, device=device)
        places = (
            None
            if outliers is None
            else torch.zeros(outliers[-1], dtype=torch.int32, device=device)
        )
        self.register_buffer("outlier_bits", values)
        self.register_buffer("outlier_places", places)

    def _take_additions(self, weight: QuantizedWeight) -> None:
        """Copies of the basis and of the sparse part of a weight."""
        if weight.basis is not None:
            signs, scaling = weight.basis.signs, weight.basis.scaling
            self.rotation = weight.basis.rotation
            self.rotation_signs = None if signs is None else signs.detach().clone()
            self.column_scale_bits = (
                None if scaling is None else scaling.detach().clone().view(torch.int32)
            )
        if weight.outliers is not None and len(weight.outliers.places):
            values = weight.outliers.values.detach().clone(memory_format=torch.contiguous_format)
            self.outlier_bits = values.view(_bits_dtype(values.dtype))
            self.outlier_places = weight.outliers.places.detach().clone()
        self._absent_last()

    def drop_scaling(self) -> None:
        """Forget the column scales, once whatever gives the layer its input applies them; changes :attr:`weight`."""
        self.column_scale_bits = None
        self._absent_last()

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
        scaling = (
            None if self.column_scale_bits is None else self.column_scale_bits.view(torch.float32)
        )
        values = None if self.outlier_bits is None else self.outlier_bits.view(self.scale_dtype)
        return running.Parts(
            self.words,
            self.grids,
            self.shifts,
            self.rotation_signs,
            scaling,
            values,
            self.outlier_places,
        )

    @property
    def form(self) -> running.Form:
        """What the tensors do not say."""
        return running.Form(self.bits, self.group_size, self.in_features, self.rotation)

    @property
    def scales(self) -> Tensor:
        """Scales (N, G) in ``scale_dtype``: a view of ``scale_bits``. Beside tables there are none: (N, 0)."""
        if self.scale_bits is None:
            return torch.empty(
                self.out_features, 0, dtype=self.scale_dtype, device=self.words.device
            )
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
        """What :mod:`tsq_layers.runtime.kernels` calls so: tables, or else scales."""
        tables = self._buffers[
            "table_bits"
        ]  # not by attribute: that takes a microsecond, and this is asked for at each call
        bits = self._buffers["scale_bits"] if tables is None else tables
        assert bits is not None
        return bits.view(self.scale_dtype)

    @property
    def shifts(self) -> Tensor | None:
        """What :mod:`tsq_layers.runtime.kernels` calls so: packed zero points, or offsets."""
        offsets = self._buffers["offset_bits"]
        return self._buffers["zero_words"] if offsets is None else offsets.view(self.scale_dtype)

    def _absent_last(self) -> None:
        """Put buffers that are ``None`` behind the others: torch.export numbers them as if they were there."""
        additions = (
            self.rotation_signs,
            self.column_scale_bits,
            self.outlier_bits,
            self.activation_bits,
        )
        self._is_plain = all(addition is None for addition in additions)
        for name in [name for name, buffer in self._buffers.items() if buffer is None]:
            self._buffers[name] = self._buffers.pop(name)

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


def raw_bits(values: Tensor) -> Tensor:
    """A copy of the raw bits of scales, offsets or tables."""
    return (
        values.detach().clone(memory_format=torch.contiguous_format).view(_bits_dtype(values.dtype))
    )


def codebook_of(weight: QuantizedWeight) -> Literal["row", "group"] | None:
    """Whose look-up tables a weight has."""
    if weight.tables is None:
        return None
    return "row" if weight.tables.shape[1] == 1 else "group"


def _check_tables(bits: int, tables: str | None, *, symmetric: bool, offsets: bool) -> None:
    if tables not in (None, "row", "group"):
        raise LayerError(f"tables={tables!r}: give 'row', 'group' or None")
    check_kind(bits, symmetric=symmetric, offsets=offsets, tables=tables is not None)


def _check(
    in_features: int, out_features: int, bits: int, group_size: int | None, scale_dtype: torch.dtype
) -> None:
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


def _check_additions(
    rotation: int | None, outliers: int, outlier_columns: int, activation_bits: int | None
) -> None:
    if rotation is not None and (rotation < 1 or rotation & (rotation - 1)):
        raise LayerError(f"rotation={rotation}: give a power of two, or None")
    if outliers < 0 or outlier_columns < 0 or (outliers and outlier_columns):
        raise LayerError(
            f"outliers={outliers}, outlier_columns={outlier_columns}: give one of them, the other 0"
        )
    if activation_bits not in (None, 8):
        raise LayerError(f"activation_bits={activation_bits}: give 8, or None")
