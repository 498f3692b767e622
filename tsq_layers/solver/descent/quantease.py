"""QuantEase: cyclic coordinate descent on the integers, grids fixed, from any start.

arXiv 2309.01885. What is minimised is (Q − W') H (Q − W')ᵀ, H damped as everywhere in the solver. Column j
of a row takes the level of its grid that is nearest to the value at which it alone is best (sweeper.py): the
loss falls or stays (the paper's Lemma 1, equation 7). Neither an inverse nor a factorisation is needed, and a
sweep costs one N×K×K product.

The paper's relaxation leaves all columns of some sweeps at v_j, unrounded, to leave a local minimum.
That is not monotone, so the best codes of each row are kept.
"""

import torch
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver.blocks import fold, stack
from tsq_layers.solver.coded import Coded
from tsq_layers.solver.descent.columns import Sweeper, turned

# Weights whose columns advance together, where there are blocks: bounds the working memory.
_CHUNK_ELEMENTS = 2**24
_LAST_RELAXED = 25  # the authors' code relaxes no sweep after this one


def descend(problem: Coded, sweeps: int, *, relax: bool = False) -> Tensor:
    """Sweep over the columns, each in turn at its best level given all others.

    Args:
        problem: where to start, see :class:`Coded`.
        sweeps: passes over all columns.
        relax: the paper's schedule of unrounded sweeps; see :func:`is_relaxed`.

    Returns:
        codes uint8 (N, K); no row has a larger loss than at the start.

    Example:
        >>> w, x = torch.randn(8, 32), torch.randn(100, 32) @ torch.randn(32, 32)
        >>> scales, zeros = grid.minmax(w, 3, 16, symmetric=False)
        >>> problem = Coded(grid.quantize(w, scales, zeros, 3, 16), w, x.T @ x, scales, zeros, 3, 16)
        >>> better = problem._replace(codes=descend(problem, sweeps=3))
        >>> before, after = (x @ each.error().T for each in (problem, better))
        >>> bool(after.norm() < before.norm())
        True
    """
    _, target, hessian, scales, zeros, bits, group_size = problem[:-1]
    metrics = stack(hessian)
    blocks = metrics.shape[0]
    together = max(1, _CHUNK_ELEMENTS * blocks // max(1, target.numel()))
    tensors = target, problem.levels(), scales.to(target.dtype), zeros.to(target.dtype)
    rows = [
        fold(values, blocks)
        for values in (
            tensors if problem.free is None else (*tensors, problem.free.to(target.dtype))
        )
    ]
    parts = zip(*(values.split(together) for values in (metrics, *rows)), strict=True)
    improved = [
        _descend(*part, bits=bits, group_size=group_size, sweeps=sweeps, relax=relax)
        for part in parts
    ]
    return grid.recoded(torch.cat(improved).flatten(0, 1), zeros, group_size)


def is_relaxed(sweep: int, sweeps: int) -> bool:
    """Return whether the published schedule leaves this sweep (from 0) unrounded: each third, up to 25, never the last.

    Example:
        >>> [sweep for sweep in range(8) if is_relaxed(sweep, 8)]
        [1, 4]
    """
    return sweep % 3 == 1 and sweep <= _LAST_RELAXED and sweep < sweeps - 1


def _descend(
    hessian: Tensor,
    target: Tensor,
    levels: Tensor,
    scales: Tensor,
    zeros: Tensor,
    free: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    sweeps: int,
    relax: bool,
) -> Tensor:
    """:func:`descend` for some blocks: (b, K, K), twice (b, n, K), twice (b, n, G) and (b, n, K) → levels (b, n, K)."""
    low = turned(-zeros)
    bounds = low, low + grid.code_max(bits)
    run = Sweeper(
        hessian,
        target,
        levels,
        turned(scales),
        bounds,
        group_size,
        None if free is None else turned(free),
    )
    best_state: tuple[Tensor, Tensor] | None = None
    for sweep in range(sweeps):
        if relax and is_relaxed(sweep, sweeps):
            best_state = run.better(best_state)  # up to here every sweep has lowered the loss
            run.sweep(_stay)
        else:
            run.sweep(_round)
    return turned(run.levels if best_state is None else run.better(best_state)[0])


def _round(best: Tensor, low: Tensor, high: Tensor, out: Tensor) -> None:
    """Take the paper's step: the nearest level."""
    torch.clamp(torch.round(best, out=out), low, high, out=out)


def _stay(best: Tensor, low: Tensor, high: Tensor, out: Tensor) -> None:  # noqa: ARG001
    """Take the relaxed step: no grid."""
    out.copy_(best)
