"""One metric for all rows of a weight, or one for each block of them: the few operations that differ.

A weight (N, K) whose metric is a matrix (K, K) has that metric in every row. Where it is
(B, K, K), the rows are B contiguous blocks of n = N/B, and the rows of block b have the metric b:
the groups of a convolution, the channel groups of a weighted H. Whatever has rows stays (N, …)
between functions, and what belongs to a metric (its factor, an order of columns, a damping) has
the leading axis B with blocks and none without. The functions here bring the two together.

Nothing loops over blocks, but for pieces of as many as fit a bound of memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL_COLUMNS = 256
"""Columns of H, or of its factor, that a loss or (Q − W\') H multiplies by at once."""


def stack(metric: Tensor) -> Tensor:
    """Return a metric with its block axis: (L, K) or (B, L, K) → (B, L, K), B = 1 if there was none."""
    return metric.unsqueeze(0) if metric.dim() == 2 else metric


def fold(rows: Tensor, blocks: int) -> Tensor:
    """View rows as blocks of rows, (N, …) → (B, n, …)."""
    return rows.view(blocks, rows.shape[0] // blocks, *rows.shape[1:])


def product(rows: Tensor, metric: Tensor) -> Tensor:
    """Return every row times the metric of its block: (N, L) and (L, K) or (B, L, K) → (N, K).

    Example:
        >>> import torch
        >>> rows, metrics = torch.randn(6, 4), torch.randn(3, 4, 4)
        >>> expected = torch.cat([rows[2 * b : 2 * b + 2] @ metrics[b] for b in range(3)])
        >>> torch.allclose(product(rows, metrics), expected, atol=1e-5)
        True
    """
    metric = stack(metric)
    if metric.shape[0] == 1:
        return rows @ metric[0]
    return fold(rows, metric.shape[0]).bmm(metric).flatten(0, 1)


def scaled(rows: Tensor, factors: Tensor) -> Tensor:
    """Return every row times the number of its block: (N, K) and a scalar tensor or (B,) → (N, K)."""
    return (
        rows * factors
        if factors.dim() == 0
        else (fold(rows, len(factors)) * factors.view(-1, 1, 1)).flatten(0, 1)
    )


def take_rows(values: Tensor, order: Tensor) -> Tensor:
    """Take rows of a matrix, or of every matrix of a stack.

    (R, C) or (B, R, C), int64 (L,) or (B, L) → (…, L, C).
    """
    if values.dim() == 2:
        return values.index_select(0, order)
    firsts = torch.arange(values.shape[0], device=values.device).unsqueeze(1) * values.shape[1]
    return (
        values.flatten(0, 1)
        .index_select(0, (order + firsts).flatten())
        .view(*order.shape, values.shape[-1])
    )


def take_columns(values: Tensor, order: Tensor) -> Tensor:
    """Take columns of a matrix, or of every matrix of a stack.

    (R, C) or (B, R, C), int64 (L,) or (B, L) → (…, R, L).
    """
    return values.gather(-1, order.unsqueeze(-2).expand(*values.shape[:-1], order.shape[-1]))


def in_original_order(rows: Tensor, order: Tensor) -> Tensor:
    """Undo a permutation of columns: rows (N, K) whose column i is that of order[i] → (N, K).

    Args:
        rows: values in processing order.
        order: int64 (K,), or (B, K) with one for each block of rows.
    """
    inverse = order.reshape(-1, order.shape[-1]).argsort(-1)
    return take_columns(fold(rows, inverse.shape[0]), inverse).flatten(0, 1)


def chunks(rows: Tensor, metrics: Tensor, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows and what belongs to their blocks so that a piece has at most ``elements`` entries.

    A piece is some whole blocks, or some rows of a single one; at least one row.

    Args:
        rows: (N, K).
        metrics: (B, …).

    Yields:
        (b·c, K) and (b, …), in the order of the rows.
    """
    blocks = metrics.shape[0]
    height = rows.shape[0] // blocks
    most = max(1, elements // rows.shape[1])
    together = max(1, most // max(1, height))
    for first in range(0, blocks, together):
        piece = rows[first * height : (first + together) * height]
        for part in piece.split(most):
            yield part, metrics[first : first + together]
