"""Sums over the inputs of a layer, as a value: H, R and the number of tokens; checked once, when it is made."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers.errors import LayerError


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
            raise LayerError(
                f"hessian has shape {shape}; give a square matrix (K, K), or one a block (B, K, K)"
            )
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
