"""Joint refinement: codes and scales in turn, from the result of both stages.

What stage 2 minimises over the scales, (Q − W') H (Q − W')ᵀ with H damped, is minimised over both: a few
sweeps of coordinate descent on the codes with the scales kept (cyclic.py), then all scales of a row at
once with the codes kept (stage2.py), with the same pull towards the scales of the round before and the
same acceptance of each row only if its loss falls with the scales as they are stored. So no step
raises the loss of a row.

Zero points can take part: integer ones by steps of one (zeros.py), and offsets that are any number as scales
do (offsets.py).
"""

from typing import Any

import torch
from torch import Tensor

from tsq_layers import grid
from tsq_layers.solver import cyclic, offsets, stage2
from tsq_layers.solver import zeros as zero_points
from tsq_layers.solver.blocks import product


def refine(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    *,
    rounds: int,
    sweeps: int,
    ridge: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Alternate codes and scales.

    Args:
        codes: where to start, uint8 (N, K).
        target: W' float (N, K).
        hessian: damped H, (K, K), or (B, K, K) for blocks of rows.
        scales: float (N, G), made of values that ``dtype`` holds.
        zeros: float (N, G).
        rounds: of both.
        sweeps: over the columns, in each round.
        ridge: weight of the pull towards the present scales; see ``stage2.SmallProblem``.
        dtype: what scales are stored in.

    Returns:
        codes uint8 (N, K) and scales (N, G).

    Example:
        >>> w, x = torch.randn(8, 32), torch.randn(100, 32) @ torch.randn(32, 32)
        >>> scales, zeros = grid.minmax(w, 2, 16, symmetric=False)
        >>> codes = grid.quantize(w, scales, zeros, 2, 16)
        >>> options = {"rounds": 2, "sweeps": 1, "ridge": 0.01, "dtype": torch.float32}
        >>> new_codes, new_scales = refine(codes, w, x.T @ x, scales, zeros, 2, 16, **options)
        >>> before = x @ (grid.dequantize(codes, scales, zeros, 16) - w).T
        >>> after = x @ (grid.dequantize(new_codes, new_scales, zeros, 16) - w).T
        >>> bool(after.norm() < before.norm())
        True
    """
    for _ in range(rounds):
        codes = cyclic.descend(codes, target, hessian, scales, zeros, bits, group_size, sweeps)
        steps = grid.centered(codes, zeros, group_size, target.dtype)
        pulled = product(grid.scaled(steps, scales, group_size) - target, hessian)
        small = stage2.small_problem(steps, pulled, hessian, scales, group_size, ridge)
        scales = stage2.accept(small, stage2.exact(small, fallback=small.start), dtype)
    return codes, scales


def refine_with_zeros(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    *,
    rounds: int,
    sweeps: int,
    ridge: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`refine` where, in each round, zero points move by one before all scales are refined.

    Returns:
        codes uint8 (N, K), scales (N, G) and zero points (N, G).
    """
    options: dict[str, Any] = {"rounds": 1, "sweeps": sweeps, "ridge": ridge, "dtype": dtype}
    for _ in range(rounds):
        given = codes, target, hessian, scales, zeros, bits, group_size
        codes, scales, zeros = zero_points.descend(*given, dtype=dtype)
        codes, scales = refine(codes, target, hessian, scales, zeros, bits, group_size, **options)
    return codes, scales, zeros


def refine_with_offsets(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    scales: Tensor,
    added: Tensor,
    bits: int,
    group_size: int,
    *,
    rounds: int,
    sweeps: int,
    ridge: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`refine` for grids with offsets (N, G) in the place of zero points.

    Returns:
        codes uint8 (N, K), scales (N, G) and offsets (N, G), both made of values that ``dtype`` holds.
    """
    none = torch.zeros_like(scales)
    for _ in range(rounds):
        spread = offsets.spread(added, group_size, target.shape[1])
        codes = cyclic.descend(codes, target - spread, hessian, scales, none, bits, group_size, sweeps)
        values = grid.dequantize(codes, scales, none, group_size, target.dtype) + spread
        pulled = product(values - target, hessian)
        small = offsets.small_problem(codes, pulled, hessian, scales, added, bits, group_size, ridge)
        solution = stage2.exact(small, fallback=small.start, positive=scales.shape[1])
        scales, added = offsets.accept(small, solution, added, bits, dtype)
    return codes, scales, added
