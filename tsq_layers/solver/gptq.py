"""GPTQ on static grids: integers column by column, each error carried to the columns left.

arXiv 2210.17323, without the inverse of H that is usually formed for it. With H = V Vᵀ in processing
order, V upper triangular, and the errors δ_i = w'_i − q_i of the columns that are done, column j is
rounded at

    x_j = w'_j + Σ_{i<j} δ_i V_ij / V_jj

which is the minimiser over column j of what is left of the loss once the columns after it have made up
for it as well as they can: Babai's nearest plane (arXiv 2507.18553). It is the same algorithm: the usual
form with H⁻¹ = UᵀU, U = V⁻¹, subtracts e_i U_ij / U_ii for the rounding errors e_i = x_i − q_i from
the columns after i, and e = −δ in V's basis. Forming U costs twice what V does, and a rounding error
of float32 more; the δ are errors of the weight itself, so nothing is kept beside them.

Grids are fixed beforehand, so any processing order is free: columns are permuted for the loop and the
codes permuted back. Rows of different blocks have different H, factors and orders, and advance together.

The sums are formed when they are needed: for a block of columns by one matrix product over all columns
before it, inside the block by halves, and in the smallest ranges column by column.

What rounding leaves says what the codes cost: V_jj (x_j − q_j) = Σ_{i≤j} δ_i V_ij, so that E = (Q − W') V, the
error whitened, is known column by column. The loss of a row, H damped, is ‖E‖², and (Q − W') H = E Vᵀ is a
product with a triangle, half the work of one with H.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver.blocks import PANEL_COLUMNS, fold, stack, take_rows

_LEAF = 32  # columns that are summed one by one
BLOCK_COLUMNS = 128
"""Columns whose sums over all before them are one product."""

CHUNK_WEIGHTS = 2**24
"""Weights whose columns advance together, where rows have metrics of their own."""


class Assigned(NamedTuple):
    """Codes, and what they cost under the metric with the factor V.

    Attributes:
        codes: uint8 (N, K), in the original column order.
        loss: (Q − W') H (Q − W')ᵀ of each row, H = V Vᵀ, (N,).
        whitened: E = (Q − W') V, columns as rows and in processing order, (B, K, n), B = 1 without blocks.
    """

    codes: Tensor
    loss: Tensor
    whitened: Tensor


def assign(
    target: Tensor,
    factor: Tensor,
    order: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    free: Tensor | None = None,
) -> Assigned:
    """Codes that approximate ``target`` under the metric with the factor ``factor``, and what they cost.

    Args:
        target: W' float32 (N, K).
        factor: V float32 (K, K), H = V Vᵀ, upper triangular in processing order; (B, K, K) for blocks of rows.
        order: processing order of the columns, int64 (K,) or (B, K).
        scales: float32 (N, G).
        zeros: float (N, G).
        bits: of a code.
        group_size: columns that share a scale.
        free: bool (N, K); where it is false the weight is zero, and stays so. ``None``: nowhere.

    Example:
        >>> metric = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> V = torch.linalg.cholesky(metric.flip(0, 1)).flip(0, 1)
        >>> one = torch.ones(1, 1)
        >>> assign(torch.tensor([[1.4, 1.4]]), V, torch.arange(2), one, 0 * one, 2, 2).codes
        tensor([[1, 2]], dtype=torch.uint8)
    """
    factors = stack(factor)
    blocks = factors.shape[0]
    together = max(1, CHUNK_WEIGHTS * blocks // max(1, target.numel()))
    arguments: tuple[Tensor, ...] = (
        fold(target, blocks),
        factors,
        order.reshape(blocks, -1),
        fold(scales.to(target.dtype), blocks),
        fold(zeros.to(target.dtype), blocks),
    )
    if free is not None:
        arguments = (*arguments, fold(free, blocks))
    parts = zip(*(values.split(together) for values in arguments), strict=True)
    results = [_assign(bits, group_size, *part) for part in parts]
    codes, loss, whitened = (
        results[0] if len(results) == 1 else map(torch.cat, zip(*results, strict=True))
    )
    return Assigned(codes.flatten(0, 1), loss.flatten(), whitened)


def _assign(
    bits: int,
    group_size: int,
    target: Tensor,
    factor: Tensor,
    order: Tensor,
    scales: Tensor,
    zeros: Tensor,
    free: Tensor | None = None,
) -> Assigned:
    """:func:`assign` for some blocks: (b, n, K), (b, K, K), (b, K), twice (b, n, G) and (b, n, K) → (b, …) of each."""
    whitened = target.mT.clone(
        memory_format=torch.contiguous_format
    )  # its place, once the columns are in order
    remainder = take_rows(whitened, order)
    codes = torch.empty(remainder.shape, dtype=torch.uint8, device=remainder.device)
    loss = remainder.new_zeros(remainder.shape[0], remainder.shape[2])
    grids = _Grids(
        scales.mT.contiguous(), zeros.mT.contiguous(), order // group_size, grid.code_max(bits)
    )
    grids.free = None if free is None else take_rows(free.mT.contiguous(), order)
    for start in range(0, remainder.shape[1], BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, remainder.shape[1])
        loss += _Block(remainder, factor, grids, codes, whitened, start, stop).solve()
    del remainder, grids
    return Assigned(take_rows(codes, order.argsort(-1)).mT.contiguous(), loss, whitened)


def error_times_hessian(whitened: Tensor, factor: Tensor) -> Tensor:
    """Return (Q − W') H = E Vᵀ, columns in processing order, (N, K).

    Args:
        whitened: E, as in :class:`Assigned`.
        factor: V, as :func:`assign` takes it: what is below its diagonal is not looked at, but inside of a panel.
    """
    factors = stack(factor)
    blocks, columns, rows = whitened.shape
    error_H = whitened.new_empty(blocks, rows, columns)
    for start in range(0, columns, PANEL_COLUMNS):
        stop = min(start + PANEL_COLUMNS, columns)
        errors, panel = whitened[:, start:].mT, factors[:, start:stop, start:].mT
        if blocks == 1:
            torch.mm(errors[0], panel[0], out=error_H[0, :, start:stop])
        else:
            torch.bmm(errors, panel, out=error_H[:, :, start:stop])
    return error_H.flatten(0, 1)


class _Grids:
    """The grids of columns in processing order, made for a block of columns at a time, in the same memory.

    Args:
        scales: (b, G, n).
        zeros: (b, G, n).
        group_of: group of each column in processing order, int64 (b, K).
        most: the largest code.

    Attributes:
        free: bool (b, K, n), in processing order; where it is false there is no level but zero.
    """

    free: Tensor | None = None

    def __init__(self, scales: Tensor, zeros: Tensor, group_of: Tensor, most: int) -> None:
        blocks, groups, rows = scales.shape
        firsts = torch.arange(blocks, device=group_of.device).unsqueeze(1) * groups
        self.scales, self.zeros, self.places, self.most = (
            scales.flatten(0, 1),
            zeros.flatten(0, 1),
            group_of + firsts,
            most,
        )
        self._memory = scales.new_empty(5, blocks * min(BLOCK_COLUMNS, group_of.shape[1]), rows)

    def of(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """Return scales, zero points, least and largest levels, and room for the levels, (b, stop − start, n) each."""
        places = self.places[:, start:stop].flatten()
        scale, zero, low, high, levels = self._memory[:, : len(places)]
        torch.index_select(self.scales, 0, places, out=scale)
        torch.index_select(self.zeros, 0, places, out=zero)
        torch.neg(zero, out=low)
        torch.add(low, self.most, out=high)
        memory = tuple(
            values.unflatten(0, (-1, stop - start)) for values in (scale, zero, low, high, levels)
        )
        if self.free is not None:
            for limit in memory[2:4]:
                limit.mul_(self.free[:, start:stop])
        return memory


class _Block:
    """Columns start … stop−1. Columns of the layer are contiguous rows here, (b, K, n).

    Args:
        left: W' of the columns that are not done and W' − Q of those that are; changed.
        factor: V.
        grids: of all columns.
        codes: uint8, like ``left``; changed.
        whitened: (Q − W') V, like ``left``; changed. The x of the columns stand there until they are rounded.
        start, stop: which columns.
    """

    def __init__(
        self,
        left: Tensor,
        factor: Tensor,
        grids: _Grids,
        codes: Tensor,
        whitened: Tensor,
        start: int,
        stop: int,
    ) -> None:
        part = slice(start, stop)
        self.error, self.codes = left[:, part], codes[:, part]
        self.diagonal = factor.diagonal(dim1=-2, dim2=-1)[:, part]
        carry = factor[:, :stop, part] / self.diagonal.unsqueeze(1)
        self.carry, self.best = carry[:, start:], whitened[:, part]
        _added(self.error, carry[:, :start], left[:, :start], self.best)
        self.scale, self.zero, self.low, self.high, self.levels = grids.of(start, stop)

    def solve(self) -> Tensor:
        """Choose the codes and leave their errors; what these columns add to the loss of each row, (b, n)."""
        self._range(0, self.best.shape[1])
        whitened = self.best.addcmul_(self.levels, self.scale, value=-1).mul_(
            -self.diagonal.unsqueeze(-1)
        )
        self.codes.copy_(self.levels.add_(self.zero))
        return torch.square(whitened, out=self.levels).sum(1)

    def _range(self, start: int, stop: int) -> None:
        """Columns to which everything before ``start`` has been added."""
        if stop - start <= _LEAF:
            self._columns(start, stop)
            return
        middle = start + (stop - start) // 2
        self._range(start, middle)
        _add(
            self.best[:, middle:stop],
            self.carry[:, start:middle, middle:stop],
            self.error[:, start:middle],
        )
        self._range(middle, stop)

    def _columns(self, start: int, stop: int) -> None:
        working = (self.best, self.levels, self.error, self.scale, self.low, self.high)
        columns = zip(*(values[:, start:stop].unbind(1) for values in working), strict=True)
        for column, (best, levels, error, scale, low, high) in enumerate(columns, start=start):
            if column > start:
                _add(
                    best.unsqueeze(1),
                    self.carry[:, start:column, column : column + 1],
                    self.error[:, start:column],
                )
            torch.div(best, scale, out=levels)
            torch.clamp(levels.round_(), low, high, out=levels)
            error.addcmul_(levels, scale, value=-1)


def _added(values: Tensor, carry: Tensor, errors: Tensor, out: Tensor) -> None:
    """Values (b, m, n) and what errors (b, k, n) carry to them by (b, k, m); a single block by the faster kernel."""
    if values.shape[0] == 1:
        torch.addmm(values[0], carry[0].mT, errors[0], out=out[0])
    else:
        torch.baddbmm(values, carry.mT, errors, out=out)


def _add(values: Tensor, carry: Tensor, errors: Tensor) -> None:
    """:func:`_added` in place."""
    if values.shape[0] > 1:
        values.baddbmm_(carry.mT, errors)
    elif values.shape[1] > 1:
        values[0].addmm_(carry[0].mT, errors[0])
    else:
        values[0, 0].addmv_(errors[0].mT, carry[0, :, 0])
