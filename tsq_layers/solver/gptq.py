"""GPTQ on static grids: integers column by column, each error carried to the columns left.

arXiv 2210.17323, in the form of math's LDL factorisation: H⁻¹ = UᵀU with U upper triangular; with
Ũ = diag(U)⁻¹ U (unit diagonal), rounding column j by e_j = w_j − q_j changes the columns after it
by −e_j Ũ_{j, j+1:}. Grids are fixed beforehand, so any processing order is free: columns are
permuted for the loop and the codes permuted back.

Updates are applied recursively: a range of columns is halved, the left half solved, its errors
carried to the right half by one matrix product, then the right half. Only the smallest ranges
work column by column.
"""

import torch
from torch import Tensor

from tsq_layers import grid

_LEAF = 16


def assign(
    target: Tensor, factor: Tensor, order: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int
) -> Tensor:
    """Codes that approximate ``target`` under the metric whose inverse has the factor ``factor``.

    Args:
        target: W' float32 (N, K).
        factor: U float32 (K, K), H⁻¹ = UᵀU, in processing order.
        order: processing order of the columns, int64 (K,).
        scales: float32 (N, G).
        zeros: float (N, G).

    Returns:
        codes uint8 (N, K), in the original column order.
    """
    group_of = order // group_size
    scale_KN = scales.to(target.dtype).T[group_of]
    zero_KN = zeros.to(target.dtype).T[group_of]
    work = _Loop(
        weight=target.T[order],
        carry=factor / factor.diagonal().unsqueeze(1),
        scale=scale_KN,
        low=-zero_KN,
        high=grid.code_max(bits) - zero_KN,
    )
    work.solve(0, target.shape[1])
    codes_KN = torch.empty_like(work.steps)
    codes_KN[order] = work.steps + zero_KN
    return codes_KN.T.to(torch.uint8).contiguous()


class _Loop:
    """Working memory of one run; columns of the layer are contiguous rows here, (K, N)."""

    def __init__(self, *, weight: Tensor, carry: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> None:
        self.weight, self.scale, self.low, self.high = weight.clone(), scale, low, high
        self.carry = carry.contiguous()
        self.steps = torch.empty_like(self.weight)
        self.error = torch.empty_like(self.weight)

    def solve(self, start: int, stop: int) -> None:
        """Choose the integers of columns start … stop−1 and leave their errors in ``error``."""
        if stop - start <= _LEAF:
            self._columns(start, stop)
            return
        middle = start + (stop - start) // 2
        self.solve(start, middle)
        self.weight[middle:stop].addmm_(self.carry[start:middle, middle:stop].T, self.error[start:middle], alpha=-1)
        self.solve(middle, stop)

    def _columns(self, start: int, stop: int) -> None:
        for column in range(start, stop):
            weight, steps, error = self.weight[column], self.steps[column], self.error[column]
            torch.div(weight, self.scale[column], out=steps)
            torch.clamp(steps.round_(), self.low[column], self.high[column], out=steps)
            torch.addcmul(weight, steps, self.scale[column], value=-1, out=error)
            if column + 1 < stop:
                self.weight[column + 1 : stop].addr_(self.carry[column, column + 1 : stop], error, alpha=-1)
