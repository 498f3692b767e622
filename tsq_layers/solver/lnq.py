"""LNQ: levels of look-up tables, one table for each row or for each group of each row, and codes that name them.

arXiv 2505.07004. What is minimised is (Q − W') H (Q − W')ᵀ, H damped as everywhere in the solver, where the
values of Q are levels c of a table. Two steps alternate and neither raises the loss of a row:

(i)  With the codes kept, P the one-hot matrix of which column has which level, and the table of the round
     before c°, the loss changes by a quadratic in δ = c − c°, as in stage2.py, with

         A = Pᵀ H P,     r = −Pᵀ H (q° − w')

     whose minimum is one Cholesky solve of 2^b unknowns. A pull towards c° of 1e-7·A_ll settles what A leaves open, a
     level that no column has stays, and a row takes its new table only if its loss falls after the table
     is rounded to the dtype in which it is stored. With tables for groups, one group after the other.
(ii) With the tables kept, sweeps of coordinate descent, each column at the level nearest to its
best value (sweeper.py).

Tables start as k-means of the weights, each weighted by its H_jj (kmeans.py). They are kept in ascending order, so
the nearest level is found by bisection between midpoints.

Shapes: N rows, K columns, T tables a row, 1 or as many as groups, L = 2^b levels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver import kmeans, stage2
from tsq_layers.solver.blocks import chunks, fold, product, stack
from tsq_layers.solver.descent.columns import Sweeper, turned

RIDGE = 1e-7
_CHUNK_ELEMENTS = 2**22  # entries of one-hot matrices that are held at once
_TOGETHER = 2**24  # weights whose columns advance together, where there are blocks
_PANELS = 8  # of the lower triangle of H, which is all that is multiplied


def solve(
    target: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    *,
    per_group: bool,
    rounds: int,
    sweeps: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return codes and tables.

    Args:
        target: W' float (N, K).
        hessian: damped H, (K, K), or (B, K, K) for blocks of rows.
        bits: at most 4.
        group_size: columns of a group.
        per_group: a table for each group of a row, and not one for the whole row.
        rounds: of both steps.
        sweeps: over the columns, in each round.
        dtype: what tables are stored in.

    Returns:
        codes uint8 (N, K) and tables (N, T, 2^bits), ascending, made of values that ``dtype`` holds.

    Example:
        >>> w, x = torch.randn(8, 32), torch.randn(100, 32) @ torch.randn(32, 32)
        >>> options = {"per_group": False, "sweeps": 2, "dtype": torch.float16}
        >>> results = [solve(w, x.T @ x, 2, 32, rounds=rounds, **options) for rounds in (0, 3)]
        >>> before, after = ((x @ (dequantize(*result, 32) - w).T).norm() for result in results)
        >>> bool(after < before)
        True
    """
    tables = start(target, hessian, bits, group_size, per_group=per_group, dtype=dtype)
    codes = nearest(target, tables, group_size)
    return improve(
        codes, target, hessian, tables, group_size, rounds=rounds, sweeps=sweeps, dtype=dtype
    )


