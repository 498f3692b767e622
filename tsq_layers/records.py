"""The frozen values that cross borders; each is checked once, when it is made."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers import grid
from tsq_layers.errors import LayerError

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
class Outliers:
    """Entries of a weight matrix (N, K) that are kept apart and added to what the codes stand for.

    Args:
        values: float16, bfloat16 or float32; (nnz,) with ``indices``, (N, C) with ``columns``.
        indices: where single entries are, row·K + column, ascending, int32 (nnz,).
        columns: which whole columns they are, ascending, int32 (C,).
    """

    values: Tensor
    indices: Tensor | None = None
    columns: Tensor | None = None

    def dense(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (N, K) of these entries and zeros."""
        found = torch.zeros(rows, columns, dtype=dtype, device=self.values.device)
        if self.columns is not None:
            return found.index_copy_(1, self.columns.long(), self.values.to(dtype))
        if self.indices is None:
            raise LayerError("outliers have neither indices nor columns; give one of them")
        found.view(-1).index_copy_(0, self.indices.long(), self.values.to(dtype))
        return found


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight matrix as integers and grids: ``weight = scales · (codes − zeros)`` per group.

    Args:
        codes: uint8 (N, K), each in 0 … 2^bits − 1.
        scales: float16, bfloat16 or float32 (N, G).
        zeros: uint8 (N, G), each in 0 … 2^bits − 1; 2^(bits−1) everywhere if symmetric.
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale; G = ceil(K / group_size).
        symmetric: whether the zero points are the constant 2^(bits−1) and need not be stored.
        offsets: added to scales · codes, (N, G); zero points are then all 0.
        tables: levels that the codes are numbers of, (N, T, 2^bits), T = 1 or G; scales and zeros are then (N, 0).
        outliers: entries that are added.

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

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise LayerError(f"bits={self.bits}: give 1 to 8")
        if self.codes.dim() != 2 or self.codes.dtype != torch.uint8:
            raise LayerError(f"codes are {self.codes.dtype} of shape {tuple(self.codes.shape)}; give uint8 (N, K)")
        if self.group_size < 1:
            raise LayerError(f"group_size={self.group_size}: give a positive integer")
        rows, columns = self.codes.shape
        expected = (rows, grid.group_count(columns, self.group_size) if self.tables is None else 0)
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tuple(tensor.shape) != expected:
                raise LayerError(
                    f"{name} have shape {tuple(tensor.shape)}; {rows}×{columns} codes in groups of {self.group_size} need {expected}"
                )
        if self.scales.dtype not in SCALE_DTYPES:
            raise LayerError(f"scales are {self.scales.dtype}; give float16, bfloat16 or float32")
        if self.zeros.dtype != torch.uint8:
            raise LayerError(f"zeros are {self.zeros.dtype}; give uint8")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight matrix that the codes stand for, (N, K) in ``dtype``."""
        return grid.dequantize(self.codes, self.scales, self.zeros, self.group_size, dtype)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per entry of the matrix: codes, scales and zero points."""
        overhead = self.scales.element_size() * 8 + (0 if self.symmetric else self.bits)
        return self.bits + overhead * self.scales.numel() / self.codes.numel()

    def split(self, rows: list[int]) -> list["QuantizedWeight"]:
        """Cut a stack of layers into its layers of ``rows`` rows each."""
        parts = zip(self.codes.split(rows), self.scales.split(rows), self.zeros.split(rows), strict=True)
        return [
            QuantizedWeight(codes, scales, zeros, self.bits, self.group_size, self.symmetric)
            for codes, scales, zeros in parts
        ]
