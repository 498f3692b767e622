"""Stage 1: grids that minimise the group-wise reconstruction loss, before any code is chosen.

Two-Stage (arXiv 2602.02126), first stage. For every row and group, over clipped ranges of the
group's weights,

    minimise over s > 0, z:   (s n − w)ᵀ H_ii (s n − w),     n = clip(round(w / s) + z, 0, 2^b − 1) − z

with H_ii the group's diagonal block of H. The loss is s²·nᵀHn − 2s·nᵀHw + wᵀHw. H w is computed
once, each candidate costs one batched product, and for given n the best scale is closed-form,
s = nᵀHw / nᵀHn, with loss wᵀHw − (nᵀHw)²/nᵀHn. Every candidate is refitted this way, so a coarse
scan suffices.

Shapes: N rows, K columns, G groups, g columns a group; rows are processed in chunks of C.
"""

import torch
from torch import Tensor

from tsq_layers import grid

_CHUNK_ELEMENTS = 2**18  # weights a chunk holds: its dozen temporaries stay in a CPU's cache
_LOWEST_CLIP = {1: 0.3, 2: 0.4, 3: 0.6, 4: 0.75}
_CLIP_COUNT = 6


def hessian_grids(target: Tensor, hessian: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points by the group-wise reconstruction loss.

    Args:
        target: W' float32 (N, K).
        hessian: damped H, float32 (K, K).

    Returns:
        scales and zero points, float32 (N, G).
    """
    blocks_Ggg = diagonal_blocks(hessian, group_size)
    scales, zeros = [], []
    for chunk in target.split(_rows_in_a_chunk(target)):
        start_scales, start_zeros = grid.minmax(chunk, bits, group_size, symmetric)
        groups_GCg = grid.to_groups(chunk, group_size).transpose(0, 1).contiguous()
        scale_GC, zero_GC = _scan(groups_GCg, blocks_Ggg, start_scales.T, start_zeros.T, bits, symmetric)
        scales.append(scale_GC.T)
        zeros.append(zero_GC.T)
    return torch.cat(scales), torch.cat(zeros)


def _scan(weight: Tensor, blocks: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Best of all candidates: weight (G, C, g), blocks (G, g, g), scale and zero (G, C) of the full range."""
    pulled = torch.bmm(weight, blocks)
    best_scale, best_zero = scale, zero
    best_gain = torch.full_like(scale, -torch.inf)
    for candidate_scale, candidate_zero in _candidates(scale, zero, weight, bits, symmetric):
        steps = grid.steps(weight, candidate_scale.unsqueeze(-1), candidate_zero.unsqueeze(-1), bits)
        along = (steps * pulled).sum(-1)
        across = (torch.bmm(steps, blocks) * steps).sum(-1)
        gain = along * along / across
        better = (along > 0) & (across > 0) & (gain > best_gain)
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, along / across, best_scale)
        best_zero = torch.where(better, candidate_zero, best_zero)
    return best_scale, best_zero


def _candidates(scale: Tensor, zero: Tensor, weight: Tensor, bits: int, symmetric: bool):  # type: ignore[no-untyped-def]
    for factor in clip_factors(bits, _CLIP_COUNT):
        yield scale * factor, zero


def clip_factors(bits: int, count: int) -> list[float]:
    """Fractions of a group's range that are tried, from its whole down to a width's useful least."""
    lowest = _LOWEST_CLIP.get(bits, 0.85)
    return [1 - (1 - lowest) * i / (count - 1) for i in range(count)]


def weight_grids(weight: Tensor, bits: int, group_size: int, symmetric: bool, count: int = 40) -> tuple[Tensor, Tensor]:
    """Scales and zero points by the error of the weights alone: a fine scan of clipping factors.

    What GPTQ is given here (weight-MSE clipping, static grids): it looks neither at the inputs
    nor at other groups.

    Args:
        weight: W float32 (N, K).

    Returns:
        scales and zero points, float32 (N, G).
    """
    scales, zeros = [], []
    for chunk in weight.split(_rows_in_a_chunk(weight)):
        scale, zero = grid.minmax(chunk, bits, group_size, symmetric)
        groups_CGg = grid.to_groups(chunk, group_size)
        best_scale, best_loss = scale, torch.full_like(scale, torch.inf)
        for factor in clip_factors(bits, count):
            candidate = scale * factor
            spread = candidate.unsqueeze(-1)
            error = grid.steps(groups_CGg, spread, zero.unsqueeze(-1), bits).mul_(spread).sub_(groups_CGg)
            loss = error.square_().sum(-1)
            best_scale = torch.where(loss < best_loss, candidate, best_scale)
            best_loss = torch.minimum(loss, best_loss)
        scales.append(best_scale)
        zeros.append(zero)
    return torch.cat(scales), torch.cat(zeros)


def diagonal_blocks(hessian: Tensor, group_size: int) -> Tensor:
    """The groups' diagonal blocks of H, (G, g, g); a short last group is filled up with zeros."""
    columns = hessian.shape[0]
    count = grid.group_count(columns, group_size)
    rows_GgK = grid.to_groups(hessian.T, group_size).permute(1, 2, 0)  # H is symmetric: its columns, grouped
    blocks_GgGg = grid.to_groups(rows_GgK, group_size)
    index = torch.arange(count, device=hessian.device)
    return blocks_GgGg[index, :, index].contiguous()


def _rows_in_a_chunk(weight: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // weight.shape[1])
