"""The columns of a layer one after the other, each at its best value given all others: what cyclic descents share.

What is minimised is (Q − W') H (Q − W')ᵀ. With D = Q − W', column j of a row alone is best at

    v_j = q_j − (D H)_j / H_jj = w'_j + Σ_k C_jk d_k,     C = I − diag(H)⁻¹ H  (a zero diagonal)

and where it may not be at v_j, at the level that is nearest to it: the loss is a parabola in q_j. What levels
there are is for the choice that a sweep is given to know.

v is computed for a block of columns at a time, from D as it stands, by one product: a sweep costs one
N×K×K product. Inside a block the changes are carried on recursively as in gptq.py, to the leaves, runs
of columns of a single group. There everything is in units of the row's scale, so a column is its choice and two
operations: subtract, and add the change to the columns left.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAF = 16
_BLOCK = 128

Choice = Callable[
    [Tensor, Tensor, Tensor, Tensor], None
]  # of the values v (b, n) and the levels, into the last tensor


@dataclass(frozen=True)
class _Leaf:
    """Columns start … stop−1, all of one group."""

    start: int
    stop: int
    group: int


class Sweeper:
    """Working memory of one run, which it changes; columns of the layer are contiguous rows here, (b, K, n).

    Args:
        hessian: (b, K, K).
        target: W' (b, n, K).
        levels: where to start, in units of the scale, (b, n, K).
        scale: of each group, (b, G, n).
        bounds: two tensors (b, G, n, …) that are handed to the choice of a column of the group.
        group_size: columns of a group.
        free: 0 where Q is to be zero, else 1, (b, K, n); ``None``: 1 everywhere.
    """

    def __init__(
        self,
        hessian: Tensor,
        target: Tensor,
        levels: Tensor,
        scale: Tensor,
        bounds: tuple[Tensor, Tensor],
        group_size: int,
        free: Tensor | None = None,
    ) -> None:
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        self.curvature = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).unsqueeze(
            -1
        )
        self.coupling = hessian / -self.curvature
        self.coupling.diagonal(dim1=-2, dim2=-1).zero_()
        self.target, self.levels, self.scale, self.bounds = (
            turned(target),
            turned(levels),
            scale,
            bounds,
        )
        self.free = free
        if free is not None:
            self.levels.mul_(free)
        self.error = torch.empty_like(self.target)
        self.blocks = _blocks(target.shape[-1], group_size)
        for leaf in itertools.chain.from_iterable(self.blocks):
            self._settle(leaf)

    def sweep(self, choose: Choice) -> None:
        """Visit all columns once."""
        for leaves in self.blocks:
            start, stop = leaves[0].start, leaves[-1].stop
            best = _added(self.target[:, start:stop], self.coupling[:, start:stop], self.error)
            change = torch.empty_like(best)
            self._solve(leaves, choose, best, change)

    def better(self, kept: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the better of the present levels and those kept, for each row, (b, K, n), and its loss (b, 1, n)."""
        error_H = self.error - self.coupling.bmm(self.error)
        loss = error_H.mul_(self.error).mul_(self.curvature).sum(1, keepdim=True)
        if kept is None:
            return self.levels.clone(), loss
        lower = loss < kept[1]
        return torch.where(lower, self.levels, kept[0]), torch.where(lower, loss, kept[1])

    def _solve(self, leaves: list[_Leaf], choose: Choice, best: Tensor, change: Tensor) -> None:
        """Choose the columns of these leaves; ``best`` and ``change`` begin with the first of them."""
        if len(leaves) == 1:
            self._columns(leaves[0], choose, best, change)
            return
        left, right = leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]
        start, middle, stop = left[0].start, right[0].start, right[-1].stop
        width = middle - start
        self._solve(left, choose, best[:, :width], change[:, :width])
        later = best[:, width:]
        _add(later, self.coupling[:, middle:stop, start:middle], change[:, :width])
        self._solve(right, choose, later, change[:, width:])

    def _columns(self, leaf: _Leaf, choose: Choice, best: Tensor, change: Tensor) -> None:
        group, width = leaf.group, leaf.stop - leaf.start
        scale, low, high = (values[:, group].contiguous() for values in (self.scale, *self.bounds))
        before = self.levels[:, leaf.start : leaf.stop]
        codes = torch.empty_like(before)
        coupling = self.coupling[:, leaf.start : leaf.stop, leaf.start : leaf.stop].unsqueeze(-1)
        best.div_(scale.unsqueeze(1))
        working = (values.unbind(1) for values in (best, before, codes, change))
        columns = zip(*working, coupling.unbind(2), strict=True)
        for column, (value, old, new, shift, carry) in enumerate(columns, start=1):
            choose(value, low, high, new)
            if self.free is not None:
                new.mul_(self.free[:, leaf.start + column - 1])
            torch.sub(new, old, out=shift)
            if column < width:
                later = best.narrow(1, column, width - column)
                later.addcmul_(carry.narrow(1, column, width - column), shift.unsqueeze(1))
        before.copy_(codes)
        change.mul_(scale.unsqueeze(1))
        self._settle(leaf)

    def _settle(self, leaf: _Leaf) -> None:
        """Compute Q − W' of a leaf from its levels, so that rounding does not build up from sweep to sweep."""
        part = slice(leaf.start, leaf.stop)
        error = self.error[:, part]
        torch.mul(self.levels[:, part], self.scale[:, leaf.group].unsqueeze(1), out=error)
        error.sub_(self.target[:, part])


@functools.cache
def _blocks(columns: int, group_size: int) -> list[list[_Leaf]]:
    """Return all columns in order, as blocks of leaves.

    A block has at most _BLOCK columns, a leaf at most _LEAF columns of one group.
    """
    leaves = [
        _Leaf(start, min(start + _LEAF, first + group_size, columns), first // group_size)
        for first in range(0, columns, group_size)
        for start in range(first, min(first + group_size, columns), _LEAF)
    ]
    groups: list[list[_Leaf]] = [[]]
    for leaf in leaves:
        if groups[-1] and leaf.stop - groups[-1][0].start > _BLOCK:
            groups.append([])
        groups[-1].append(leaf)
    return groups


def turned(values: Tensor) -> Tensor:
    """(b, n, K) ↔ (b, K, n), contiguous; a single matrix by the kernel for matrices, which is several times faster."""
    return (
        values[0].mT.contiguous().unsqueeze(0) if values.shape[0] == 1 else values.mT.contiguous()
    )


def _added(values: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return values + left @ right of every block; a single one by the faster kernel."""
    if values.shape[0] == 1:
        return torch.addmm(values[0], left[0], right[0]).unsqueeze(0)
    return torch.baddbmm(values, left, right)


def _add(values: Tensor, left: Tensor, right: Tensor) -> None:
    """:func:`_added` in place."""
    if values.shape[0] == 1:
        values[0].addmm_(left[0], right[0])
    else:
        values.baddbmm_(left, right)
