"""QuantEase: cyclic coordinate descent on the integers, grids fixed, from any start.

arXiv 2309.01885. What is minimised is (Q − W') H (Q − W')ᵀ, H damped as everywhere in the solver. With
D = Q − W', column j of a row alone is best at

    v_j = q_j − (D H)_j / H_jj = w'_j + Σ_k C_jk d_k,     C = I − diag(H)⁻¹ H  (a zero diagonal),

and takes the level of its grid that is nearest to v_j: the loss is a parabola in q_j, so it falls or
stays (the paper's Lemma 1, equation 7). Neither an inverse nor a factorisation is needed.

v is computed for a block of columns at a time, from D as it stands, by one product: a sweep costs one
N×K×K product. Inside a block the changes are carried on recursively as in gptq.py, to the leaves, runs
of columns of a single group. There everything is in units of the row's scale, so a column is four
operations: round, clamp, subtract, and add the change to the columns left.

The paper's relaxation leaves all columns of some sweeps at v_j, unrounded, to leave a local minimum.
That is not monotone, so the best codes of each row are kept.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers import grid
from tsq_layers.solver.blocks import fold, stack

_LEAF = 16
_BLOCK = 128
_CHUNK_ELEMENTS = 2**24  # weights whose columns advance together, where there are blocks: bounds the working memory
_LAST_RELAXED = 25  # the authors' code relaxes no sweep after this one

Choice = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def descend(
    codes: Tensor,
    target: Tensor,
    hessian: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    sweeps: int,
    *,
    relax: bool = False,
) -> Tensor:
    """Sweep over the columns, each in turn at its best level given all others.

    Args:
        codes: where to start, uint8 (N, K).
        target: W' float (N, K).
        hessian: damped H, (K, K), or (B, K, K) for blocks of rows.
        scales: float (N, G).
        zeros: float (N, G).
        sweeps: passes over all columns.
        relax: the paper's schedule of unrounded sweeps; see :func:`is_relaxed`.

    Returns:
        codes uint8 (N, K); no row has a larger loss than at the start.

    Example:
        >>> w, x = torch.randn(8, 32), torch.randn(100, 32) @ torch.randn(32, 32)
        >>> scales, zeros = grid.minmax(w, 3, 16, symmetric=False)
        >>> codes = grid.quantize(w, scales, zeros, 3, 16)
        >>> better = descend(codes, w, x.T @ x, scales, zeros, 3, 16, sweeps=3)
        >>> before, after = (x @ (grid.dequantize(c, scales, zeros, 16) - w).T for c in (codes, better))
        >>> bool(after.norm() < before.norm())
        True
    """
    metrics = stack(hessian)
    blocks = metrics.shape[0]
    together = max(1, _CHUNK_ELEMENTS * blocks // max(1, target.numel()))
    rows = (fold(values, blocks) for values in (codes, target, scales.to(target.dtype), zeros.to(target.dtype)))
    parts = zip(*(values.split(together) for values in (metrics, *rows)), strict=True)
    found = [_descend(_Sweeper(*part, bits=bits, group_size=group_size), sweeps, relax) for part in parts]
    return torch.cat(found).flatten(0, 1)


def is_relaxed(sweep: int, sweeps: int) -> bool:
    """Whether the published schedule leaves this sweep (from 0) unrounded: each third, up to 25, never the last.

    Example:
        >>> [sweep for sweep in range(8) if is_relaxed(sweep, 8)]
        [1, 4]
    """
    return sweep % 3 == 1 and sweep <= _LAST_RELAXED and sweep < sweeps - 1


def _descend(run: "_Sweeper", sweeps: int, relax: bool) -> Tensor:
    """:func:`descend` for some blocks, (b, n, K)."""
    kept: tuple[Tensor, Tensor] | None = None
    for sweep in range(sweeps):
        if relax and is_relaxed(sweep, sweeps):
            kept = run.better(kept)  # up to here every sweep has lowered the loss
            run.sweep(_stay)
        else:
            run.sweep(_round)
    if kept is not None:
        run.steps, _ = run.better(kept)
    return run.codes()


def _round(best: Tensor, low: Tensor, high: Tensor, out: Tensor) -> None:
    """The paper's step: the nearest level."""
    torch.clamp(torch.round(best, out=out), low, high, out=out)


def _stay(best: Tensor, low: Tensor, high: Tensor, out: Tensor) -> None:  # noqa: ARG001
    """The relaxed step: no grid."""
    out.copy_(best)


@dataclass(frozen=True)
class _Leaf:
    """Columns start … stop−1, all of one group."""

    start: int
    stop: int
    group: int


