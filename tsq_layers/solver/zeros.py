"""Integer zero points by steps of one, with the codes and the scale that fit them, group after group.

A zero point that moves shifts the levels of its group: those at one end are given up for others at the other end.
Each row tries z − 1, z and z + 1 for a group while all other groups stay as they are: the codes are
those nearest to the best value of each column alone, as in clipping.py, and with their integers n the
scale is closed-form. With q the present weights of the group and P = (Q − W') H,

    s = nᵀ (H_ii q − P_i) / nᵀ H_ii n

and the change δ = s n − q of the group's weights changes the loss by δᵀ H_ii δ + 2 P_iᵀ δ. The row takes the least.
"""

import torch
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver.blocks import product
from tsq_layers.solver.coded import Coded
from tsq_layers.solver.descent import clipping

_STEPS = (-1, 0, 1)


def descend(problem: Coded, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Make one pass over the groups.

    Args:
        problem: where to start, see :class:`Coded`; scales are values that ``dtype`` holds, and zero points integers
            in 0 … 2^bits − 1.
        dtype: what scales are stored in; losses are compared after that rounding.

    Returns:
        codes uint8 (N, K), scales and zero points (N, G); no row has a larger loss than at the start.

    Example:
        >>> w, x = torch.randn(8, 32).exp(), torch.randn(100, 32) @ torch.randn(32, 32)
        >>> scales, zeros = grid.minmax(w, 2, 16, symmetric=False)
        >>> problem = Coded(grid.quantize(w, scales, zeros, 2, 16), w, x.T @ x, scales, zeros, 2, 16)
        >>> codes, scales, zeros = descend(problem, dtype=torch.float32)
        >>> better = problem._replace(codes=codes, scales=scales, zeros=zeros)
        >>> before, after = (x @ each.error().T for each in (problem, better))
        >>> bool(after.norm() < before.norm())
        True
    """
    _, target, hessian, scales, zeros, bits, group_size = problem[:-1]
    levels, scales, zeros = problem.levels(), scales.clone(), zeros.clone()
    error_H = product(problem.error(), hessian)
    for group in range(scales.shape[1]):
        part = slice(group * group_size, min((group + 1) * group_size, target.shape[1]))
        metric, own = hessian[..., part, part], slice(group, group + 1)
        values = levels[:, part] * scales[:, own]
        present = (scales[:, own], zeros[:, own], levels[:, part])
        free_part = None if problem.free is None else problem.free[:, part]
        scale, zero, new = _best(values, error_H[:, part], metric, present, bits, dtype, free_part)
        error_H[:, part.stop :] += product(new * scale - values, hessian[..., part, part.stop :])
        levels[:, part], scales[:, own], zeros[:, own] = new, scale, zero
    return grid.recoded(levels, zeros, group_size), scales, zeros


def _best(
    values: Tensor,
    error_H: Tensor,
    metric: Tensor,
    present: tuple[Tensor, Tensor, Tensor],
    bits: int,
    dtype: torch.dtype,
    free: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale and zero point (N, 1) and levels (N, g) of a group with the least loss of each row."""
    scale, zero, levels = present
    old_scale, old_zero, least = scale, zero, torch.zeros_like(scale)
    goal = values - clipping.divided(error_H, metric)
    weighed = product(values, metric)
    force = weighed - error_H
    rounding = torch.finfo(values.dtype).eps * (weighed * values).sum(
        1, keepdim=True
    )  # a gain of less is none
    for step in _STEPS:
        new_zero = (old_zero + step).clamp(0, grid.code_max(bits))
        new_levels = grid.nearest_levels(goal, old_scale, new_zero, bits)
        if free is not None:
            new_levels = new_levels * free
        best = (new_levels * force).sum(1, keepdim=True) / (
            product(new_levels, metric) * new_levels
        ).sum(1, keepdim=True)
        best = grid.storable(torch.where((best > 0) & torch.isfinite(best), best, old_scale), dtype)
        shift = new_levels * best - values
        loss = ((product(shift, metric) + 2 * error_H) * shift).sum(1, keepdim=True)
        lower = loss < least - rounding
        least = torch.where(lower, loss, least)
        scale, zero = torch.where(lower, best, scale), torch.where(lower, new_zero, zero)
        levels = torch.where(lower, new_levels, levels)
    return scale, zero, levels
