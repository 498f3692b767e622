"""Scale and offset of every group at once, row by row, in the space of the weights.

codes: (N, K); scales, offsets: (N, G); W: w' (N, K); H: (K, K); q = s c + o; p = o + s m, m = (2^b - 1) / 2.
"""

import torch
from torch import Tensor

from .grid import group_columns, group_of


def dequantize(codes: Tensor, scales: Tensor, offsets: Tensor, g: int) -> Tensor:
    """q = s c + o (N, K), float64."""
    found = torch.zeros(codes.shape, dtype=torch.float64)
    for r in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            i = group_of(k, g)
            found[r, k] = float(scales[r, i]) * int(codes[r, k]) + float(offsets[r, i])
    return found


def exact(
    codes: Tensor,
    W: Tensor,
    H: Tensor,
    scales: Tensor,
    offsets: Tensor,
    bits: int,
    g: int,
    ridge: float,
) -> tuple[Tensor, Tensor]:
    """Minimise the loss + ridge Σ D_i (x_i - x_i°)² over x = (s, p), D the diagonal of BᵀHB; B holds c - m and 1."""
    middle, groups = (2**bits - 1) / 2, group_columns(W.shape[1], g)
    new_scales, new_offsets = scales.double().clone(), offsets.double().clone()
    for r, w in enumerate(W.double()):
        B = torch.zeros(len(w), 2 * len(groups), dtype=torch.float64)
        for i, columns in enumerate(groups):
            B[columns, i] = codes[r, columns].double() - middle
            B[columns, len(groups) + i] = 1
        start = torch.cat([new_scales[r], new_offsets[r] + middle * new_scales[r]])
        A = B.T @ H.double() @ B
        D = A.diagonal().diag()
        x = torch.linalg.solve(A + ridge * D, B.T @ H.double() @ w + ridge * D @ start)
        new_scales[r] = x[: len(groups)]
        new_offsets[r] = x[len(groups) :] - middle * new_scales[r]
    return new_scales, new_offsets