def start(
    target: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    *,
    per_group: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return tables of weighted k-means, (N, T, 2^bits), made of values that ``dtype`` holds.

    Arguments are those of :func:`solve`.
    """
    columns = target.shape[1]
    width = group_size if per_group else columns
    diagonal = stack(hessian).diagonal(dim1=-2, dim2=-1)
    weights = diagonal.repeat_interleave(len(target) // len(diagonal), 0)
    whole = columns // width * width
    tables = []
    for part, size in ((slice(0, whole), width), (slice(whole, columns), columns - whole)):
        if part.start < part.stop:
            values, weight = (grid.to_groups(tensor[:, part], size) for tensor in (target, weights))
            tables.append(kmeans.levels(values, weight, grid.code_max(bits) + 1))
    return rounded(torch.cat(tables, 1), dtype)


def rounded(tables: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as they will be once stored in ``dtype``, held inside its range, in their present dtype."""
    most = torch.finfo(dtype).max
    return tables.clamp(-most, most).to(dtype).to(tables.dtype)


def nearest(target: Tensor, tables: Tensor, group_size: int) -> Tensor:
    """Return the codes of the nearest levels, uint8 (N, K); tables (N, T, L) in ascending order."""
    grouped = grid.to_groups(target, _width(target, tables, group_size)).contiguous()
    codes = torch.searchsorted(kmeans.midpoints(tables).contiguous(), grouped)
    return codes.to(torch.uint8).flatten(1).narrow(1, 0, target.shape[1]).contiguous()


def dequantize(codes: Tensor, tables: Tensor, group_size: int) -> Tensor:
    """Return the levels that codes stand for, (N, K), in the dtype of the tables.

    Example:
        >>> dequantize(torch.tensor([[0, 3, 1]], dtype=torch.uint8), torch.tensor([[[-1.0, 0.0, 1.0, 2.0]]]), 2)
        tensor([[-1.,  2.,  0.]])
    """
    grouped = grid.to_groups(codes, _width(codes, tables, group_size)).long()
    return tables.gather(-1, grouped).flatten(1).narrow(1, 0, codes.shape[1])


def _width(values: Tensor, tables: Tensor, group_size: int) -> int:
    """Return how many columns share a table."""
    return values.shape[1] if tables.shape[1] == 1 else group_size


def improve(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    tables: Tensor,
    group_size: int,
    *,
    rounds: int,
    sweeps: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Improve tables and codes in turn, and tables once more; arguments as in :func:`solve`.

    Returns:
        codes uint8 (N, K) and tables (N, T, L); no row has a larger loss than at the start.
    """
    for number in range(rounds + 1 if rounds else 0):
        tables, codes = fit(codes, target, hessian, tables, group_size, dtype)
        if number < rounds:
            codes = descend(codes, target, hessian, tables, group_size, sweeps)
    return codes, tables


def fit(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    tables: Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Fit (step i) tables for these codes, group after group.

    Returns:
        tables (N, T, L) in ascending order, and the codes that name the same levels in them, uint8 (N, K).
    """
    width, tables = _width(codes, tables, group_size), tables.clone()
    error = dequantize(codes, tables, group_size) - target
    for group in range(tables.shape[1]):
        part = slice(group * width, min((group + 1) * width, codes.shape[1]))
        error_H = product(error, hessian[..., :, part])
        levels = _fitted(codes[:, part], error_H, hessian[..., part, part], tables[:, group], dtype)
        error[:, part] += (levels - tables[:, group]).gather(1, codes[:, part].long())
        tables[:, group] = levels
    tables, order = tables.sort(dim=-1, stable=True)
    grouped = grid.to_groups(codes, width).long()
    renamed = order.argsort(-1).gather(-1, grouped).to(torch.uint8)
    return tables, renamed.flatten(1).narrow(1, 0, codes.shape[1]).contiguous()


def _fitted(
    codes: Tensor, error_H: Tensor, metric: Tensor, table: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return new tables for a group: codes and (Q − W') H (N, g), (g, g) or (B, g, g), tables (N, L) → (N, L)."""
    count = table.shape[1]
    lower = stack(metric).tril()
    lower.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    gram = torch.cat(
        [_gram(*piece, count) for piece in chunks(codes, lower, _CHUNK_ELEMENTS // count)]
    )
    slope = torch.zeros_like(table).scatter_add_(1, codes.long(), -error_H)
    small = stage2.SmallProblem(gram, slope, table, RIDGE)
    return stage2.accepted(small, rounded(stage2.exact(small, fallback=table, positive=0), dtype))


def _gram(codes: Tensor, lower: Tensor, count: int) -> Tensor:
    """Return A = Pᵀ H P of some rows, (C, L, L), from the lower triangle of H, (b, g, g), its diagonal halved."""
    blocks, columns = lower.shape[:2]
    indicators = F.one_hot(fold(codes, blocks).long(), count).to(lower.dtype)  # (b, n, g, L)
    chosen_first = indicators.transpose(1, 2).flatten(2)  # (b, g, n·L)
    half = lower.new_zeros(len(codes), count, count)
    size = -(-columns // _PANELS)
    for first in range(0, columns, size):
        last = min(first + size, columns)
        response = lower[:, first:last, :last].bmm(chosen_first[:, :last])  # (b, panel, n·L)
        response = response.unflatten(2, (-1, count)).transpose(1, 2).flatten(0, 1)  # (C, panel, L)
        half += indicators[:, :, first:last].flatten(0, 1).mT.bmm(response)
    return half + half.mT


def descend(
    codes: Tensor, target: Tensor, hessian: Tensor, tables: Tensor, group_size: int, sweeps: int
) -> Tensor:
    """Choose (step ii) codes for these tables, uint8 (N, K); no row has a larger loss than at the start."""
    metrics = stack(hessian)
    blocks = metrics.shape[0]
    together = max(1, _TOGETHER * blocks // max(1, target.numel()))
    values = dequantize(codes, tables, group_size)
    rows = (fold(part, blocks) for part in (target, values, tables))
    parts = zip(*(part.split(together) for part in (metrics, *rows)), strict=True)
    width = _width(codes, tables, group_size)
    improved = torch.cat([_descend(*part, width=width, sweeps=sweeps) for part in parts]).flatten(
        0, 1
    )
    return nearest(improved, tables, group_size)


def _descend(
    hessian: Tensor, target: Tensor, values: Tensor, tables: Tensor, *, width: int, sweeps: int
) -> Tensor:
    """:func:`descend` for some blocks: (b, K, K), twice (b, n, K) and (b, n, T, L) → values (b, n, K)."""
    by_group = tables.transpose(1, 2).contiguous()  # (b, T, n, L)
    middle = kmeans.midpoints(by_group).contiguous()
    run = Sweeper(
        hessian, target, values, torch.ones_like(by_group[..., 0]), (middle, by_group), width
    )
    for _ in range(sweeps):
        run.sweep(_nearest_level)
    return turned(run.levels)


def _nearest_level(best: Tensor, middle: Tensor, table: Tensor, out: Tensor) -> None:
    indices = torch.searchsorted(middle, best.unsqueeze(-1).contiguous())
    out.copy_(table.gather(-1, indices).squeeze(-1))
