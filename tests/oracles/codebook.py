"""LNQ row by row: tables by least squares over one-hot assignments, codes by cyclic descent, k-means by plain loops.

w: target (K,); H: damped Hessian (K, K); codes: (K,); tables: (T, L); width: columns that share a table.
"""

import torch
from torch import Tensor

from .descent import best_value, row_loss


def values(codes: Tensor, tables: Tensor, width: int) -> Tensor:
    """q (K,): the level of each column."""
    return torch.stack([tables[j // width, int(c)].double() for j, c in enumerate(codes)])


def loss(codes: Tensor, tables: Tensor, w: Tensor, H: Tensor, width: int) -> float:
    """(q - w')^T H (q - w')."""
    return row_loss(values(codes, tables, width), w, H)


def fitted(
    codes: Tensor, tables: Tensor, w: Tensor, H: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """Groups in turn: the least-squares levels of those that are used, rounded, if they lower the loss."""
    tables = tables.double().clone()
    for t in range(len(tables)):
        columns = [j for j in range(len(w)) if j // width == t]
        used = sorted({int(codes[j]) for j in columns})
        P = torch.zeros(len(w), len(used), dtype=torch.float64)
        for j in columns:
            P[j, used.index(int(codes[j]))] = 1
        q = values(codes, tables, width)
        q[columns] = 0
        levels = torch.linalg.solve(P.T @ H @ P, P.T @ H @ (w.double() - q))
        new = tables.clone()
        new[t, used] = levels.to(dtype).double()
        if loss(codes, new, w, H, width) < loss(codes, tables, w, H, width):
            tables = new
    return tables


def cyclic(codes: Tensor, tables: Tensor, w: Tensor, H: Tensor, width: int, sweeps: int) -> Tensor:
    """Columns in turn at the level nearest to their best value."""
    codes = codes.long().clone()
    q = values(codes, tables, width)
    for _ in range(sweeps):
        for j in range(len(w)):
            table = tables[j // width].double()
            codes[j] = int((table - best_value(q, w.double(), H, j)).abs().argmin())
            q[j] = table[codes[j]]
    return codes


def weighted_error(numbers: Tensor, weights: Tensor, levels: Tensor) -> float:
    """Σ weight · (number − nearest level)²."""
    distances = (numbers.double().unsqueeze(1) - levels.double()).square().amin(1)
    return float((weights.double() * distances).sum())


def lloyd(numbers: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """One iteration: each level the weighted mean of the numbers that are nearest to it."""
    nearest = (numbers.unsqueeze(1) - levels).abs().argmin(1)
    found = levels.clone()
    for level in range(len(levels)):
        own = nearest == level
        if weights[own].sum() > 0:
            found[level] = (weights[own] * numbers[own]).sum() / weights[own].sum()
    return found.sort().values
