"""Stage 2: integers frozen, all scales of a row refined on the layer-wise loss, in closed form.

Two-Stage (arXiv 2602.02126), second stage. With n_i the integers of group i, the loss of a row is
a quadratic in its G scales,

    sᵀ A s − 2 tᵀ s + const,     A_ij = n_iᵀ H_ij n_j,     t_i = n_iᵀ (H w')_i

so A (G×G) and t are built once and everything after that happens in the small space. The paper's
coordinate step, s_i += n_iᵀ H_{i,:}(w' − q) / n_iᵀ H_ii n_i, is s_i = (t_i − Σ_{j≠i} A_ij s_j)/A_ii;
the minimiser of all scales at once solves A s = t. Both are pulled towards the scales s° of stage
1 with weight ρ·A_ii, which bounds scales that the data hardly determine:

    F(s) = sᵀ A s − 2 tᵀ s + ρ Σ_i A_ii (s_i − s°_i)²

Shapes: N rows, K columns, G groups; rows are processed in chunks of C.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers import grid

_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True, eq=False)
class SmallProblem:
    """Stage 2 in the small space.

    Attributes:
        gram: A, float32 (N, G, G).
        linear: t, float32 (N, G).
        start: s°, the scales of stage 1, float32 (N, G).
        ridge: ρ.
    """

    gram: Tensor
    linear: Tensor
    start: Tensor
    ridge: float

    def objective(self, scales: Tensor) -> Tensor:
        """F(s) of each row, up to the constant: (N, G) → (N,)."""
        return self.loss(scales) + self.ridge * (
            self.gram.diagonal(dim1=1, dim2=2) * (scales - self.start).square()
        ).sum(1)

    def loss(self, scales: Tensor) -> Tensor:
        """The layer-wise loss of each row without the pull, up to the constant: (N, G) → (N,)."""
        curvature = torch.bmm(self.gram, scales.unsqueeze(-1)).squeeze(-1)
        return (scales * (curvature - 2 * self.linear)).sum(1)


def small_problem(
    steps: Tensor, target: Tensor, hessian: Tensor, start: Tensor, group_size: int, ridge: float
) -> SmallProblem:
    """Build A and t.

    Args:
        steps: the integers code − zero point, float32 (N, K).
        target: W' float32 (N, K).
        hessian: damped H, float32 (K, K).
        start: s°, float32 (N, G).
    """
    rows = max(1, _CHUNK_ELEMENTS // steps.shape[1])
    gram = torch.cat([_gram(chunk, hessian, group_size) for chunk in steps.split(rows)])
    linear = grid.to_groups(steps * (target @ hessian), group_size).sum(-1)
    return SmallProblem(gram, linear, start, ridge)


def _gram(steps: Tensor, hessian: Tensor, group_size: int) -> Tensor:
    """A (C, G, G). The lower triangle is computed: group i against the columns up to its own end."""
    columns = steps.shape[1]
    count = grid.group_count(columns, group_size)
    gram = steps.new_zeros(steps.shape[0], count, count)
    for i in range(count):
        start, stop = i * group_size, min((i + 1) * group_size, columns)
        products = (steps[:, start:stop] @ hessian[start:stop, :stop]).mul_(steps[:, :stop])
        gram[:, i, : i + 1] = grid.to_groups(products, group_size).sum(-1)
    return gram + gram.tril(-1).transpose(1, 2)


def descent(problem: SmallProblem, sweeps: int) -> Tensor:
    """The paper's coordinate descent: ``sweeps`` passes over the groups of every row, (N, G).

    A group without curvature (all its integers 0), and a step to a scale that is not positive,
    leave the scale as it is.
    """
    scales = problem.start.clone()
    diagonal = problem.gram.diagonal(dim1=1, dim2=2)
    curvature = (1 + problem.ridge) * diagonal
    pull = problem.linear + problem.ridge * diagonal * problem.start
    for _ in range(sweeps):
        for i in range(scales.shape[1]):
            others = torch.einsum("nj,nj->n", problem.gram[:, i], scales) - diagonal[:, i] * scales[:, i]
            step = (pull[:, i] - others) / curvature[:, i]
            scales[:, i] = torch.where((step > 0) & torch.isfinite(step), step, scales[:, i])
    return scales


def exact(problem: SmallProblem, fallback: Tensor) -> Tensor:
    """The scales of every row that minimise F, (N, G): one batched Cholesky solve.

    A row whose solution has a scale that is not positive, or whose system is singular, takes the
    scales of ``fallback`` (N, G) as a whole: part of a joint minimum is no minimum.
    """
    diagonal = problem.gram.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    curvature = torch.where(empty, torch.ones_like(diagonal), problem.ridge * diagonal)
    system = problem.gram + torch.diag_embed(curvature)
    right = problem.linear + curvature * problem.start
    lower, info = torch.linalg.cholesky_ex(system)
    scales = torch.cholesky_solve(right.unsqueeze(-1), lower).squeeze(-1)
    sound = (info == 0) & ((scales > 0) & torch.isfinite(scales)).all(1)
    return torch.where(sound.unsqueeze(1), scales, fallback)


def accept(problem: SmallProblem, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be stored, for the rows whose layer-wise loss falls; the start elsewhere.

    Args:
        scales: float32 (N, G).
        dtype: what they are stored in; the loss is compared after that rounding.
    """
    start, rounded = grid.storable(problem.start, dtype), grid.storable(scales, dtype)
    better = problem.loss(rounded) < problem.loss(start)
    return torch.where(better.unsqueeze(1), rounded, start)
