"""Grids whose zero point is any number: weight = scale · code + offset, for each group of each row.

With an offset that is kept, W' less the offsets is a target for a grid whose zero points are 0, so every step on
codes runs as it is. What differs is how grids are found: each step that has a closed form for a scale has one
for scale and offset together. Codes are counted from the middle of their range, m = (2^b − 1)/2,

    weight = s · (c − m) + p,     p = offset + s · m

which makes the two nearly independent, so that neither the pull of stage 2 on one nor rounding moves the other.

Stage 1 (see stage1.py): for the codes c of a candidate, s and p minimise a quadratic with the 2×2 matrix of
c − m and 1 under the group's metric. Stage 2 (see stage2.py): the same with 2G unknowns a row.
"""

import torch
from einops import rearrange
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver import stage1, stage2
from tsq_layers.solver.blocks import chunks, fold, product, stack

_CHUNK_ELEMENTS = 2**20  # weights that are scanned at once: bounds the temporaries
_CLIP_COUNT = 6
_SINGULAR = (
    1e-5  # of the product of the diagonal: a determinant below this says that codes hardly differ
)


def spread(values: Tensor, group_size: int, columns: int) -> Tensor:
    """Return one number for each column from one for each group: (N, G) → (N, K)."""
    return values.repeat_interleave(group_size, 1).narrow(1, 0, columns)


