"""Stage 2: integers frozen, all scales of a row refined on the layer-wise loss, in closed form.

Two-Stage (arXiv 2602.02126), second stage. With n_i the integers of group i, a change δ = s − s° of
the G scales of a row changes its loss by a quadratic,

    δᵀ A δ − 2 rᵀ δ,     A_ij = n_iᵀ H_ij n_j,     r_i = n_iᵀ H_{i,:} (w' − q°)

so A (G×G) and r are built once and everything after that happens in the small space. The paper's
coordinate step, s_i += n_iᵀ H_{i,:}(w' − q) / n_iᵀ H_ii n_i, is δ_i = (r_i − Σ_{j≠i} A_ij δ_j)/A_ii;
the minimiser of all scales at once solves A δ = r. Both are pulled back towards s°, the scales of
stage 1, with weight ρ·A_ii, which bounds scales that the data hardly determine:

    F(δ) = δᵀ A δ − 2 rᵀ δ + ρ Σ_i A_ii δ_i²

Differences from s° and q° rather than s and w' themselves: the loss is a small part of w'ᵀHw', and
float32 would lose it.

Shapes: N rows, K columns, G groups; the rows may be B blocks with a metric each (see blocks.py), of
which only the building of A takes notice, some rows C or some blocks at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver.blocks import chunks, fold, stack

GRAM_WEIGHTS = 2**21
"""Weights of which Gram matrices are built at once."""

SYSTEM_ENTRIES = 2**21
"""Entries of the systems that are solved at once: bounds the temporaries."""

PANEL_COLUMNS = 512
"""Columns whose products with those of a group are held at once."""


@dataclass(frozen=True, eq=False)
class SmallProblem:
    """Stage 2 in the small space.

    Attributes:
        gram: A, float32 (N, G, G).
        slope: r, float32 (N, G).
        start: s°, the scales of stage 1, float32 (N, G).
        ridge: ρ.
    """

    gram: Tensor
    slope: Tensor
    start: Tensor
    ridge: float

    def objective(self, scales: Tensor) -> Tensor:
        """Return F of each row at these scales, 0 at the start: (N, G) → (N,)."""
        return self.loss(scales) + self.ridge * (
            self.gram.diagonal(dim1=1, dim2=2) * (scales - self.start).square()
        ).sum(1)

    def loss(self, scales: Tensor) -> Tensor:
        """Return the change of the layer-wise loss of each row from the start, without the ridge: (N, G) → (N,)."""
        change = scales - self.start
        curvature = torch.bmm(self.gram, change.unsqueeze(-1)).squeeze(-1)
        return (change * (curvature - 2 * self.slope)).sum(1)


def small_problem(
    levels: Tensor, error_H: Tensor, hessian: Tensor, start: Tensor, group_size: int, ridge: float
) -> SmallProblem:
    """Build A and r.

    Args:
        levels: the integers code − zero point, float32 (N, K).
        error_H: (Q° − W') H, with Q° the weight of these integers and scales, float32 (N, K).
        hessian: damped H, float32 (K, K), or (B, K, K) for blocks of rows.
        start: s°, float32 (N, G).
    """
    count = grid.group_count(levels.shape[1], group_size)
    gram, slope = levels.new_empty(len(levels), count, count), levels.new_empty(len(levels), count)
    first = 0
    for part, metrics in chunks(levels, stack(hessian), GRAM_WEIGHTS):
        rows = slice(first, first + len(part))
        _gram(part, metrics, group_size, out=gram[rows])
        torch.neg(grid.to_groups(part * error_H[rows], group_size).sum(-1), out=slope[rows])
        first += len(part)
    return SmallProblem(gram, slope, start, ridge)


def _gram(levels: Tensor, hessian: Tensor, group_size: int, out: Tensor) -> None:
    """Build A of some rows, (b·c, G, G): levels (b·c, K), hessian (b, K, K).

    The lower triangle is computed, a panel of groups against each group from their first on. Rows lie side by
    side, so that sums over a group add up vectors; and a panel stays in the cache until they are taken.
    """
    blocks, columns = hessian.shape[0], levels.shape[1]
    levels_bKc = fold(levels, blocks).mT.contiguous()
    count, rows = out.shape[1], levels_bKc.shape[2]
    gram_bGGc = levels.new_empty(blocks, count, count, rows)
    wide = max(1, PANEL_COLUMNS // group_size)
    room = levels.new_empty(blocks * min(columns, wide * group_size) * rows)
    for first, past in _panels(columns, group_size, wide):
        for i in range(first, count):
            stop = min(i + 1, past)  # of the groups of the panel
            own, other = (
                slice(start * group_size, min(end * group_size, columns))
                for start, end in ((i, i + 1), (first, stop))
            )
            width = other.stop - other.start
            products = room[: blocks * width * rows].view(blocks, width, rows)
            if blocks == 1:
                torch.mm(hessian[0, other, own], levels_bKc[0, own], out=products[0])
            else:
                torch.bmm(hessian[:, other, own], levels_bKc[:, own], out=products)
            block = products.mul_(levels_bKc[:, other]).unflatten(1, (stop - first, -1)).sum(2)
            gram_bGGc[:, i, first:stop] = gram_bGGc[:, first:stop, i] = block
    fold(out, blocks).flatten(2).copy_(gram_bGGc.flatten(1, 2).mT)


def _panels(columns: int, group_size: int, wide: int) -> list[tuple[int, int]]:
    """Return the first and past the last group of each panel of at most ``wide`` groups.

    A short group is a panel of its own.

    Example:
        >>> _panels(columns=22, group_size=4, wide=2)
        [(0, 2), (2, 4), (4, 5), (5, 6)]
    """
    full_groups = columns // group_size
    short = [(full_groups, full_groups + 1)] if columns % group_size else []
    return [
        (first, min(first + wide, full_groups)) for first in range(0, full_groups, wide)
    ] + short


def descent(problem: SmallProblem, sweeps: int, positive: int | None = None) -> Tensor:
    """Run the paper's coordinate descent: ``sweeps`` passes over the groups of every row, (N, G).

    A group without curvature (all its integers 0), and a step to a scale that is not positive,
    leave the scale as it is.

    Args:
        problem: A and r.
        sweeps: passes.
        positive: how many of the unknowns, from the first on, must be positive; ``None``: all.
    """
    change = torch.zeros_like(problem.start)
    diagonal = problem.gram.diagonal(dim1=1, dim2=2)
    curvature = (1 + problem.ridge) * diagonal
    for _ in range(sweeps):
        for i in range(change.shape[1]):
            along = torch.einsum("nj,nj->n", problem.gram.select(1, i), change)
            others = along - diagonal.select(1, i) * change.select(1, i)
            step = (problem.slope.select(1, i) - others) / curvature.select(1, i)
            sound = torch.isfinite(step)
            if positive is None or i < positive:
                sound &= problem.start.select(1, i) + step > 0
            change.select(1, i).copy_(torch.where(sound, step, change.select(1, i)))
    return problem.start + change


def exact(problem: SmallProblem, fallback: Tensor, positive: int | None = None) -> Tensor:
    """Return the scales of every row that minimise F, (N, G): batched Cholesky solves.

    A row whose solution has a scale that is not positive, or whose system is singular, takes the
    scales of ``fallback`` (N, G) as a whole: part of a joint minimum is no minimum.

    Args:
        problem: A and r.
        fallback: (N, G).
        positive: how many of the unknowns, from the first on, must be positive; ``None``: all.
    """
    height = max(1, SYSTEM_ENTRIES // problem.gram.shape[1] ** 2)
    tensors = (problem.gram, problem.slope, problem.start, fallback)
    pieces = zip(*(values.split(height) for values in tensors), strict=True)
    solutions = [
        _exact(SmallProblem(gram, slope, start, problem.ridge), other, positive)
        for gram, slope, start, other in pieces
    ]
    return torch.cat(solutions)


def _exact(problem: SmallProblem, fallback: Tensor, positive: int | None) -> Tensor:
    """Run :func:`exact` for some rows."""
    system = problem.gram.clone()
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += torch.where(diagonal > 0, problem.ridge * diagonal, torch.ones_like(diagonal))
    lower, info = torch.linalg.cholesky_ex(system)
    scales = problem.start + torch.cholesky_solve(problem.slope.unsqueeze(-1), lower).squeeze(-1)
    sound = (info == 0) & (scales[:, :positive] > 0).all(1) & torch.isfinite(scales).all(1)
    return torch.where(sound.unsqueeze(1), scales, fallback)


def accept(problem: SmallProblem, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales as they will be stored, for the rows whose layer-wise loss falls; the start elsewhere.

    Args:
        problem: its start is made of values that can be stored.
        scales: float32 (N, G).
        dtype: what they are stored in; the loss is compared after that rounding.
    """
    return accepted(problem, grid.storable(scales, dtype))


def accepted(problem: SmallProblem, rounded: Tensor) -> Tensor:
    """Run :func:`accept` for values that are rounded already: those of the rows whose loss falls, (N, G)."""
    return torch.where((problem.loss(rounded) < 0).unsqueeze(1), rounded, problem.start)
