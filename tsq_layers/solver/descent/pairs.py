"""CDQuant by blocks of two: descent on pairs of integers, grids fixed, from any start.

After arXiv 2406.17542, algorithm 2 with k = 2; written from the mathematics. With the symbols of
rows.py, moves p_i and p_j of columns i and j of a row gain

    2 w_i p_i (x_i − p_i/2) + 2 w_j p_j (x_j' − p_j/2),     x_j' = x_j − p_i s_i H_ij / (H_jj s_j)

which for given p_i is greatest at p_j = x_j' rounded and held inside the grid. So the best of all pairs
of levels of two columns is found with one trial for each level of i.

The paper draws a partition of the columns into pairs for each step and takes the best of these pairs.
Here the pairs of a step are those of one column i with every other, and i goes round: no drawing,
x_j' of all of them is one row of H away, and after one round without a move, every pair has been seen.
"""

import torch
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver.coded import Coded
from tsq_layers.solver.descent.rows import Rows, advance, largest, worthwhile


def descend(problem: Coded, steps: int, reach: int | None = None) -> Tensor:
    """Make, step by step, the best move of each column together with its best partner, until no pair gains.

    Args:
        problem: where to start, see :class:`Coded`.
        steps: K of them are a round.
        reach: levels by which the column moves at most, while its partner may move by any number;
            ``None``: any.

    Returns:
        codes uint8 (N, K); no row has a larger loss than at the start.
    """
    columns, most = problem.codes.shape[1], grid.code_max(problem.bits)
    most = most if reach is None else min(reach, most)
    distances = [sign * size for size in range(1, most + 1) for sign in (1, -1)]

    def best_pair(rows: Rows, number: int) -> Tensor:
        return _best_pair(rows, number % columns, distances)

    return advance(problem, best_pair, steps, patience=columns)


def _best_pair(rows: Rows, column: int, distances: list[int]) -> Tensor:
    """Move this column by one of the distances, and the best other with it, where the two gain."""
    residual, low, high, weight, unit = (
        values.narrow(1, column, 1)
        for values in (rows.residual, rows.low, rows.high, rows.weight, rows.unit)
    )
    change = rows.response.view(-1, rows.columns, rows.response.shape[1])[:, column]
    if len(change) > 1:
        change = change.index_select(0, rows.first.squeeze(1) // rows.columns)
    change = change * rows.unit
    change.div_(unit)
    best, move, reply = (
        torch.zeros_like(residual),
        torch.zeros_like(residual),
        torch.zeros_like(residual),
    )
    partner = torch.zeros_like(rows.first)
    for distance in distances:
        neighbour_error = torch.add(rows.residual, change, alpha=distance)
        replies = torch.clamp(torch.round(neighbour_error), rows.low, rows.high)
        replies.select(1, column).zero_()
        gains = neighbour_error.sub_(replies, alpha=0.5).mul_(replies).mul_(rows.weight)
        gain, other = largest(gains)
        gain = gain + weight * distance * (residual - distance / 2)
        better = (low <= distance) & (distance <= high) & (gain > best)
        best, move = torch.where(better, gain, best), torch.where(better, distance, move)
        partner, reply = (
            torch.where(better, other, partner),
            torch.where(better, replies.gather(1, other), reply),
        )
    size = weight * move.square() + rows.weight.gather(1, partner) * reply.square()
    is_better = worthwhile(best, size)
    rows.move(torch.full_like(partner, column), move * is_better)
    rows.move(partner, reply * is_better)
    return is_better
