"""Stage 1: scale and zero point of one row and group that minimise (s n - w)^T H_ii (s n - w) over clipping factors.

w_g: weights of the group (g,); n_g: codes minus zero point (g,); H_gg: the group's diagonal block of H (g, g).
"""

import math

import torch
from torch import Tensor

from .grid import code_of, minmax_group


def group_loss(w_g: Tensor, n_g: Tensor, s: float, H_gg: Tensor) -> float:
    """(s n - w)^T H_ii (s n - w)."""
    d = s * n_g.double() - w_g
    return float(d @ H_gg @ d)


def best_scale(w_g: Tensor, n_g: Tensor, H_gg: Tensor) -> float:
    """Minimiser of the group loss over s for fixed n: n^T H w / n^T H n; nan where n^T H n = 0."""
    n = n_g.double()
    curvature = float(n @ H_gg @ n)
    return float(n @ H_gg @ w_g) / curvature if curvature != 0 else math.nan


def round_group(w_g: Tensor, s: float, z: int, bits: int) -> Tensor:
    """n = clip(round(w / s) + z, 0, 2^b - 1) - z."""
    return torch.tensor([code_of(w, s, z, bits) - z for w in w_g.tolist()], dtype=torch.int64)


def scan(
    w_g: Tensor, H_gg: Tensor, bits: int, symmetric: bool, clip_factors: list[float]
) -> tuple[float, int, float]:
    """Best (scale, zero, loss) over the clipping factors of the min-max range; the first of equals wins."""
    best = (math.nan, 0, math.inf)
    for clip in clip_factors:
        s, z = minmax_group(w_g.tolist(), bits, symmetric, clip)
        loss = group_loss(w_g, round_group(w_g, s, z, bits), s, H_gg)
        if loss < best[2]:
            best = (s, z, loss)
    return best


def scan_with_refit(
    w_g: Tensor, H_gg: Tensor, bits: int, symmetric: bool, clip_factors: list[float]
) -> tuple[float, int, float]:
    """As `scan`, each candidate tried at its own scale and at the closed-form best positive scale for its n, n kept.

    The loss returned for a refitted scale belongs to the n of its candidate, not to n rounded again at that scale.
    """
    best = (math.nan, 0, math.inf)
    for clip in clip_factors:
        s, z = minmax_group(w_g.tolist(), bits, symmetric, clip)
        n = round_group(w_g, s, z, bits)
        for candidate in (s, best_scale(w_g, n, H_gg)):
            if not candidate > 0:
                continue
            loss = group_loss(w_g, n, candidate, H_gg)
            if loss < best[2]:
                best = (candidate, z, loss)
    return best
