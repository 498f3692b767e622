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

from tsq_layers.solver import offsets, stage2
from tsq_layers.solver import zeros as zero_points
from tsq_layers.solver.blocks import product
from tsq_layers.solver.coded import Coded
from tsq_layers.solver.descent import quantease as cyclic


def refine(
    problem: Coded, *, rounds: int, sweeps: int, ridge: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Alternate codes and scales.

    Args:
        problem: where to start, see :class:`Coded`; scales are values that ``dtype`` holds.
        rounds: of both.
        sweeps: over the columns, in each round.
        ridge: weight of the pull towards the present scales; see ``stage2.SmallProblem``.
        dtype: what scales are stored in.

    Returns:
        codes uint8 (N, K) and scales (N, G).

    Example:
        >>> from tsq_layers.numerics import grid
        >>> w, x = torch.randn(8, 32), torch.randn(100, 32) @ torch.randn(32, 32)
        >>> scales, zeros = grid.minmax(w, 2, 16, symmetric=False)
        >>> problem = Coded(grid.quantize(w, scales, zeros, 2, 16), w, x.T @ x, scales, zeros, 2, 16)
        >>> options = {"rounds": 2, "sweeps": 1, "ridge": 0.01, "dtype": torch.float32}
        >>> codes, scales = refine(problem, **options)
        >>> better = problem._replace(codes=codes, scales=scales)
        >>> before, after = (x @ found.error().T for found in (problem, better))
        >>> bool(after.norm() < before.norm())
        True
    """
    hessian, group_size = problem.hessian, problem.group_size
    for _ in range(rounds):
        problem = problem._replace(codes=cyclic.descend(problem, sweeps))
        error_H = product(problem.error(), hessian)
        small = stage2.small_problem(
            problem.levels(), error_H, hessian, problem.scales, group_size, ridge
        )
        scales = stage2.accept(small, stage2.exact(small, fallback=small.start), dtype)
        problem = problem._replace(scales=scales)
    return problem.codes, problem.scales


def refine_with_zeros(
    problem: Coded, *, rounds: int, sweeps: int, ridge: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`refine` where, in each round, zero points move by one before all scales are refined.

    Returns:
        codes uint8 (N, K), scales (N, G) and zero points (N, G).
    """
    options: dict[str, Any] = {"rounds": 1, "sweeps": sweeps, "ridge": ridge, "dtype": dtype}
    for _ in range(rounds):
        codes, scales, zeros = zero_points.descend(problem, dtype=dtype)
        codes, scales = refine(problem._replace(codes=codes, scales=scales, zeros=zeros), **options)
        problem = problem._replace(codes=codes, scales=scales, zeros=zeros)
    return problem.codes, problem.scales, problem.zeros


def refine_with_offsets(
    problem: Coded, added: Tensor, *, rounds: int, sweeps: int, ridge: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`refine` for grids with offsets in the place of zero points.

    Args:
        problem: as for :func:`refine`, zero points all 0; its target is W' with the offsets in it.
        added: the offsets to start from, float (N, G), made of values that ``dtype`` holds.
        rounds, sweeps, ridge, dtype: as for :func:`refine`.

    Returns:
        codes uint8 (N, K), scales (N, G) and offsets (N, G), both made of values that ``dtype`` holds.
    """
    target, hessian, scales, bits, group_size = (
        problem.target,
        problem.hessian,
        problem.scales,
        problem.bits,
        problem.group_size,
    )
    for _ in range(rounds):
        spread = offsets.spread(added, group_size, target.shape[1])
        problem = problem._replace(
            codes=cyclic.descend(problem._replace(target=target - spread), sweeps)
        )
        error_H = product(problem.dequantized() + spread - target, hessian)
        small = offsets.small_problem(
            problem.codes, error_H, hessian, problem.scales, added, bits, group_size, ridge
        )
        solution = stage2.exact(small, fallback=small.start, positive=scales.shape[1])
        scales, added = offsets.accept(small, solution, added, bits, dtype)
        problem = problem._replace(scales=scales)
    return problem.codes, problem.scales, added
