"""CDQuant: greedy coordinate descent on the integers, grids fixed, from any start.

arXiv 2406.17542, algorithm 1; written from the mathematics. What is minimised is
(Q − W') H (Q − W')ᵀ, H damped as everywhere in the solver. The best move of a column, x rounded and held
inside the grid, gains 2 w p (x − p/2) (symbols in rows.py); in each step every row makes the best move
of its best column. A row without a move that gains is done: no single code can be changed with profit.
"""

import torch
from torch import Tensor

from tsq_layers.solver.coded import Coded
from tsq_layers.solver.descent.rows import Rows, advance, largest, worthwhile


def descend(problem: Coded, steps: int) -> Tensor:
    """Make in each step the best move of the best column of every row, until none gains.

    Args:
        problem: where to start, see :class:`Coded`.
        steps: moves that a row may make at most.

    Returns:
        codes uint8 (N, K); no row has a larger loss than at the start.

    Example:
        >>> from tsq_layers.numerics import grid
        >>> w, x = torch.randn(8, 32), torch.randn(100, 32) @ torch.randn(32, 32)
        >>> scales, zeros = grid.minmax(w, 3, 16, symmetric=False)
        >>> problem = Coded(grid.quantize(w, scales, zeros, 3, 16), w, x.T @ x, scales, zeros, 3, 16)
        >>> better = problem._replace(codes=descend(problem, steps=64))
        >>> before, after = (x @ each.error().T for each in (problem, better))
        >>> bool(after.norm() < before.norm())
        True
    """
    return advance(problem, _best_move, steps, patience=1)


def _best_move(rows: Rows, number: int) -> Tensor:  # noqa: ARG001
    moves = torch.round(rows.residual)
    torch.clamp(moves, rows.low, rows.high, out=moves)
    gains = torch.sub(rows.residual, moves, alpha=0.5).mul_(moves).mul_(rows.weight)
    gain, column = largest(gains)
    levels = moves.gather(1, column)
    is_better = worthwhile(gain, rows.weight.gather(1, column) * levels.square())
    rows.move(column, levels * is_better)
    return is_better
