"""GPTQ by explicit optimal-brain-surgeon updates: after a column is fixed, the remaining ones compensate.

W: target weights (N, K); H: damped Hessian (K, K); F: the columns that are not yet fixed, in processing order.
"""

import torch
from torch import Tensor

from .grid import code_of, group_of


def gptq(
    W: Tensor,
    H_damped: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    g: int,
    order: list[int] | Tensor,
) -> Tensor:
    """Codes (N, K), int64, in the original column order, on static grids, columns fixed in the order given.

    Column j, with P = (H_FF)^-1 taken afresh: c_j = grid(w_j); w_F <- w_F - (w_j - q_j) / P_jj * P_{F,j}.
    """
    work = W.double().clone()
    codes = torch.zeros(W.shape, dtype=torch.int64)
    remaining = [int(j) for j in order]
    while remaining:
        j, i = remaining[0], group_of(remaining[0], g)
        P = torch.linalg.inv(H_damped[remaining][:, remaining])
        for r in range(W.shape[0]):
            s, z = float(scales[r, i]), int(zeros[r, i])
            codes[r, j] = code_of(float(work[r, j]), s, z, bits)
            error = work[r, j] - s * (int(codes[r, j]) - z)
            work[r, remaining] -= error / P[0, 0] * P[:, 0]
        remaining = remaining[1:]
    return codes
