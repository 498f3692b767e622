"""Define :class:`LayerStatistics`, the sums over a layer's inputs that the solver reads.

Shapes: K columns of the weight (input features), B row blocks of the weight that have inputs of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers.errors import LayerError


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The sums over the tokens of a layer's inputs: H, R and the number of tokens.

    Sums of two processes, or of two parts of the data, add up: ``a + b``.

    Args:
        hessian: H = Σ x xᵀ, float32 or float64 (K, K), symmetric; x is an input on the quantised
            stream. With B row blocks it is (B, K, K): the N rows of the weight are B contiguous blocks
            of N/B rows, and entry b sums the inputs of block b (the groups of a convolution).
        count: number of tokens, a scalar tensor on any device, the same for every row block.
        deviation: R = Σ (x − x̃) xᵀ, shaped like ``hessian``, not symmetric; x̃ is the input of the same
            token on the full-precision stream. ``None`` if calibration had no full-precision stream.

    Raises:
        LayerError: shapes or dtypes do not fit together.

    Example:
        >>> x = torch.randn(100, 8)
        >>> statistics = LayerStatistics(x.T @ x, torch.tensor(100))
        >>> int((statistics + statistics).count)
        200
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
                f"deviation has shape {tuple(self.deviation.shape)}; "
                f"the hessian's is {shape}, and both must agree"
            )
        if self.count.numel() != 1:
            raise LayerError(f"count has shape {tuple(self.count.shape)}; give a scalar tensor")

    @property
    def columns(self) -> int:
        """K, the width of the layer's input."""
        return self.hessian.shape[-1]

    @property
    def blocks(self) -> int:
        """B, the number of row blocks that have inputs of their own; 1 if all rows share their inputs."""
        return self.hessian.shape[0] if self.hessian.dim() == 3 else 1

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        if (self.deviation is None) != (other.deviation is None):
            raise LayerError(
                "statistics with and without deviation do not add: "
                "drop it from one, or observe both in pairs"
            )
        if self.hessian.shape != other.hessian.shape:
            raise LayerError(
                f"statistics of shapes {tuple(self.hessian.shape)} and {tuple(other.hessian.shape)} "
                "do not add: both must be of the same layer"
            )
        deviation = None
        if self.deviation is not None and other.deviation is not None:
            deviation = self.deviation + other.deviation
        return LayerStatistics(self.hessian + other.hessian, self.count + other.count, deviation)
