"""The frozen values that cross borders; each is checked once, when it is made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers import grid
from tsq_layers.errors import LayerError

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TABLE_BITS = 4
"""The widest codes of a look-up table: its 16 levels stay in registers."""


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What calibration learnt about the inputs of a layer: sums over tokens, and their number.

    Args:
        hessian: Σ x xᵀ, float32 or float64 (K, K), symmetric; x on the quantised stream. With
            blocks (B, K, K): the N rows of the weight are B contiguous blocks of N/B rows, and
            block b has inputs of its own, whose sum is entry b (the groups of a convolution).
        count: number of tokens, a scalar tensor, the same for every block; it may be on the device.
        deviation: Σ (x − x̃) xᵀ, shaped like ``hessian``, not symmetric; x̃ is the same token's input
            on the full-precision stream. ``None`` where passes were not paired.

    Sums of two processes, or of two parts of the data, add: ``a + b``.

    Raises:
        LayerError: shapes or dtypes that do not fit together.
    """

    hessian: Tensor
    count: Tensor
    deviation: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.hessian.shape)
        if len(shape) not in (2, 3) or shape[-1] != shape[-2] or shape[0] == 0:
            raise LayerError(f"hessian has shape {shape}; give a square matrix (K, K), or one a block (B, K, K)")
        if self.hessian.dtype not in (torch.float32, torch.float64):
            raise LayerError(f"hessian is {self.hessian.dtype}; give float32 or float64")
        if self.deviation is not None and self.deviation.shape != self.hessian.shape:
            raise LayerError(
                f"deviation has shape {tuple(self.deviation.shape)}; the hessian's is {shape}, and both must agree"
            )
        if self.count.numel() != 1:
            raise LayerError(f"count has shape {tuple(self.count.shape)}; give a scalar tensor")

    @property
    def columns(self) -> int:
        """K, the width of the layer's input."""
        return self.hessian.shape[-1]

    @property
    def blocks(self) -> int:
        """B, the number of blocks of rows that have inputs of their own; 1 where all rows share theirs."""
        return self.hessian.shape[0] if self.hessian.dim() == 3 else 1

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        if (self.deviation is None) != (other.deviation is None):
            raise LayerError(
                "statistics with and without deviation do not add: drop it from one, or observe both in pairs"
            )
        if self.hessian.shape != other.hessian.shape:
            raise LayerError(
                f"statistics of shapes {tuple(self.hessian.shape)} and {tuple(other.hessian.shape)} do not add: both must be of the same layer"
            )
        both = self.deviation is not None and other.deviation is not None
        return LayerStatistics(
            self.hessian + other.hessian,
            self.count + other.count,
            self.deviation + other.deviation if both else None,  # type: ignore[operator]
        )


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

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise LayerError(f"bits={self.bits}: give 1 to 8")
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise LayerError(f"codes are {self.codes.dtype} of shape {tuple(self.codes.shape)}; give uint8 (N, K)")
        if self.group_size < 1:
            raise LayerError(f"group_size={self.group_size}: give a positive integer")
        check_kind(
            self.bits, symmetric=self.symmetric, offsets=self.offsets is not None, tables=self.tables is not None
        )
        rows, columns = self.codes.shape
        groups = grid.group_count(columns, self.group_size)
        expected = (rows, groups if self.tables is None else 0)
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tuple(tensor.shape) != expected:
                beside = "" if self.tables is None else " beside tables"
                raise LayerError(
                    f"{name} have shape {tuple(tensor.shape)}; {rows}×{columns} codes in groups of {self.group_size} need {expected}{beside}"
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

    def _check_like_scales(self, name: str, given: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        if tuple(given.shape) not in shapes:
            rows, columns = self.codes.shape
            raise LayerError(
                f"{name} have shape {tuple(given.shape)}; {rows}×{columns} codes of {self.bits} bits in groups of {self.group_size} "
                f"need {' or '.join(map(str, shapes))}"
            )
        if given.dtype != self.scales.dtype:
            raise LayerError(f"{name} are {given.dtype} and scales {self.scales.dtype}; give both in one dtype")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix that the codes stand for, (N, K) in ``dtype``."""
        if self.tables is not None:
            return grid.look_up(self.codes, self.tables, self.group_size, dtype)
        if self.offsets is not None:
            return grid.with_offsets(self.codes, self.scales, self.offsets, self.group_size, dtype)
        return grid.dequantize(self.codes, self.scales, self.zeros, self.group_size, dtype)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per entry of the matrix: codes and scales; zero points, offsets or tables."""
        floats = [values for values in (self.scales, self.offsets, self.tables) if values is not None]
        overhead = self.scales.element_size() * 8 * sum(values.numel() for values in floats)
        if not self.symmetric and self.offsets is None:
            overhead += self.bits * self.zeros.numel()
        return self.bits + overhead / self.codes.numel()

    def split(self, rows: list[int]) -> list["QuantizedWeight"]:
        """Cut a stack of layers into its layers of ``rows`` rows each."""

        def parts(values: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * len(rows) if values is None else values.split(rows)

        grids = zip(parts(self.offsets), parts(self.tables), strict=True)
        always = zip(self.codes.split(rows), self.scales.split(rows), self.zeros.split(rows), strict=True)
        return [
            QuantizedWeight(codes, scales, zeros, self.bits, self.group_size, self.symmetric, offsets, tables)
            for (codes, scales, zeros), (offsets, tables) in zip(always, grids, strict=True)
        ]


def check_kind(bits: int, *, symmetric: bool, offsets: bool, tables: bool) -> None:
    """Refuse kinds of grids that exclude one another.

    Raises:
        LayerError: offsets and tables; either of a symmetric grid; tables of more than 4 bits.
    """
    if offsets and tables:
        raise LayerError("a weight has float offsets or look-up tables, not both; give one of them")
    if symmetric and (offsets or tables):
        kind = "float offsets" if offsets else "look-up tables"
        raise LayerError(f"a weight with {kind} has no zero points that could be symmetric; give symmetric=False")
    if tables and bits > TABLE_BITS:
        raise LayerError(
            f"bits={bits}: look-up tables are of codes of 1 to {TABLE_BITS} bits; give one of these, or scales"
        )
