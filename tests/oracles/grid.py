"""Uniform integer grids: w_hat = s (c - z), one scale s and one integer zero point z per row and group.

W: weights (N, K); g: columns per group, the last group may be short; G = ceil(K / g);
c: integer codes (N, K) in 0..2^b-1; s: scales (N, G); z: zero points (N, G); n = c - z.
Rounding is half-to-even everywhere.
"""

import torch
from torch import Tensor


def group_of(k: int, g: int) -> int:
    """Group of column k: floor(k / g)."""
    return k // g


def group_columns(K: int, g: int) -> list[list[int]]:
    """Columns of every group, in order."""
    G = (K + g - 1) // g
    return [[k for k in range(K) if group_of(k, g) == i] for i in range(G)]


def code_of(w: float, s: float, z: int, bits: int) -> int:
    """Code of one weight: c = clip(round(w / s) + z, 0, 2^b - 1)."""
    levels: int = 2**bits - 1
    return min(max(round(w / s) + z, 0), levels)


def quantize(W: Tensor, scales: Tensor, zeros: Tensor, bits: int, g: int) -> Tensor:
    """Nearest codes (N, K), int64, of W on fixed grids: c = clip(round(w / s) + z, 0, 2^b - 1)."""
    N, K = W.shape
    codes = torch.zeros(N, K, dtype=torch.int64)
    for r in range(N):
        for k in range(K):
            i = group_of(k, g)
            codes[r, k] = code_of(float(W[r, k]), float(scales[r, i]), int(zeros[r, i]), bits)
    return codes


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, g: int) -> Tensor:
    """Weights that run (N, K), float64: w_hat = s (c - z)."""
    N, K = codes.shape
    W_hat = torch.zeros(N, K, dtype=torch.float64)
    for r in range(N):
        for k in range(K):
            i = group_of(k, g)
            W_hat[r, k] = float(scales[r, i]) * (int(codes[r, k]) - int(zeros[r, i]))
    return W_hat


def with_offsets(codes: Tensor, scales: Tensor, offsets: Tensor, g: int) -> Tensor:
    """Weights that run (N, K), float64, of grids with a float offset o for each group: w_hat = s c + o."""
    N, K = codes.shape
    W_hat = torch.zeros(N, K, dtype=torch.float64)
    for r in range(N):
        for k in range(K):
            i = group_of(k, g)
            W_hat[r, k] = float(scales[r, i]) * int(codes[r, k]) + float(offsets[r, i])
    return W_hat


def look_up(codes: Tensor, tables: Tensor, g: int) -> Tensor:
    """Weights that run (N, K), float64, of look-up tables (N, T, 2^b), T = 1 or G: w_hat = t[c]."""
    N, K = codes.shape
    W_hat = torch.zeros(N, K, dtype=torch.float64)
    for r in range(N):
        for k in range(K):
            i = 0 if tables.shape[1] == 1 else group_of(k, g)
            W_hat[r, k] = float(tables[r, i, int(codes[r, k])])
    return W_hat


def asymmetric_grid(lo: float, hi: float, bits: int) -> tuple[float, int]:
    """Grid of lo <= 0 <= hi: s = (hi - lo) / (2^b - 1), z = clip(round(-lo / s), 0, 2^b - 1); (1, 0) if empty."""
    if lo == hi:
        return 1.0, 0
    levels = 2**bits - 1
    s = (hi - lo) / levels
    return s, min(max(round(-lo / s), 0), levels)


def symmetric_scale(lo: float, hi: float, bits: int) -> float:
    """Smallest s with -2^(b-1) s <= lo and hi <= (2^(b-1) - 1) s; 1 if the range is empty.

    One bit holds n in {-1, 0} and so no positive value: s = -lo, or hi where no weight is negative.
    """
    if lo == hi:
        return 1.0
    half: int = 2 ** (bits - 1)
    if bits == 1:
        return -lo if lo < 0 else hi
    return max(hi / (half - 1), -lo / half)


def minmax_group(
    w: list[float], bits: int, symmetric: bool, clip: float = 1.0
) -> tuple[float, int]:
    """Min-max grid (s, z) of one group of weights, its range shrunk by the factor `clip`."""
    lo, hi = min(0.0, *w), max(0.0, *w)
    if not symmetric:
        return asymmetric_grid(clip * lo, clip * hi, bits)
    z = 2 ** (bits - 1)
    return (1.0 if lo == hi else clip * symmetric_scale(lo, hi, bits)), z


def minmax_grid(W: Tensor, bits: int, g: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Min-max scales (N, G), float64, and zero points (N, G), int64."""
    N, K = W.shape
    groups = group_columns(K, g)
    scales = torch.zeros(N, len(groups), dtype=torch.float64)
    zeros = torch.zeros(N, len(groups), dtype=torch.int64)
    for r in range(N):
        for i, columns in enumerate(groups):
            scales[r, i], zeros[r, i] = minmax_group(W[r, columns].tolist(), bits, symmetric)
    return scales, zeros
