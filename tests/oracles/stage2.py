"""Stage 2: scales refined with codes and zero points frozen, in the space of the weights.

codes: (N, K); zeros, scales: (N, G); target: w' (N, K); H, R: (K, K);
n = codes - zeros; q = s n; i: the columns of group i.
"""

import torch
from torch import Tensor

from .grid import dequantize, group_columns


def integers(codes: Tensor, zeros: Tensor, g: int) -> Tensor:
    """n = c - z (N, K), as float64."""
    return dequantize(codes, torch.ones(zeros.shape, dtype=torch.float64), zeros, g)


def descent(
    codes: Tensor, zeros: Tensor, scales: Tensor, target: Tensor, H: Tensor, g: int, sweeps: int
) -> Tensor:
    """Gauss-Seidel over groups 0..G-1 of each row: s_i <- s_i + n_i^T H_{i,:} (w' - q) / (n_i^T H_ii n_i)."""
    return descent_with_deviation(codes, zeros, scales, target, H, torch.zeros_like(H), g, sweeps)


def descent_with_deviation(
    codes: Tensor,
    zeros: Tensor,
    scales: Tensor,
    W: Tensor,
    H: Tensor,
    R: Tensor,
    g: int,
    sweeps: int,
) -> Tensor:
    """The same with the deviation term: s_i <- s_i + [n_i^T H_{i,:} (w - q) - (w^T R)_i n_i] / (n_i^T H_ii n_i).

    A group with denominator 0 keeps its scale.
    """
    n, out = integers(codes, zeros, g), scales.double().clone()
    groups = group_columns(W.shape[1], g)
    for r, w in enumerate(W.double()):
        for _ in range(sweeps):
            for i, columns in enumerate(groups):
                q = dequantize(codes[r : r + 1], out[r : r + 1], zeros[r : r + 1], g)[0]
                n_i = n[r, columns]
                denominator = n_i @ H[columns][:, columns] @ n_i
                if denominator == 0:
                    continue
                out[r, i] += (n_i @ H[columns] @ (w - q) - (w @ R)[columns] @ n_i) / denominator
    return out


def basis(n: Tensor, g: int) -> Tensor:
    """B (K, G) of one row: column i holds n_i on the columns of group i and 0 elsewhere, so that q = B s."""
    groups = group_columns(n.shape[0], g)
    B = torch.zeros(n.shape[0], len(groups), dtype=torch.float64)
    for i, columns in enumerate(groups):
        B[columns, i] = n[columns]
    return B


def exact(
    codes: Tensor,
    zeros: Tensor,
    target: Tensor,
    H: Tensor,
    g: int,
    ridge: float = 0.0,
    start: Tensor | None = None,
) -> Tensor:
    """Joint minimiser, row by row: (B^T H B + ridge D) s = B^T H w' + ridge D start, D = diag(B^T H B).

    Without `start` it is 0. A group with D = 0 keeps `start`; a singular system gets its least-norm solution.
    """
    n = integers(codes, zeros, g)
    out = torch.zeros(zeros.shape, dtype=torch.float64) if start is None else start.double().clone()
    for r, w in enumerate(target.double()):
        B = basis(n[r], g)
        A = B.T @ H @ B
        D = A.diagonal().diag()
        live = [i for i in range(A.shape[0]) if A[i, i] != 0]
        if not live:
            continue
        right = B.T @ H @ w + ridge * D @ out[r]
        left = (A + ridge * D)[live][:, live]
        out[r, live] = torch.linalg.lstsq(left, right[live].unsqueeze(1), driver="gelsd").solution[
            :, 0
        ]
    return out