class _Sweeper:
    """Working memory of one run, which it changes; columns of the layer are contiguous rows here, (b, K, n).

    Made of (b, K, K), twice (b, n, K) and twice (b, n, G).
    """

    def __init__(
        self,
        hessian: Tensor,
        codes: Tensor,
        target: Tensor,
        scales: Tensor,
        zeros: Tensor,
        *,
        bits: int,
        group_size: int,
    ) -> None:
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        self.curvature = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).unsqueeze(-1)
        self.coupling = hessian / -self.curvature
        self.coupling.diagonal(dim1=-2, dim2=-1).zero_()
        self.target, self.scale, self.low = _turned(target), _turned(scales), _turned(-zeros)
        self.high = self.low + grid.code_max(bits)
        self.steps = _turned(codes).to(target.dtype)
        self.error = torch.empty_like(self.target)
        self.blocks = _blocks(target.shape[-1], group_size)
        for leaf in itertools.chain.from_iterable(self.blocks):
            self.steps[:, leaf.start : leaf.stop] += self.low[:, leaf.group].unsqueeze(1)
            self._settle(leaf)

    def codes(self) -> Tensor:
        """The present codes, uint8 (b, n, K)."""
        found = torch.empty_like(self.steps, dtype=torch.uint8)
        for leaf in itertools.chain.from_iterable(self.blocks):
            part = slice(leaf.start, leaf.stop)
            found[:, part] = self.steps[:, part] - self.low[:, leaf.group].unsqueeze(1)
        return _turned(found)

    def sweep(self, choose: Choice) -> None:
        """Visit all columns once."""
        for leaves in self.blocks:
            start, stop = leaves[0].start, leaves[-1].stop
            best = _added(self.target[:, start:stop], self.coupling[:, start:stop], self.error)
            change = torch.empty_like(best)
            self._solve(leaves, choose, best, change)

    def better(self, kept: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The better of the present steps and those kept, for each row, (b, K, n), and its loss (b, 1, n)."""
        pulled = self.error - self.coupling.bmm(self.error)
        loss = pulled.mul_(self.error).mul_(self.curvature).sum(1, keepdim=True)
        if kept is None:
            return self.steps.clone(), loss
        lower = loss < kept[1]
        return torch.where(lower, self.steps, kept[0]), torch.where(lower, loss, kept[1])

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
        scale, low, high = (values[:, group] for values in (self.scale, self.low, self.high))
        before = self.steps[:, leaf.start : leaf.stop]
        chosen = torch.empty_like(before)
        coupling = self.coupling[:, leaf.start : leaf.stop, leaf.start : leaf.stop].unsqueeze(-1)
        best.div_(scale.unsqueeze(1))
        working = (values.unbind(1) for values in (best, before, chosen, change))
        columns = zip(*working, coupling.unbind(2), strict=True)
        for column, (value, old, new, moved, carry) in enumerate(columns, start=1):
            choose(value, low, high, new)
            torch.sub(new, old, out=moved)
            if column < width:
                later = best.narrow(1, column, width - column)
                later.addcmul_(carry.narrow(1, column, width - column), moved.unsqueeze(1))
        before.copy_(chosen)
        change.mul_(scale.unsqueeze(1))
        self._settle(leaf)

    def _settle(self, leaf: _Leaf) -> None:
        """Q − W' of a leaf from its steps, so that rounding does not build up from sweep to sweep."""
        part = slice(leaf.start, leaf.stop)
        error = self.error[:, part]
        torch.mul(self.steps[:, part], self.scale[:, leaf.group].unsqueeze(1), out=error)
        error.sub_(self.target[:, part])


@functools.cache
def _blocks(columns: int, group_size: int) -> list[list[_Leaf]]:
    """All columns in order: blocks of at most _BLOCK columns, of leaves of at most _LEAF columns of one group."""
    leaves = [
        _Leaf(start, min(start + _LEAF, first + group_size, columns), first // group_size)
        for first in range(0, columns, group_size)
        for start in range(first, min(first + group_size, columns), _LEAF)
    ]
    found: list[list[_Leaf]] = [[]]
    for leaf in leaves:
        if found[-1] and leaf.stop - found[-1][0].start > _BLOCK:
            found.append([])
        found[-1].append(leaf)
    return found


def _turned(values: Tensor) -> Tensor:
    """(b, n, K) ↔ (b, K, n), contiguous; a single matrix by the kernel for matrices, which is several times faster."""
    return values[0].mT.contiguous().unsqueeze(0) if values.shape[0] == 1 else values.mT.contiguous()


def _added(values: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Values + left @ right of every block; a single one by the faster kernel."""
    if values.shape[0] == 1:
        return torch.addmm(values[0], left[0], right[0]).unsqueeze(0)
    return torch.baddbmm(values, left, right)


def _add(values: Tensor, left: Tensor, right: Tensor) -> None:
    """:func:`_added` in place."""
    if values.shape[0] == 1:
        values[0].addmm_(left[0], right[0])
    else:
        values.baddbmm_(left, right)
