"""Rows that descend together, each by moves of its own: what greedy.py and pairs.py share.

With D = Q − W', moving the code of column k of a row by p levels of its scale s changes the loss
(Q − W') H (Q − W')ᵀ by −2 w p (x − p/2), where

    x_k = −(D H)_k / (H_kk s),     w_k = H_kk s²

and changes every x_l by −p s H_kl / (H_ll s_l). x, w and what the grid leaves of the moves are all that
a step needs, and x is all that it changes at once.

A piece of the rows advances together, and the rows that are done leave it from time to time. How many
are left is the only thing that is read from the device, a few times for every K steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.numerics.sync import to_host
from tsq_layers.solver.blocks import product, stack
from tsq_layers.solver.coded import Coded

LANE = 64  # a maximum over more columns is taken in two levels, of which the first is a fast kernel
_SLACK = 64  # a gain of less than so many units of rounding is none, lest a tie goes back and forth
_CHUNK_ELEMENTS = 2**20  # weights whose rows advance together: bounds the working memory
_CHECKS = 16  # how often, in as many steps as there are columns, the rows that are done leave
_FEWEST = 8  # and at least so many steps between


@dataclass(eq=False)
class Rows:
    """Some rows, which the steps change. K is filled up to L columns, a multiple of a lane.

    Attributes:
        residual: x, float (n, L); 0 where filled up, as are weight and unit.
        low: the least move inside the grid, −code, (n, L).
        high: the largest, 2^bits − 1 − code, (n, L).
        weight: w, (n, L).
        unit: 1/s, (n, L).
        first: where the rows of ``response`` for this row's block begin, int64 (n, 1).
        index: which rows they are, int64 (n,).
        idle: steps since the last move, int64 (n, 1).
        response: −H_kl / H_ll, (B·K, L), the row of column k of one block after the other.
        columns: K.
    """

    residual: Tensor
    low: Tensor
    high: Tensor
    weight: Tensor
    unit: Tensor
    first: Tensor
    index: Tensor
    idle: Tensor
    response: Tensor
    columns: int

    def move(self, column: Tensor, levels: Tensor) -> None:
        """Move one code of each row: int64 (n, 1), and float (n, 1), which may be 0."""
        self.low.scatter_add_(1, column, -levels)
        self.high.scatter_add_(1, column, -levels)
        distance = levels / self.unit.gather(1, column)
        change = self.response.index_select(0, (self.first + column).squeeze(1)).mul_(distance)
        self.residual.addcmul_(change, self.unit)

    def keep(self, chosen: Tensor) -> None:
        """Go on with these rows only, int64."""
        for name in ("residual", "low", "high", "weight", "unit", "first", "index", "idle"):
            setattr(self, name, getattr(self, name).index_select(0, chosen))

    def codes(self) -> Tensor:
        """Return the present codes, uint8 (n, K)."""
        return (-self.low).narrow(1, 0, self.columns).to(torch.uint8)


Step = Callable[
    [Rows, int], Tensor
]  # moves the rows, in the step of this number, and says which it moved, bool (n, 1)


def advance(problem: Coded, step: Step, steps: int, patience: int) -> Tensor:
    """Repeat a step until no row has moved for ``patience`` steps, but ``steps`` times at most.

    Args:
        problem: where to start, see :class:`Coded`.
        step: a move of each row.
        steps: at most.
        patience: steps without a move after which a row is done.

    Returns:
        codes uint8 (N, K).
    """
    codes = torch.empty_like(problem.codes)
    for rows in _pieces(problem):
        _advance(step, rows, codes, steps, patience)
    return codes


def _advance(step: Step, rows: Rows, codes: Tensor, steps: int, patience: int) -> None:
    every = max(_FEWEST, rows.columns // _CHECKS)
    for number in range(steps):
        rows.idle = torch.where(step(rows, number), 0, rows.idle + 1)
        if (number + 1) % every == 0 and number + 1 < steps:
            going = (rows.idle < patience).squeeze(1)
            count = int(to_host(going.sum())[0])
            if count < len(going):
                codes.index_copy_(0, rows.index, rows.codes())
                rows.keep(going.to(torch.uint8).argsort(descending=True, stable=True)[:count])
            if count == 0:
                return
    codes.index_copy_(0, rows.index, rows.codes())


def _pieces(problem: Coded) -> Iterator[Rows]:
    """Yield rows in pieces of a bounded size, ready to start."""
    codes, target, hessian, scales, _, bits, group_size = problem[:-1]
    metrics, columns = stack(hessian), target.shape[1]
    curvature = metrics.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    curvature = torch.where(curvature > 0, curvature, torch.ones_like(curvature))
    response = metrics / -curvature
    slope = product(problem.error(), response)
    response = _filled(response.flatten(0, 1))
    for index in torch.arange(len(target), device=target.device).split(
        max(1, _CHUNK_ELEMENTS // columns)
    ):
        block = index // (len(target) // len(metrics))
        code = codes[index].to(target.dtype)
        scale = (
            scales[index].to(target.dtype).repeat_interleave(group_size, 1).narrow(1, 0, columns)
        )
        weight = scale.square() * curvature.squeeze(1)[block]
        yield Rows(
            residual=_filled(slope[index] / scale),
            low=_filled(-code),
            high=_filled(grid.code_max(bits) - code),
            weight=_filled(
                weight if problem.free is None else weight * problem.free[index]
            ),  # no move gains anything there
            unit=_filled(scale.reciprocal()),
            first=(block * columns).unsqueeze(1),
            index=index,
            idle=torch.zeros_like(index).unsqueeze(1),
            response=response,
            columns=columns,
        )


def _filled(values: Tensor) -> Tensor:
    """Fill up (n, K) → (n, L) with zeros."""
    columns = values.shape[1]
    return F.pad(values, (0, -columns % LANE)) if columns > LANE else values


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of each row and where it is, twice (n, 1).

    Example:
        >>> [found.tolist() for found in largest(torch.tensor([[1.0, 3.0, 2.0]]))]
        [[[3.0]], [[1]]]
    """
    if values.shape[1] <= LANE or values.shape[1] % LANE:
        return values.max(1, keepdim=True)
    lanes = values.view(len(values), -1, LANE)
    lane = lanes.amax(-1).argmax(1, keepdim=True)
    inside = lanes.gather(1, lane.unsqueeze(-1).expand(-1, 1, LANE)).squeeze(1)
    value, column = inside.max(1, keepdim=True)
    return value, lane * LANE + column


def worthwhile(gain: Tensor, size: Tensor) -> Tensor:
    """Return whether a gain is more than rounding, where the move alone would cost ``size``; bool."""
    return gain > _SLACK * torch.finfo(gain.dtype).eps * size
