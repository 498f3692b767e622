"""A quantised weight matrix as a value: codes, grids, a sparse part, a basis; checked once, when it is made."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tsq_layers.errors import LayerError
from tsq_layers.numerics import grid
from tsq_layers.numerics.basis import Basis
from tsq_layers.numerics.sync import to_host
from tsq_layers.numerics.weight_format import (
    SCALE_DTYPES,
    BufferSpec,
    FormatKeywords,
    WeightFormat,
)

__all__ = [
    "SCALE_DTYPES",
    "BufferSpec",
    "FormatKeywords",
    "Outliers",
    "QuantizedWeight",
    "WeightFormat",
    "out_of_range",
    "stacked",
]


@dataclass(frozen=True, eq=False)
class Outliers:
    """The sparse part of a weight matrix (N, K), added to what its codes stand for.

    Single entries, or whole columns: exactly one of ``indices`` and ``columns`` is given.

    Args:
        values: float16, bfloat16 or float32; (E,) of entries, (N, C) of columns.
        indices: int32 (E,), the places row·K + column, ascending, none twice.
        columns: int32 (C,), ascending, none twice.

    Raises:
        LayerError: shapes or dtypes that do not fit together.

    Example:
        >>> outliers = Outliers(torch.tensor([1.5, -2.0]), indices=torch.tensor([1, 5], dtype=torch.int32))
        >>> outliers.added_to(torch.zeros(2, 3))
        tensor([[ 0.0000,  1.5000,  0.0000],
                [ 0.0000,  0.0000, -2.0000]])
    """

    values: Tensor
    indices: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.indices is None) == (self.columns is None):
            raise LayerError("outliers have indices and columns, or neither; give one of them")
        if self.values.dtype not in SCALE_DTYPES:
            raise LayerError(
                f"values of outliers are {self.values.dtype}; give float16, bfloat16 or float32"
            )
        if self.places.dtype != torch.int32 or self.places.dim() != 1:
            raise LayerError(
                f"places of outliers are {self.places.dtype} of shape {tuple(self.places.shape)}; "
                "give int32 of one dimension"
            )
        dimensions = 1 if self.columns is None else 2
        if self.values.dim() != dimensions or self.values.shape[-1] != len(self.places):
            raise LayerError(
                f"values of outliers have shape {tuple(self.values.shape)} for {len(self.places)} places; "
                "give (E,) for E entries, (N, C) for C columns"
            )

    def to(self, device: torch.device | str) -> "Outliers":
        """All of it on a device."""
        places = self.places.to(device)
        where = {"columns": places} if self.indices is None else {"indices": places}
        return Outliers(self.values.to(device), **where)

    @property
    def places(self) -> Tensor:
        """The indices or columns."""
        found = self.indices if self.indices is not None else self.columns
        assert found is not None
        return found

    def added_to(self, weight: Tensor) -> Tensor:
        """The sum of a dense weight (N, K) and these, a new tensor in the dtype of ``weight``."""
        values = self.values.to(weight.dtype)
        if self.columns is not None:
            return weight.index_add(1, self.columns, values)
        return weight.reshape(-1).index_add(0, self.places, values).view(weight.shape)

    def split(self, rows: list[int], columns: int) -> list["Outliers"]:
        """Cut those of a stack of layers of K = ``columns`` columns into those of its layers."""
        if self.columns is not None:
            return [Outliers(values, columns=self.columns) for values in self.values.split(rows)]
        ends = list(itertools.accumulate(rows))
        counts = to_host(*((self.places < end * columns).sum() for end in ends))
        limits = [0, *map(int, counts)]
        return [
            Outliers(self.values[low:high], self.places[low:high] - (end - height) * columns)
            for low, high, end, height in zip(limits, limits[1:], ends, rows, strict=False)
        ]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight matrix as integers and grids: ``weight = scales · (codes − zeros)`` per group.

    With ``offsets`` it is ``scales · codes + offsets``, with ``tables`` it is ``table[code]``: at most one of the two.

    Args:
        codes: uint8 (N, K), each in 0 … 2^bits − 1.
        scales: float16, bfloat16 or float32 (N, G).
        zeros: uint8 (N, G), each in 0 … 2^bits − 1; 2^(bits−1) everywhere if symmetric.
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale; G = ceil(K / group_size).
        symmetric: whether the zero points are the constant 2^(bits−1) and need not be stored.
        offsets: (N, G) in the dtype of ``scales``; zero points are then not used, make them 0.
        tables: (N, T, 2^bits) in the dtype of ``scales``: a table for each row (T = 1) or each group
            (T = G), of codes of at most 4 bits. ``scales`` and ``zeros`` are then empty, (N, 0).
        outliers: a sparse part that is added, its values in the dtype of the scales; ``None`` if there is none.
        basis: the basis of the input that codes and outliers are in; ``None`` is the layer's own.

    Raises:
        LayerError: shapes or dtypes that do not fit together.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    symmetric: bool
    offsets: Tensor | None = None
    tables: Tensor | None = None
    outliers: Outliers | None = None
    basis: Basis | None = None

    def __post_init__(self) -> None:
        self._check_format()
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise LayerError(
                f"codes are {self.codes.dtype} of shape {tuple(self.codes.shape)}; give uint8 (N, K)"
            )
        rows, columns = self.codes.shape
        groups = grid.group_count(columns, self.group_size)
        expected = (rows, groups if self.tables is None else 0)
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tuple(tensor.shape) != expected:
                beside = "" if self.tables is None else " beside tables"
                raise LayerError(
                    f"{name} have shape {tuple(tensor.shape)}; {rows}×{columns} codes in groups of "
                    f"{self.group_size} need {expected}{beside}"
                )
        if self.scales.dtype not in SCALE_DTYPES:
            raise LayerError(f"scales are {self.scales.dtype}; give float16, bfloat16 or float32")
        if self.zeros.dtype != torch.uint8:
            raise LayerError(f"zeros are {self.zeros.dtype}; give uint8")
        if self.offsets is not None:
            self._check_like_scales("offsets", self.offsets, [expected])
        if self.tables is not None:
            shapes = [(rows, count, 1 << self.bits) for count in dict.fromkeys((1, groups))]
            self._check_like_scales("tables", self.tables, shapes)
        self._check_additions()

    @property
    def format(self) -> WeightFormat:
        """The format of the weight; inputs are not rounded."""
        basis, outliers = self.basis, self.outliers
        return replace(
            self._check_format(),
            scale_dtype=self.scales.dtype,
            rotation=None if basis is None else basis.rotation,
            channel_scaling=basis is not None and basis.scaling is not None,
            outliers=0 if outliers is None or outliers.indices is None else len(outliers.indices),
            outlier_columns=0
            if outliers is None or outliers.columns is None
            else len(outliers.columns),
        )

    def _check_format(self) -> WeightFormat:
        """The format of codes and grids, in a dtype of scales that is not looked at."""
        tables: Literal["row", "group"] | None = None
        if self.tables is not None:
            tables = "row" if self.tables.dim() == 3 and self.tables.shape[1] == 1 else "group"
        return WeightFormat.of(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            offsets=self.offsets is not None,
            tables=tables,
        )

    def _check_like_scales(
        self, name: str, given: Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        if tuple(given.shape) not in shapes:
            rows, columns = self.codes.shape
            raise LayerError(
                f"{name} have shape {tuple(given.shape)}; {rows}×{columns} codes of {self.bits} "
                f"bits in groups of {self.group_size} "
                f"need {' or '.join(map(str, shapes))}"
            )
        if given.dtype != self.scales.dtype:
            raise LayerError(
                f"{name} are {given.dtype} and scales {self.scales.dtype}; give both in one dtype"
            )

    def _check_additions(self) -> None:
        rows, columns = self.codes.shape
        if self.basis is not None and self.basis.columns != columns:
            raise LayerError(
                f"the basis is of {self.basis.columns} columns, the weight has {columns}"
            )
        if self.outliers is None:
            return
        values = self.outliers.values
        if values.dtype != self.scales.dtype:
            raise LayerError(
                f"outliers are {values.dtype} and scales {self.scales.dtype}; give both in one dtype"
            )
        if self.outliers.columns is not None and values.shape[0] != rows:
            raise LayerError(
                f"columns of outliers have {values.shape[0]} rows, the weight has {rows}"
            )
        if self.outliers.indices is not None and rows * columns >= 2**31:
            raise LayerError(
                f"{rows}×{columns} entries are too many for 32-bit indices of outliers; give whole columns"
            )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix that is stood for, (N, K) in ``dtype``, for the layer's own inputs."""
        if self.outliers is None and self.basis is None:
            return self._of_codes(dtype)
        weight = self._of_codes(torch.float64 if dtype == torch.float64 else torch.float32)
        weight = weight if self.outliers is None else self.outliers.added_to(weight)
        return (weight if self.basis is None else self.basis.restore(weight)).to(dtype)

    def _of_codes(self, dtype: torch.dtype) -> Tensor:
        if self.tables is not None:
            return grid.look_up(self.codes, self.tables, self.group_size, dtype)
        if self.offsets is not None:
            return grid.with_offsets(self.codes, self.scales, self.offsets, self.group_size, dtype)
        return grid.dequantize(self.codes, self.scales, self.zeros, self.group_size, dtype)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """All of it on a device."""
        names = ("codes", "scales", "zeros", "offsets", "tables", "outliers", "basis")
        there = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value.to(device) for name, value in there.items()})

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per entry of the matrix: codes and grids, sparse part and basis."""
        stored = [self.scales, self.offsets, self.tables]
        stored += [] if self.outliers is None else [self.outliers.values, self.outliers.places]
        stored += [] if self.basis is None else [self.basis.signs, self.basis.scaling]
        overhead = 8 * sum(
            values.numel() * values.element_size() for values in stored if values is not None
        )
        if not self.symmetric and self.offsets is None:
            overhead += self.bits * self.zeros.numel()
        return self.bits + overhead / self.codes.numel()

    def split(self, rows: list[int]) -> list["QuantizedWeight"]:
        """Cut a stack of layers into its layers of ``rows`` rows each."""

        def parts(values: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * len(rows) if values is None else values.split(rows)

        sparse: Sequence[Outliers | None] = [None] * len(rows)
        if self.outliers is not None:
            sparse = self.outliers.split(rows, self.codes.shape[1])
        always = zip(
            self.codes.split(rows), self.scales.split(rows), self.zeros.split(rows), strict=True
        )
        grids = zip(parts(self.offsets), parts(self.tables), sparse, strict=True)
        return [
            replace(
                self,
                codes=codes,
                scales=scales,
                zeros=zeros,
                offsets=offsets,
                tables=tables,
                outliers=outliers,
            )
            for (codes, scales, zeros), (offsets, tables, outliers) in zip(
                always, grids, strict=True
            )
        ]


def out_of_range(stored: QuantizedWeight, weight: Tensor) -> Tensor:
    """Rows in which numbers were held at an end of what their dtype holds, bool (N,).

    Args:
        stored: what was made of a weight.
        weight: float (N, K); rows of zeros need no scale.

    Example:
        >>> codes, zeros = torch.ones(3, 4, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8)
        >>> scales = torch.tensor([[65504.0], [1.0], [0.0]]).half()
        >>> stored = QuantizedWeight(codes, scales, zeros, bits=2, group_size=4, symmetric=False)
        >>> out_of_range(stored, torch.tensor([[1e9], [3.0], [1e-9]]).expand(3, 4))
        tensor([ True, False,  True])
    """
    numbers = [
        values
        for values in (stored.scales, stored.offsets, stored.tables)
        if values is not None and values.numel()
    ]
    found = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
    for values in numbers:
        found |= (values.abs() >= torch.finfo(values.dtype).max).flatten(1).any(1)
    if stored.scales.numel():
        found |= (stored.scales <= grid.smallest(stored.scales.dtype)).all(1) & (weight != 0).any(1)
    return found


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Stack the rows of several weights of one format; the inverse of :meth:`QuantizedWeight.split`.

    Sparse parts and bases are not stacked: there must be none.

    Raises:
        LayerError: they are not of one kind.

    Example:
        >>> codes, scales = torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1)
        >>> part = QuantizedWeight(codes, scales, scales.to(torch.uint8), 4, 8, symmetric=False)
        >>> stacked([part, part]).codes.shape
        torch.Size([4, 8])
    """
    first = weights[0]
    forms = {
        (weight.bits, weight.group_size, weight.symmetric, weight.scales.dtype)
        for weight in weights
    }
    plain = all(
        weight.tables is None and weight.outliers is None and weight.basis is None
        for weight in weights
    )
    offsets = [weight.offsets for weight in weights if weight.offsets is not None]
    if len(forms) > 1 or not plain or len(offsets) not in (0, len(weights)):
        raise LayerError(
            "only weights of codes and scales of one width, group size, kind and dtype are stacked"
        )
    if len(weights) == 1:
        return first
    codes, scales, zeros = (
        torch.cat([getattr(w, name) for w in weights]) for name in ("codes", "scales", "zeros")
    )
    return replace(
        first,
        codes=codes,
        scales=scales,
        zeros=zeros,
        offsets=torch.cat(offsets) if offsets else None,
    )
