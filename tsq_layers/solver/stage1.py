"""Stage 1: grids, chosen before any code is.

Two-Stage (arXiv 2602.02126), first stage. For every row and group, over clipped ranges of the
group's weights,

    minimise over s > 0, z:   (s n − w)ᵀ M (s n − w),     n = clip(round(w / s) + z, 0, 2^b − 1) − z

The loss is s²·nᵀMn − 2s·nᵀMw + wᵀMw. M w is computed once, and for given n the best scale is
closed-form, s = nᵀMw / nᵀMn, with loss wᵀMw − (nᵀMw)² / nᵀMn. Every candidate is refitted this way,
so a coarse scan suffices. Two metrics M are offered:

``"blocks"``, the paper's group-wise reconstruction loss: M = H_ii, the group's diagonal block of H.

``"feedback"``: M = diag(V_jj²), H = V Vᵀ in processing order. GPTQ carries the error of each column
to the columns after it; what is left in the end is exactly Σ_j ε_j² V_jj² with ε_j the rounding
error of column j's working weight, since V_jj² is the part of x_j that the columns after it cannot
make up for. H_ii counts errors that GPTQ is about to cancel. Measured on eight layers of
SmolLM2-135M (groups of 64, 16k tokens, R = 0), mean relative layer loss on held-out tokens after
GPTQ and stage 2, beside weight-MSE grids without stage 2:

              weight-MSE + GPTQ    blocks    feedback
    2 bits          0.0586         0.0558     0.0543
    3 bits          0.0140         0.0140     0.0135
    4 bits         0.00324        0.00330    0.00317

Shapes: N rows, K columns, G groups, g columns a group, B blocks of rows with a metric each (see
blocks.py; B = 1 where there are none); rows are processed in pieces of b blocks of c rows. For the
arithmetic, the groups of different blocks are simply different groups: (b G, c, g).
"""

import itertools
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver.blocks import chunks, stack

SCAN_WEIGHTS = 2**20
"""Weights that are scanned at once: bounds the temporaries."""
_TIE = 64  # units of rounding within which numbers count as equal, lest the order of a sum decide
_CLIP_RANGE = {1: (0.8, 0.3), 2: (0.95, 0.45), 3: (1.0, 0.65), 4: (1.0, 0.75)}
_CLIP_COUNT = 6
_WEIGHT_CLIP_COUNT = 20


def feedback_metric(factor: Tensor, order: Tensor) -> Tensor:
    """Return V_jj² of every column, in original order; arguments as in ``objective.Problem``.

    Returns:
        float32 (K,), or (B, 1, K) for a factor (B, K, K).
    """
    diagonal = factor.diagonal(dim1=-2, dim2=-1).square()
    metric = torch.empty_like(diagonal).scatter_(-1, order, diagonal)
    return metric if metric.dim() == 1 else metric.unsqueeze(-2)


