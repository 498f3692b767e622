"""Change the basis of a layer's problem, and choose the scales of its columns.

What comes back is plain W, H and R, so that the solver need not know; see :mod:`tsq_layers.numerics.basis`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tsq_layers.config import QuantConfig
from tsq_layers.numerics import grid
from tsq_layers.numerics.activations import round_in_basis
from tsq_layers.numerics.basis import Basis, fixed_signs
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.passes.modes import full_precision
from tsq_layers.solver import problem as objective
from tsq_layers.solver import stage1

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The α that are tried: d = E[x²]^(α/2), from no scaling to inputs of equal size."""

_LEAST = 1e-8  # of the mean of E[x²]: columns without inputs get a scale all the same


@dataclass(frozen=True, eq=False)
class BasisChange:
    """A problem in the basis that comes with it; the fields are those of :func:`change_basis`."""

    weight: Tensor
    statistics: LayerStatistics | None
    held_out: LayerStatistics | None
    validation: LayerStatistics | None
    basis: Basis


@full_precision()
def change_basis(
    weight: Tensor,
    statistics: LayerStatistics | None,
    held_out: LayerStatistics | None,
    config: QuantConfig,
    validation: LayerStatistics | None = None,
) -> BasisChange | None:
    """Return a layer's weight and statistics in the basis that the configuration asks for.

    Args:
        weight: any float dtype (N, K); of all layers of a stack, which have one basis.
        statistics: of their input, with blocks or without; needed for ``channel_scaling``.
        held_out: further statistics.
        config: ``rotation`` and ``channel_scaling``; and the grids, for the choice of the scales.
        validation: statistics of other tokens, which will be fitted too; the scales are chosen on the sum.

    Returns:
        the problem, in float32; ``None`` if the configuration asks for no other basis.

    Example:
        >>> x, weight = torch.randn(500, 24), torch.randn(8, 24)
        >>> statistics = LayerStatistics(x.T @ x, torch.tensor(500))
        >>> result = change_basis(weight, statistics, None, QuantConfig(rotation=8))
        >>> result.basis.rotation, torch.allclose(result.basis.restore(result.weight), weight, atol=1e-5)
        (8, True)
    """
    if config.rotation is None and not config.channel_scaling:
        return None
    weight = weight.detach().to(torch.float32)
    signs = None if config.rotation is None else fixed_signs(weight.shape[1], weight.device)
    scaling = None
    if config.channel_scaling:
        assert statistics is not None
        scaling = choose_scaling(
            weight, statistics if validation is None else statistics + validation, config
        )
    basis = Basis(config.rotation, signs, scaling)
    main, report, other = (_in_basis(sums, basis) for sums in (statistics, held_out, validation))
    return BasisChange(basis.change(weight), main, report, other, basis)


@full_precision()
def choose_scaling(weight: Tensor, statistics: LayerStatistics, config: QuantConfig) -> Tensor:
    """Choose the column scales of AWQ (arXiv 2306.00978, equations 4 and 5), with a loss that knows H.

    d = E[x²]^(α/2), made to have the geometric mean 1, for each of :data:`STRENGTHS`. Taken is the one for
    which plain rounding of the changed weight, on grids of the least weight error, has the least layer
    loss; α = 0, no scaling, is among them, and wins where no other is better. Where the statistics have
    blocks, the scales are one for all of them. Nothing is read from the device.

    Args:
        weight: float32 (N, K).
        statistics: H is used.
        config: the grids, and ``rotation``, which follows the scaling.

    Returns:
        d, float32 (K,).
    """
    hessian = (statistics.hessian / statistics.count).to(torch.float32)
    candidates = [_scales(hessian, strength) for strength in STRENGTHS]
    losses = torch.stack(
        [rounding_loss(weight, hessian, scaling, config) for scaling in candidates]
    )
    best = losses.nan_to_num(nan=torch.inf).argmin()
    return torch.stack(candidates).index_select(0, best.reshape(1)).squeeze(0)


def rounding_loss(weight: Tensor, hessian: Tensor, scaling: Tensor, config: QuantConfig) -> Tensor:
    """Return the layer loss, a scalar, of plain rounding of a weight in a changed basis.

    Its columns are scaled, and rotated if so configured.

    Args:
        weight: float32 (N, K).
        hessian: E[x xᵀ], float32 (K, K) or (B, K, K).
        scaling: d, float32 (K,).
        config: the grids and the rotation.
    """
    columns = weight.shape[1]
    signs = None if config.rotation is None else fixed_signs(columns, weight.device)
    basis, size = Basis(config.rotation, signs, scaling), min(config.group_size or columns, columns)
    in_basis = basis.change(weight)
    scales, zeros = stage1.weight_grids(in_basis, config.bits, size, config.symmetric)
    scales = grid.storable(scales, config.torch_scale_dtype)
    codes = grid.quantize(in_basis, scales, zeros, config.bits, size)
    difference = basis.restore(grid.dequantize(codes, scales, zeros, size) - in_basis)
    return objective.squared_error(difference, hessian).sum()


def round_rotated(x: Tensor, rotation: int | None) -> Tensor:
    """Round inputs to 8 bits in the rotated basis, and return to their own: (…, K) in at least float32."""
    if rotation is None:
        return round_in_basis(x, None)
    with full_precision():
        return round_in_basis(x, Basis(rotation, fixed_signs(x.shape[-1], x.device)))


def _scales(hessian: Tensor, strength: float) -> Tensor:
    squares = hessian.diagonal(dim1=-2, dim2=-1).reshape(-1, hessian.shape[-1]).mean(0)
    mean = squares.mean()
    relative = torch.where(mean > 0, squares / mean, torch.ones_like(squares)).clamp(min=_LEAST)
    logarithms = relative.log() * (strength / 2)
    return (logarithms - logarithms.mean()).exp()


def _in_basis(statistics: LayerStatistics | None, basis: Basis) -> LayerStatistics | None:
    if statistics is None:
        return None
    hessian = basis.change_metric(statistics.hessian)
    deviation = None if statistics.deviation is None else basis.change_metric(statistics.deviation)
    return replace(statistics, hessian=(hessian + hessian.mT) / 2, deviation=deviation)
