"""Outlier-aware QuantEase: codes, and a few entries that are kept apart in full precision.

arXiv 2309.01885, section 4. The weight is Q + S, Q on a grid and S with a given number of entries that are not
0, or of columns. What is minimised is D H Dᵀ, D = Q + S − W', H damped as everywhere in the solver, in turn over

(i)   the codes: cyclic descent of Q against W' − S,
(ii)  the places of S: the largest entries (or columns, by their norm) of S − 2η D H, η = 1/(2 λ_max(H)); a
      step of projected gradients, which cannot raise the loss for a step up to this size,
(iii) the values of S in these places, by a few steps of conjugate gradients with the diagonal of H
as preconditioner. The
      step of (ii) is as short as the largest eigenvalue makes it, and alone would take very long to get there.

λ_max is estimated by power iteration, from below, so the loss could rise after all, as it can where values are
rounded to the dtype in which they are stored: the best state of the layer is kept. Grids are those of the
weights without the outliers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers.numerics.weight import Outliers
from tsq_layers.solver.blocks import product, scaled, stack
from tsq_layers.solver.coded import Coded
from tsq_layers.solver.descent import quantease as cyclic

_POWER_STEPS = 20
_VALUE_STEPS = 6
_MARGIN = 1.05  # by how much the largest eigenvalue may have been underestimated


@dataclass(frozen=True)
class Budget:
    """The number of outliers that there may be: ``columns`` whole ones, or ``entries`` anywhere.

    Example:
        >>> Budget(entries=2).places(torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
        tensor([[False,  True],
                [ True, False]])
        >>> Budget(columns=1).places(torch.tensor([[1.0, -3.0], [2.0, 0.0]])).tolist()
        [[False, True], [False, True]]
    """

    entries: int = 0
    columns: int = 0

    def places(self, values: Tensor) -> Tensor:
        """Return the places of the largest of these values (N, K), bool (N, K)."""
        if self.columns:
            largest = values.square().sum(0).topk(min(self.columns, values.shape[1])).indices
            mask = torch.zeros_like(values[0], dtype=torch.bool).index_fill(0, largest, True)
            return mask.expand_as(values)
        largest = values.abs().flatten().topk(min(self.entries, values.numel())).indices
        mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device).index_fill(
            0, largest, True
        )
        return mask.view_as(values)

    def stored(self, sparse: Tensor, places: Tensor, dtype: torch.dtype) -> Outliers:
        """Return values and places (N, K) as they are stored; as many as the budget says, whatever the values are."""
        rank = places.to(torch.uint8)
        if self.columns:
            columns = rank[0].topk(min(self.columns, sparse.shape[1])).indices.sort().values
            return Outliers(sparse[:, columns].to(dtype), columns=columns.to(torch.int32))
        indices = rank.flatten().topk(min(self.entries, sparse.numel())).indices.sort().values
        return Outliers(sparse.flatten()[indices].to(dtype), indices=indices.to(torch.int32))


def largest_eigenvalue(hessian: Tensor) -> Tensor:
    """Estimate λ_max of a positive definite matrix, or of each of a stack, by power iteration.

    (K, K) or (B, K, K) → () or (B,).

    Never above the true one. It starts from the row sums of |H|, which are not orthogonal to what is sought.

    Example:
        >>> largest_eigenvalue(torch.diag(torch.tensor([1.0, 4.0, 2.0])))
        tensor(4.)
    """
    vector = hessian.abs().sum(-1, keepdim=True)
    for _ in range(_POWER_STEPS):
        vector = hessian @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True))
    vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
    eigenvalue: Tensor = (vector * (hessian @ vector)).sum((-2, -1))
    return eigenvalue


def start(target: Tensor, budget: Budget) -> Tensor:
    """Return the entries of the target that are its outliers at first, the largest, and 0 elsewhere, (N, K)."""
    return target * budget.places(target)


def solve(
    problem: Coded, *, sparse: Tensor, budget: Budget, sweeps: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Outliers]:
    """Find better codes and outliers, on given grids.

    Args:
        problem: where to start, see :class:`Coded`; its target is W', its grids are for the weights
            without the outliers.
        sparse: the outliers of the start, (N, K), see :func:`start`.
        budget: how many there may be.
        sweeps: passes over the columns; between two of them, outliers move.
        dtype: what outliers are stored in.

    Returns:
        codes uint8 (N, K); the outliers, float (N, K), made of values that ``dtype`` holds, and the same as
        they are stored. The loss of the layer is at most that of the start, its outliers rounded to ``dtype``.

    Example:
        >>> from tsq_layers.numerics import grid
        >>> w, x = torch.randn(8, 32) ** 3, torch.randn(100, 32) @ torch.randn(32, 32)
        >>> budget = Budget(entries=8)
        >>> scales, zeros = grid.minmax(w - start(w, budget), 2, 16, symmetric=False)
        >>> codes = grid.quantize(w - start(w, budget), scales, zeros, 2, 16)
        >>> problem = Coded(codes, w, x.T @ x, scales, zeros, 2, 16)
        >>> options = {"sparse": start(w, budget), "budget": budget, "sweeps": 3, "dtype": torch.float16}
        >>> codes, sparse, stored = solve(problem, **options)
        >>> first = problem.error() + start(w, budget)
        >>> last = problem._replace(codes=codes).error() + sparse
        >>> bool((x @ last.T).norm() < (x @ first.T).norm())
        True
    """
    best = _State(problem.codes, sparse, budget.places(sparse)).rounded(dtype)
    least = best.loss(problem)
    present, rate = best, (_MARGIN * largest_eigenvalue(problem.hessian)).reciprocal()
    for number in range(sweeps):
        rest = problem._replace(codes=present.codes, target=problem.target - present.sparse)
        present = _State(cyclic.descend(rest, sweeps=1), present.sparse, present.places)
        loss = present.loss(problem)
        lower = loss < least
        least, best = torch.where(lower, loss, least), best.or_else(present, lower)
        if number + 1 < sweeps:
            present = _moved(present, problem, rate, budget).rounded(dtype)
    return best.codes, best.sparse, budget.stored(best.sparse, best.places, dtype)


@dataclass(frozen=True, eq=False)
class _State:
    codes: Tensor
    sparse: Tensor
    places: Tensor

    def rounded(self, dtype: torch.dtype) -> "_State":
        """Return the state with outliers as they are stored."""
        most = torch.finfo(dtype).max
        return _State(
            self.codes, self.sparse.clamp(-most, most).to(dtype).to(self.sparse.dtype), self.places
        )

    def error(self, problem: Coded) -> Tensor:
        """Return D (N, K)."""
        return problem._replace(codes=self.codes).dequantized() + self.sparse - problem.target

    def loss(self, problem: Coded) -> Tensor:
        """Return the loss of the layer, a scalar."""
        error = self.error(problem)
        return (product(error, problem.hessian) * error).sum()

    def or_else(self, other: "_State", lower: Tensor) -> "_State":
        """Return the other state if it is better, without a read from the device."""
        pairs = (
            (other.codes, self.codes),
            (other.sparse, self.sparse),
            (other.places, self.places),
        )
        return _State(*(torch.where(lower, new, old) for new, old in pairs))


def _moved(state: _State, problem: Coded, rate: Tensor, budget: Budget) -> _State:
    """Move outliers: steps (ii) and (iii)."""
    error = state.error(problem)
    sparse = state.sparse - scaled(product(error, problem.hessian), rate)
    places = budget.places(sparse)
    sparse = sparse * places
    return _State(
        state.codes, _settled(sparse, places, error - state.sparse, problem.hessian), places
    )


def _settled(sparse: Tensor, places: Tensor, rest: Tensor, hessian: Tensor) -> Tensor:
    """Return values that lower the loss of each row in these places, (N, K); ``rest`` is Q − W'."""
    diagonal = stack(hessian).diagonal(dim1=-2, dim2=-1)
    weight = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).reciprocal()
    weight = weight.repeat_interleave(len(sparse) // len(weight), 0) * places
    slope = -product(rest + sparse, hessian) * places
    scaled_slope = slope * weight
    direction, strength = scaled_slope, (slope * scaled_slope).sum(1, keepdim=True)
    for _ in range(_VALUE_STEPS):
        direction_H = product(direction, hessian) * places
        curvature = (direction * direction_H).sum(1, keepdim=True)
        length = torch.where(curvature > 0, strength / curvature, torch.zeros_like(curvature))
        sparse, slope = sparse + length * direction, slope - length * direction_H
        scaled_slope = slope * weight
        before, strength = strength, (slope * scaled_slope).sum(1, keepdim=True)
        share = torch.where(before > 0, strength / before, torch.zeros_like(before))
        direction = scaled_slope + share * direction
    return sparse