def fit_grids(
    target: Tensor, metric: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points that minimise the loss of each group under a metric.

    Clipping factors are tried with the integer zero points on both sides of the exact one in turn.

    Args:
        target: W' float32 (N, K).
        metric: a matrix (K, K) of which the groups' diagonal blocks are taken, or a diagonal (K,).
            For B blocks of rows (B, K, K), or (B, 1, K) if they are diagonals.

    Returns:
        scales and zero points, float32 (N, G).
    """
    factors = clip_factors(bits, _CLIP_COUNT)
    return _fit(target, metric, bits, group_size, symmetric, factors, both_zeros=not symmetric)


def weight_grids(
    weight: Tensor, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points by the error of the weights alone: the grids that GPTQ is given here.

    Weight-MSE clipping of the range, its zero point kept; each clipping factor with its best scale.

    Args:
        weight: W float32 (N, K).

    Returns:
        scales and zero points, float32 (N, G).
    """
    factors = clip_factors(bits, _WEIGHT_CLIP_COUNT)
    return _fit(
        weight, torch.ones_like(weight[0]), bits, group_size, symmetric, factors, both_zeros=False
    )


def clip_factors(bits: int, count: int) -> list[float]:
    """Return fractions of a group's range that are worth trying at a width, from the largest to the least."""
    most, least = _CLIP_RANGE.get(bits, (1.0, 0.85))
    return [most + (least - most) * i / (count - 1) for i in range(count)]


def _fit(
    target: Tensor,
    metric: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    factors: list[float],
    *,
    both_zeros: bool,
) -> tuple[Tensor, Tensor]:
    blocks = grouped(metric, group_size)
    grids = [
        _fit_chunk(*piece, bits, group_size, symmetric, factors, both_zeros)
        for piece in chunks(target, blocks, SCAN_WEIGHTS)
    ]
    return torch.cat([scales for scales, _ in grids]), torch.cat([zeros for _, zeros in grids])


def grouped(metric: Tensor, group_size: int) -> Tensor:
    """Return the groups' part of a metric: (B, G, g, g), or (B, G, 1, g) of a diagonal."""
    metric = stack(metric if metric.dim() > 1 else metric.unsqueeze(0))
    if metric.shape[1] == 1:
        return grid.to_groups(metric, group_size).transpose(1, 2)
    return diagonal_blocks(metric, group_size)


def _fit_chunk(
    target: Tensor,
    metric: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    factors: list[float],
    both_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """Return the best of all candidates for some rows (b·c, K); ``metric`` as from :func:`grouped`, B = b."""
    blocks = metric.shape[0]
    metric = metric.flatten(0, 1)
    weight_Gcg = rearrange(
        grid.to_groups(target, group_size), "(b c) G g -> (b G) c g", b=blocks
    ).contiguous()
    scale_NG, zero_NG = grid.minmax(target, bits, group_size, symmetric)
    best_scale, best_zero = first_scale, first_zero = (
        _by_group(scale_NG, blocks),
        _by_group(zero_NG, blocks),
    )
    best_gain = torch.full_like(best_scale, -torch.inf)
    weighed_Gcg = weigh(weight_Gcg, metric)
    levels, work = (
        torch.empty_like(weight_Gcg),
        torch.empty_like(weight_Gcg),
    )  # fresh memory costs more than a candidate
    tie = _tie(weight_Gcg)
    for scale, zero in _candidates(weight_Gcg, first_scale, first_zero, bits, factors, both_zeros):
        torch.div(weight_Gcg, scale.unsqueeze(-1), out=levels)
        low = -zero.unsqueeze(-1)
        torch.maximum(
            levels.round_(), low, out=levels
        )  # clamp with bounds that broadcast is ten times slower
        torch.minimum(levels, low + grid.code_max(bits), out=levels)
        along = torch.mul(levels, weighed_Gcg, out=work).sum(-1)
        across = weigh(levels, metric, out=work).mul_(levels).sum(-1)
        gain = along.square() / across
        better = (along > 0) & (across > 0) & (gain > best_gain * tie)
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, along / across, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return _by_row(best_scale, blocks), _by_row(best_zero, blocks)


def _tie(values: Tensor) -> float:
    return 1 + _TIE * torch.finfo(values.dtype).eps


def _by_group(values: Tensor, blocks: int) -> Tensor:
    return rearrange(values, "(b c) G -> (b G) c", b=blocks)


def _by_row(values: Tensor, blocks: int) -> Tensor:
    return rearrange(values, "(b G) c -> (b c) G", b=blocks)


def weigh(values_Gcg: Tensor, metric: Tensor, out: Tensor | None = None) -> Tensor:
    """Return values (b G, c, g) times the metric of their group, (b G, g, g) or a diagonal (b G, 1, g)."""
    return (
        torch.bmm(values_Gcg, metric, out=out)
        if metric.shape[1] > 1
        else torch.mul(values_Gcg, metric, out=out)
    )


def _candidates(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, factors: list[float], both_zeros: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield clipped ranges: scales and zero points (b G, c). Clipping both ends alike keeps the zero point."""
    zeros = [zero]
    if both_zeros:
        exact = weight.amin(-1).clamp(max=0) / -scale
        below, above = (exact * _tie(weight)).floor(), (exact / _tie(weight)).ceil()
        zeros = [below.clamp(0, grid.code_max(bits)), above.clamp(0, grid.code_max(bits))]
    if bits > 4:  # clipping hardly pays: the range as it is
        yield scale, zero
    for factor, candidate in zip(factors, itertools.cycle(zeros), strict=False):
        yield scale * factor, candidate


def diagonal_blocks(hessian: Tensor, group_size: int) -> Tensor:
    """Return the groups' diagonal blocks of H, (…, K, K) → (…, G, g, g).

    A short last group is filled up with zeros.
    """
    rows_GgK = rearrange(
        grid.to_groups(hessian, group_size), "... K G g -> ... G g K"
    )  # H is symmetric
    blocks_GgGg = grid.to_groups(rows_GgK, group_size)
    return rearrange(blocks_GgGg.diagonal(dim1=-4, dim2=-2), "... i j G -> ... G i j").contiguous()
