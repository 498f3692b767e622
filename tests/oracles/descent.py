"""Coordinate descent on the integers, row by row in loops: QuantEase, CDQuant (greedy and pairs), and the joint rounds.

W: target weights w' (N, K); H: damped Hessian (K, K); codes: where to start (N, K); scales, zeros: (N, G); c: a code.
Losses are (q - w')^T H (q - w') of a row, always evaluated afresh.
"""

import itertools

import torch
from torch import Tensor

from . import stage2
from .grid import code_of, dequantize, group_of


def row_loss(q: Tensor, w: Tensor, H: Tensor) -> float:
    """(q - w')^T H (q - w')."""
    d = q.double() - w.double()
    return float(d @ H.double() @ d)


def losses(codes: Tensor, W: Tensor, H: Tensor, scales: Tensor, zeros: Tensor, g: int) -> Tensor:
    """Loss of each row (N,), float64."""
    Q = dequantize(codes, scales, zeros, g)
    return torch.tensor([row_loss(q, w, H) for q, w in zip(Q, W, strict=True)], dtype=torch.float64)


def best_value(q: Tensor, w: Tensor, H: Tensor, j: int) -> float:
    """Minimiser of the loss over q_j alone, the others fixed: q_j - ((q - w') H)_j / H_jj."""
    return float(q[j] - (q - w) @ H[:, j] / H[j, j])


def cyclic(
    codes: Tensor,
    W: Tensor,
    H: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    g: int,
    sweeps: int,
    relaxed: tuple[int, ...] = (),
) -> Tensor:
    """QuantEase: q_j <- grid(best value), columns in turn; sweeps in `relaxed` leave q_j at its best value.

    Of each row the best codes after any sweep that was not relaxed, or the start, are returned.
    """
    found = codes.long().clone()
    for r, w in enumerate(W.double()):
        c = found[r].tolist()
        q = dequantize(codes[r : r + 1], scales[r : r + 1], zeros[r : r + 1], g)[0]
        best = (row_loss(q, w, H), list(c))
        for sweep in range(sweeps):
            for j in range(len(w)):
                i = group_of(j, g)
                s, z = float(scales[r, i]), int(zeros[r, i])
                v = best_value(q, w, H, j)
                c[j] = code_of(v, s, z, bits)
                q[j] = v if sweep in relaxed else s * (c[j] - z)
            if sweep not in relaxed:
                best = min(best, (row_loss(q, w, H), list(c)))
        found[r] = torch.tensor(best[1])
    return found


def greedy(
    codes: Tensor,
    W: Tensor,
    H: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    g: int,
    steps: int,
) -> Tensor:
    """CDQuant: of all levels of all columns the change of one code that lowers the loss most, until none does."""
    found = codes.long().clone()
    for r in range(len(W)):
        for _ in range(steps):
            changes = [{j: c} for j in range(W.shape[1]) for c in range(2**bits)]
            if not take_best(found[r], changes, W[r], H, scales[r], zeros[r], g):
                break
    return found


def pairs(
    codes: Tensor,
    W: Tensor,
    H: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    g: int,
    steps: int,
    reach: int | None = None,
) -> Tensor:
    """CDQuant by pairs: in step t, of all levels of column t mod K and one other, the change that lowers the loss most.

    The first of the two changes, by at most `reach` levels.
    """
    found, K, levels = codes.long().clone(), W.shape[1], range(2**bits)
    for r in range(len(W)):
        for step in range(steps):
            i = step % K
            near = [
                c
                for c in levels
                if c != found[r, i] and (reach is None or abs(c - int(found[r, i])) <= reach)
            ]
            changes = [{i: c} for c in near]
            changes += [
                {i: c, j: d} for c, j, d in itertools.product(near, range(K), levels) if j != i
            ]
            take_best(found[r], changes, W[r], H, scales[r], zeros[r], g)
    return found


def take_best(
    c: Tensor,
    changes: list[dict[int, int]],
    w: Tensor,
    H: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g: int,
) -> bool:
    """Make the change of codes (column -> code) of a row that lowers its loss most, in place; False if none does."""
    q = dequantize(c.unsqueeze(0), scales.unsqueeze(0), zeros.unsqueeze(0), g)[0]
    pulled = (q - w.double()) @ H
    gains = []
    for change in changes:
        moves = {
            j: float(scales[group_of(j, g)]) * (code - int(c[j])) for j, code in change.items()
        }
        gain = -2 * sum(move * float(pulled[j]) for j, move in moves.items())
        gain -= sum(float(H[i, j]) * moves[i] * moves[j] for i in moves for j in moves)
        gains.append(gain)
    best = max(range(len(gains)), key=gains.__getitem__)
    if gains[best] <= 1e-12 * float(H.diagonal().mean()):
        return False
    for j, code in changes[best].items():
        c[j] = code
    return True


def joint(
    codes: Tensor,
    W: Tensor,
    H: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    g: int,
    rounds: int,
    sweeps: int,
    ridge: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Codes by cyclic descent, then all scales at once with a pull to the present ones, rounded to `dtype`; in turn.

    A row takes its new scales if they are positive and lower its loss.
    """
    scales = scales.double().clone()
    for _ in range(rounds):
        codes = cyclic(codes, W, H, scales, zeros, bits, g, sweeps)
        new = stage2.exact(codes, zeros, W, H, g, ridge, scales).to(dtype).double()
        before, after = (losses(codes, W, H, s, zeros, g) for s in (scales, new))
        taken = (new > 0).all(1) & (after < before)
        scales = torch.where(taken.unsqueeze(1), new, scales)
    return codes, scales
