"""Group by group, row by row: scales over clipping factors, and zero points by steps of one.

W: target weights w' (N, K); H: damped Hessian (K, K); codes: where to start (N, K); scales, zeros: (N, G).
Losses are (q - w')^T H (q - w') of a row, always evaluated afresh.
"""

import torch
from torch import Tensor

from .descent import best_value, row_loss
from .grid import code_of, dequantize, group_columns


def _row(codes: list[int], scales: list[float], zeros: list[int], g: int) -> Tensor:
    tensors = (torch.tensor([values]) for values in (codes, scales, zeros))
    c, s, z = tensors
    return dequantize(c, s.double(), z, g)[0]


def factors(
    codes: Tensor,
    W: Tensor,
    H: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    g: int,
    tried: tuple[float, ...],
    dtype: torch.dtype,
    nearest: bool,
    passes: int,
) -> tuple[Tensor, Tensor]:
    """Each group in turn takes the factor of its scale with the least loss, codes of W or of the best values."""
    found, found_scales = codes.long().clone(), scales.double().clone()
    for r, w in enumerate(W.double()):
        c, s, z = found[r].tolist(), found_scales[r].tolist(), zeros[r].long().tolist()
        for _ in range(passes):
            for i, columns in enumerate(group_columns(len(w), g)):
                q = _row(c, s, z, g)
                goal = {j: float(w[j]) if nearest else best_value(q, w, H, j) for j in columns}
                states = [(row_loss(q, w, H), -1, c, s)]
                for number, factor in enumerate(tried):
                    new = float(torch.tensor(s[i] * factor, dtype=torch.float64).to(dtype))
                    new_c, new_s = list(c), list(s)
                    new_s[i] = new
                    for j in columns:
                        new_c[j] = code_of(goal[j], new, z[i], bits)
                    states.append((row_loss(_row(new_c, new_s, z, g), w, H), number, new_c, new_s))
                _, _, c, s = min(states)
        found[r], found_scales[r] = torch.tensor(c), torch.tensor(s, dtype=torch.float64)
    return found, found_scales


def zero_steps(
    codes: Tensor,
    W: Tensor,
    H: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    g: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each group in turn takes z - 1, z or z + 1 with the least loss, codes of the best values,
    scale in closed form.
    """
    found, found_scales, found_zeros = (
        codes.long().clone(),
        scales.double().clone(),
        zeros.long().clone(),
    )
    for r, w in enumerate(W.double()):
        c, s, z = found[r].tolist(), found_scales[r].tolist(), found_zeros[r].tolist()
        for i, columns in enumerate(group_columns(len(w), g)):
            q = _row(c, s, z, g)
            states = [(row_loss(q, w, H), -2, c, s, z)]
            for step in (-1, 0, 1):
                new_c, new_s, new_z = list(c), list(s), list(z)
                new_z[i] = min(max(z[i] + step, 0), 2**bits - 1)
                for j in columns:
                    new_c[j] = code_of(best_value(q, w, H, j), s[i], new_z[i], bits)
                rest, direction = q.clone(), torch.zeros_like(q)
                for j in columns:
                    rest[j], direction[j] = 0, new_c[j] - new_z[i]
                curvature = float(direction @ H @ direction)
                best = float(direction @ H @ (w - rest)) / curvature if curvature else -1.0
                new_s[i] = (
                    float(torch.tensor(best, dtype=torch.float64).to(dtype)) if best > 0 else s[i]
                )
                states.append(
                    (row_loss(_row(new_c, new_s, new_z, g), w, H), step, new_c, new_s, new_z)
                )
            _, _, c, s, z = min(states)
        found[r], found_zeros[r] = torch.tensor(c), torch.tensor(z)
        found_scales[r] = torch.tensor(s, dtype=torch.float64)
    return found, found_scales, found_zeros