def storable(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return offsets as they will be once stored in ``dtype``, held inside its range, in their present dtype."""
    most = torch.finfo(dtype).max
    return offsets.clamp(-most, most).to(dtype).to(offsets.dtype)


def fit_grids(target: Tensor, metric: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return scales and offsets that minimise the loss of each group under a metric.

    Args:
        target: W' float32 (N, K).
        metric: as in ``stage1.fit_grids``.

    Returns:
        scales, positive, and offsets, float32 (N, G).

    Example:
        >>> weight = torch.tensor([[5.0, 5.1, 5.2, 5.3]])
        >>> scales, offsets = fit_grids(weight, torch.ones(4), 2, 4)
        >>> round(float(scales), 4), round(float(offsets), 4)
        (0.1, 5.0)
    """
    pieces = chunks(target, stage1.grouped(metric, group_size), _CHUNK_ELEMENTS)
    results = [_fit_chunk(*piece, bits, group_size) for piece in pieces]
    return torch.cat([scales for scales, _ in results]), torch.cat(
        [offsets for _, offsets in results]
    )


def _fit_chunk(target: Tensor, metric: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the best of all candidates for some rows (b·c, K); metric (b, G, g, g) or (b, G, 1, g)."""
    blocks = metric.shape[0]
    metric = metric.flatten(0, 1)
    weight_Gcg = rearrange(
        grid.to_groups(target, group_size), "(b c) G g -> (b G) c g", b=blocks
    ).contiguous()
    middle = grid.code_max(bits) / 2
    scale, centre = _range(weight_Gcg, target.shape[1] % group_size, blocks, bits)
    best_scale, best_centre, least = scale, centre, _loss(weight_Gcg, scale, centre, metric, bits)
    for factor in (*stage1.clip_factors(bits, _CLIP_COUNT), None):
        # the last candidate is the best so far, its codes rounded anew
        start = (best_scale, best_centre) if factor is None else (scale * factor, centre)
        new_scale, new_centre = _refitted(weight_Gcg, *start, metric, bits)
        loss = _loss(weight_Gcg, new_scale, new_centre, metric, bits)
        lower = loss < least
        least = torch.where(lower, loss, least)
        best_scale, best_centre = (
            torch.where(lower, new_scale, best_scale),
            torch.where(lower, new_centre, best_centre),
        )
    scales, centres = (
        rearrange(values, "(b G) c -> (b c) G", b=blocks) for values in (best_scale, best_centre)
    )
    return scales, centres - middle * scales


def _range(weight_Gcg: Tensor, short: int, blocks: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and middle of the grid from the least weight to the largest, (b G, c)."""
    low, high = weight_Gcg.amin(-1), weight_Gcg.amax(-1)
    if short:  # what fills up the last group of each row is none of its weights
        last = fold(weight_Gcg, blocks)[:, -1, :, :short]
        fold(low, blocks)[:, -1], fold(high, blocks)[:, -1] = last.amin(-1), last.amax(-1)
    scale = (high - low) / grid.code_max(bits)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, low + scale * (grid.code_max(bits) / 2)


def _rounded(weight_Gcg: Tensor, scale: Tensor, centre: Tensor, bits: int) -> Tensor:
    """Return the nearest codes less m."""
    middle = grid.code_max(bits) / 2
    codes = (weight_Gcg - centre.unsqueeze(-1)).div_(scale.unsqueeze(-1)).add_(middle).round_()
    return codes.clamp_(0, grid.code_max(bits)).sub_(middle)


def _loss(weight_Gcg: Tensor, scale: Tensor, centre: Tensor, metric: Tensor, bits: int) -> Tensor:
    """Return the loss of the nearest codes, (b G, c)."""
    codes = _rounded(weight_Gcg, scale, centre, bits)
    error = codes.mul_(scale.unsqueeze(-1)).add_(centre.unsqueeze(-1)).sub_(weight_Gcg)
    loss: Tensor = torch.linalg.vecdot(error, stage1.weigh(error, metric))
    return loss


def _refitted(
    weight_Gcg: Tensor, scale: Tensor, centre: Tensor, metric: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Return the best scale and middle for the codes of the given ones.

    The given ones stay where the best are not positive or not determined.
    """
    codes = _rounded(weight_Gcg, scale, centre, bits)
    error = codes * scale.unsqueeze(-1) + centre.unsqueeze(-1) - weight_Gcg
    ones = torch.ones_like(weight_Gcg[:, :1])
    weighed_codes, weighed_ones = stage1.weigh(codes, metric), stage1.weigh(ones, metric)
    a, b, d = (
        (values * weighed).sum(-1)
        for values, weighed in ((codes, weighed_codes), (codes, weighed_ones), (ones, weighed_ones))
    )
    u, v = (
        torch.linalg.vecdot(error, weighed.expand_as(error))
        for weighed in (weighed_codes, weighed_ones)
    )
    determinant = a * d - b.square()
    new_scale, new_centre = (
        scale - (d * u - b * v) / determinant,
        centre - (a * v - b * u) / determinant,
    )
    sound = (determinant > _SINGULAR * a * d) & (new_scale > 0) & torch.isfinite(new_centre)
    return torch.where(sound, new_scale, scale), torch.where(sound, new_centre, centre)


def small_problem(
    codes: Tensor,
    error_H: Tensor,
    hessian: Tensor,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
    ridge: float,
) -> stage2.SmallProblem:
    """Stage 2 in the small space, over 2G unknowns a row: s of all groups, then p of all groups.

    Args:
        codes: uint8 (N, K).
        error_H: (Q° − W') H, with Q° the weight of these codes and grids, float32 (N, K).
        hessian: damped H, float32 (K, K), or (B, K, K) for blocks of rows.
        scales: s°, float32 (N, G).
        offsets: float32 (N, G).
        ridge: weight of the pull towards s° and p°.
    """
    centred = codes.to(error_H.dtype) - grid.code_max(bits) / 2
    first = stage2.small_problem(centred, error_H, hessian, scales, group_size, ridge)
    columns, metrics = codes.shape[1], stack(hessian)
    groups = grid.to_groups(metrics, group_size).sum(-1)  # (B, K, G): H times 1 of each group
    both = [
        _against_ones(*piece, group_size)
        for piece in chunks(centred, groups, _CHUNK_ELEMENTS // scales.shape[1])
    ]
    mixed = torch.cat(both)  # (N, G, G): c − m of one group, 1 of another
    member = spread(
        torch.eye(scales.shape[1], dtype=error_H.dtype, device=error_H.device), group_size, columns
    )
    ones = (member @ groups).repeat_interleave(len(codes) // len(metrics), 0)
    gram = torch.cat([torch.cat([first.gram, mixed], 2), torch.cat([mixed.mT, ones], 2)], 1)
    slope = torch.cat([first.slope, -grid.to_groups(error_H, group_size).sum(-1)], 1)
    start = torch.cat([scales, offsets + scales * (grid.code_max(bits) / 2)], 1)
    return stage2.SmallProblem(gram, slope, start, ridge)


def _against_ones(centred: Tensor, groups: Tensor, group_size: int) -> Tensor:
    """(C, G, G) of some rows: (b·c, K) and (b, K, G)."""
    count = groups.shape[-1]
    products = centred.new_empty(len(centred), count, count)
    for i in range(count):
        part = slice(i * group_size, min((i + 1) * group_size, centred.shape[1]))
        products[:, i] = product(centred[:, part], groups[:, part])
    return products


def accept(
    problem: stage2.SmallProblem, unknowns: Tensor, offsets: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return scales and offsets as they will be stored, for the rows whose loss falls.

    The other rows keep those of the start.


    Args:
        problem: from :func:`small_problem`; its scales and ``offsets`` are made of values that can be stored.
        unknowns: s and p, float32 (N, 2G).
        offsets: those of the start, float32 (N, G).
        dtype: what they are stored in; the loss is compared after that rounding.
    """
    count, middle = offsets.shape[1], grid.code_max(bits) / 2
    scales = grid.storable(unknowns[:, :count], dtype)
    new_offsets = storable(unknowns[:, count:] - middle * scales, dtype)
    lower = (problem.loss(torch.cat([scales, new_offsets + middle * scales], 1)) < 0).unsqueeze(1)
    return torch.where(lower, scales, problem.start[:, :count]), torch.where(
        lower, new_offsets, offsets
    )
