"""Weighted k-means of numbers, many sets at once: the tables from which codebook.py starts.

Each set is sorted once and its weights summed up along the way. Then a cell, an interval between midpoints of
neighbouring levels, is found by bisection and its mean is a quotient of two differences: Lloyd's iteration costs
next to nothing, whatever the number of values.
"""

import torch
from torch import Tensor

_ITERATIONS = 20


def levels(values: Tensor, weights: Tensor, count: int, iterations: int = _ITERATIONS) -> Tensor:
    """Return levels that approximate the values of each set, in ascending order.

    The start is halfway between quantiles and an even spacing: quantiles alone leave the ends of a
    long-tailed set to few levels, which Lloyd's iteration is slow to mend.

    Args:
        values: (…, g), at least one in each set.
        weights: of each value, not negative, (…, g).
        count: how many levels.

    Returns:
        (…, count); the weighted squared distance to the nearest level is not larger than at the start.

    Example:
        >>> levels(torch.tensor([[0.0, 1.0, 9.0, 10.0]]), torch.tensor([[1.0, 1.0, 3.0, 1.0]]), 2)
        tensor([[0.5000, 9.2500]])
    """
    values, order = values.sort(-1)
    weights = weights.expand_as(values).gather(-1, order)
    total = torch.zeros_like(values[..., :1])
    mass = torch.cat([total, weights.cumsum(-1)], -1)
    moment = torch.cat([total, (weights * values).cumsum(-1)], -1)
    centers = _start(values, count)
    for _ in range(iterations):
        centers = _means(values, mass, moment, centers)
    return centers


def _start(values: Tensor, count: int) -> Tensor:
    """Return start levels in ascending order, (…, count), of sorted values."""
    places = (torch.arange(count, device=values.device, dtype=values.dtype) + 0.5) / count
    size = values.shape[-1]
    quantiles = values[..., (places * size).long().clamp(max=size - 1)]
    low, high = values[..., :1], values[..., -1:]
    return (quantiles + low + (high - low) * places) / 2


def _means(values: Tensor, mass: Tensor, moment: Tensor, old: Tensor) -> Tensor:
    """Return the mean of each cell, held between the least and the largest value in it.

    An empty cell keeps its level.
    """
    size = values.shape[-1]
    inner = torch.searchsorted(values, midpoints(old).contiguous())
    edges = torch.cat(
        [torch.zeros_like(inner[..., :1]), inner, torch.full_like(inner[..., :1], size)], -1
    )
    first, last = edges[..., :-1], edges[..., 1:]
    weight, total = ((sums.gather(-1, last) - sums.gather(-1, first)) for sums in (mass, moment))
    lowest = values.gather(-1, first.clamp(max=size - 1))
    highest = values.gather(-1, (last - 1).clamp(min=0))
    mean = torch.minimum(torch.maximum(total / weight, lowest), highest)
    return torch.where((weight > 0) & (last > first), mean, old).sort(-1).values


def midpoints(sorted_levels: Tensor) -> Tensor:
    """Return the points halfway between neighbouring levels, (…, L) → (…, L−1)."""
    return (sorted_levels[..., 1:] + sorted_levels[..., :-1]) / 2
