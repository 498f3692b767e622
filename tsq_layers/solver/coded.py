"""Define the problem of steps that improve codes: target, metric, grids and present codes."""

from typing import NamedTuple

from torch import Tensor

from tsq_layers.numerics import grid


class Coded(NamedTuple):
    """A target, a metric, and codes on grids: Q, whose loss (Q − W') H (Q − W')ᵀ is to fall.

    Everything floating may be float32 or float64. Use ``_replace`` for the same problem from another start.

    Attributes:
        codes: where to start, uint8 (N, K).
        target: W' float (N, K).
        hessian: damped H, (K, K), or (B, K, K) for B contiguous blocks of rows.
        scales: positive, float (N, G).
        zeros: float (N, G).
        bits: of a code.
        group_size: columns that share a scale; the last group may have fewer.
        free: bool (N, K); where it is false Q is to be zero. ``None``: nowhere.

    Example:
        >>> import torch
        >>> scales, zeros = torch.tensor([[0.5]]), torch.tensor([[1.0]])
        >>> codes = torch.tensor([[0, 1, 3]], dtype=torch.uint8)
        >>> problem = Coded(codes, torch.tensor([[-0.5, 0.0, 0.75]]), torch.eye(3), scales, zeros, 2, 3)
        >>> problem.error()
        tensor([[0.0000, 0.0000, 0.2500]])
        >>> problem._replace(codes=torch.zeros_like(codes)).dequantized()
        tensor([[-0.5000, -0.5000, -0.5000]])
    """

    codes: Tensor
    target: Tensor
    hessian: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    free: Tensor | None = None

    def levels(self) -> Tensor:
        """Return the integers code − zero, in the dtype of the target, (N, K)."""
        return grid.centered(self.codes, self.zeros, self.group_size, self.target.dtype)

    def dequantized(self) -> Tensor:
        """Return Q (N, K), in the dtype of the target."""
        return grid.dequantize(
            self.codes, self.scales, self.zeros, self.group_size, self.target.dtype
        )

    def error(self) -> Tensor:
        """Return Q − W' (N, K)."""
        return self.dequantized() - self.target
