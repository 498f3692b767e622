"""Build the problem that every step solves: a target for the weights, and a metric.

Symbols (docstrings of this folder use the paper's letters):

    W   (N, K)  full-precision weight            H   (K, K)  E[x xᵀ], x on the quantised stream
    W'  (N, K)  target, see below                R   (K, K)  E[(x − x̃) xᵀ], x̃ on the full-precision stream
    Q   (N, K)  quantised weight                 λ           damping, relative to mean(diag H)

Where the rows are B blocks with inputs of their own, H and R are (B, K, K), and the rows of block b
are solved with those of block b (see blocks.py).

The output error is  E‖Qx − Wx̃‖² = (Q−W) H (Q−W)ᵀ + 2 W R (Q−W)ᵀ + const.  Completing the square,
W' = W − W R H⁻¹ turns it into (Q−W') H (Q−W')ᵀ + const: the error of earlier layers is a change of
the target and enters here and nowhere else. H is damped, H + λ·mean(diag H)·I, wherever it is
inverted or minimised; losses that are reported use the undamped H.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from tsq_layers.config import QuantConfig
from tsq_layers.errors import CalibrationError, DampingWarning, LayerError, SingularHessianError
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.sync import to_host
from tsq_layers.solver.blocks import (
    PANEL_COLUMNS,
    chunks,
    fold,
    in_original_order,
    product,
    stack,
    take_columns,
    take_rows,
)

_LARGEST_DAMPING = 1.0
# Entries of H that are factorised at once, where it has blocks: bounds the temporaries.
_CHUNK_ELEMENTS = 2**24
_PANEL_ELEMENTS = 2**20  # weights whose loss is summed at once: bounds the temporaries
_VANISHING = 2.0**-100  # a mean of diag H below this: its damping would underflow in float32


@dataclass(frozen=True, eq=False)
class Problem:
    """Target and metric of one layer, or of layers that share their input, ready to be solved.

    With blocks, everything but the weight and the targets has a leading axis B.

    Attributes:
        weight: W, float32 (N, K).
        grid_target: what grids and codes approximate, float32 (N, K): W' if the deviation enters
            every step, else W.
        refine_target: what stage 2 approximates, float32 (N, K): W', or W without deviation.
        hessian: damped H, float32 (K, K), a mean over tokens.
        factor: V upper triangular with H = V Vᵀ, rows and columns in processing order (K, K).
        order: the processing order of the columns, int64 (K,).
        damping: the λ that was used, the largest of all blocks.
        ridge: λ·mean(diag H), a scalar tensor or (B,).
    """

    weight: Tensor
    grid_target: Tensor
    refine_target: Tensor
    hessian: Tensor
    factor: Tensor
    order: Tensor
    damping: float
    ridge: Tensor


def build(
    weight: Tensor, statistics: LayerStatistics, config: QuantConfig, name: str = "layer"
) -> Problem:
    """Check weight and statistics, damp and factorise H, and shift the target.

    Args:
        weight: W, any float dtype (N, K).
        statistics: sums over the calibration tokens.
        config: damping, act_order and deviation are used.
        name: how messages call the layer.

    Raises:
        LayerError: shapes that do not fit, or NaN or inf in the weight.
        CalibrationError: no tokens, or NaN or inf in the statistics.
        SingularHessianError: no damping up to 1 makes H positive definite.
    """
    weight = weight.detach().to(torch.float32)
    check_shapes(weight, statistics, name)
    check_values(weight, statistics, name)
    count = statistics.count.to(statistics.hessian.dtype)
    hessian = (statistics.hessian / count).to(torch.float32)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = (
        torch.argsort(diagonal, descending=True)
        if config.option("act_order", True)
        else torch.arange(diagonal.shape[-1], device=diagonal.device).expand_as(diagonal)
    )
    damping_, strength, ridged = config.settled()
    deviation = statistics.deviation if config.uses_deviation else None
    target = weight
    if (
        deviation is not None and ridged != damping_
    ):  # first, so that this factor is gone when the other one is made
        target = shift_target(
            weight, deviation / count, factorise(hessian, order, ridged, name)[1], order, strength
        )
    damped, factor, damping, ridge = factorise(hessian, order, damping_, name, in_place=True)
    if deviation is not None and ridged == damping_:
        target = shift_target(weight, deviation / count, factor, order, strength)
    return Problem(
        weight=weight,
        grid_target=target if config.option("deviation") == "target" else weight,
        refine_target=target,
        hessian=damped,
        factor=factor,
        order=order,
        damping=damping,
        ridge=ridge,
    )


def factorise(
    hessian: Tensor, order: Tensor, damping: float, name: str = "layer", *, in_place: bool = False
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Damp H and factorise it in processing order.

    H (reordered) = V Vᵀ, V upper triangular: the Cholesky factor of the matrix with its rows and columns
    in the opposite order, turned round. No inverse is formed. Every block is damped by the mean of its
    own diagonal, and more only where it needs it.

    Args:
        hessian: float (K, K) or (B, K, K).
        order: int64 (K,) or (B, K).
        damping: λ.
        name: how messages call the layer.
        in_place: H is not needed any more: what is returned as damped H may be the same tensor.

    Returns:
        damped H in the original order and V, rows and columns in processing order, both shaped like
        H; the largest λ that was used; λ·mean(diag H), a scalar tensor or (B,).

    Raises:
        SingularHessianError: not even λ = 1 was enough. Every λ above the given one warns.
    """
    damped = hessian if in_place else hessian.clone()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).clone()
    mean = diagonal.mean(-1)
    mean = torch.where(
        mean > _VANISHING, mean, torch.ones_like(mean)
    )  # (nearly) only zeros came in: the identity
    ridge = damping * mean
    damped.diagonal(dim1=-2, dim2=-1).copy_(diagonal + ridge.unsqueeze(-1))
    factor, info = _factors(damped, order)
    factor_damping, raised = damping, 0
    while failed := int(to_host(info.count_nonzero())[0]):
        raised = raised or failed
        if factor_damping >= _LARGEST_DAMPING:
            raise SingularHessianError(
                f"{name}: the Hessian{_which(info, failed)} is not positive definite even with "
                f"damping {factor_damping:g}; calibrate with more, or more varied, data, or look for "
                "overflow in the activations"
            )
        factor_damping = min(factor_damping * 10, _LARGEST_DAMPING)
        again = info.argsort(descending=True)[:failed] if info.dim() else ...
        ridge[again] = factor_damping * mean[again]
        damped.diagonal(dim1=-2, dim2=-1).copy_(diagonal + ridge.unsqueeze(-1))
        factor[again], info[again] = _factors(damped[again], order[again])
    if raised:
        warnings.warn(
            f"{name}: damping was raised from {damping:g} to {factor_damping:g} to factorise the "
            f"Hessian{_which(info, raised)}; more calibration tokens make this unnecessary",
            DampingWarning,
            stacklevel=2,
        )
    return damped, factor, factor_damping, ridge


def _which(info: Tensor, failed: int) -> str:
    return f" of {failed} of its {len(info)} blocks" if info.dim() else ""


def _factors(damped: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return V of every block, and 0 for each that could be factorised.

    Where a block could not be factorised, its V means nothing.
    """
    if damped.dim() == 2:
        return _factor(damped, order)
    count = max(1, _CHUNK_ELEMENTS // damped[0].numel())
    parts = [_factor(*part) for part in zip(damped.split(count), order.split(count), strict=True)]
    return torch.cat([factor for factor, _ in parts]), torch.cat([info for _, info in parts])


def _factor(damped: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    backwards = order.flip(-1)
    lower, info = torch.linalg.cholesky_ex(take_columns(take_rows(damped, backwards), backwards))
    return lower.flip(-2, -1), info


def shift_target(
    weight: Tensor, deviation: Tensor, factor: Tensor, order: Tensor, strength: float
) -> Tensor:
    """Return W' = W − strength · W R H⁻¹, (N, K); ``factor`` and ``order`` as in :class:`Problem`.

    At strength 1 this is the least-squares refit of the full-precision outputs from the
    quantised stream's inputs; a smaller strength is the propagation strength of QEP (arXiv
    2504.09629) and regularises an R that is estimated from few tokens.

    H⁻¹ is two triangular solves, of W R or of R, whichever has fewer rows.
    """
    deviation = deviation.to(weight.dtype)
    blocks = stack(deviation).shape[0]
    if weight.shape[0] > blocks * weight.shape[1]:
        quotient = _divided(deviation.reshape(-1, weight.shape[1]), factor, order)
        return weight - strength * product(weight, quotient.view_as(deviation))
    return weight - strength * _divided(product(weight, deviation), factor, order)


def _divided(rows: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """Return rows (N, K) times H⁻¹ of their block."""
    factors, orders = stack(factor), order.reshape(-1, order.shape[-1])
    quotient = take_columns(fold(rows, len(factors)), orders)
    quotient = torch.linalg.solve_triangular(factors.mT, quotient, upper=False, left=False)
    quotient = torch.linalg.solve_triangular(factors, quotient, upper=True, left=False)
    return in_original_order(quotient.flatten(0, 1), order)


def squared_error(difference: Tensor, hessian: Tensor, ridge: Tensor | None = None) -> Tensor:
    """Return diag(D H Dᵀ), the mean squared output error of each row: D (N, K) → (N,).

    H is symmetric, so only what is left of and on its diagonal blocks is looked at: half the work of D H.

    Args:
        difference: D, float (N, K).
        hessian: (K, K) or (B, K, K).
        ridge: a scalar tensor or (B,), by which H is to be damped less; where nothing is left of it, the error is
            exactly 0.
    """
    metrics = stack(hessian)
    pieces = chunks(difference, metrics, _PANEL_ELEMENTS)
    if ridge is None:
        return torch.cat([_squared_error(*piece) for piece in pieces])
    less = ridge.reshape(-1, 1).expand(len(metrics), len(difference) // len(metrics)).reshape(-1, 1)
    losses, first = [], 0
    for rows, own in pieces:
        losses.append(_squared_error(rows, own, less[first : first + len(rows)]))
        first += len(rows)
    return torch.cat(losses)


def _squared_error(rows: Tensor, metrics: Tensor, less: Tensor | None = None) -> Tensor:
    """:func:`squared_error` of some blocks, or of some rows of one: (b·c, K), (b, K, K) and (b·c, 1)."""
    losses = rows.new_zeros(len(rows))
    for start in range(0, rows.shape[1], PANEL_COLUMNS):
        stop = min(start + PANEL_COLUMNS, rows.shape[1])
        panel = rows[:, start:stop]
        if start:
            losses.add_(
                product(panel, metrics[:, start:stop, :start]).mul_(rows[:, :start]).sum(1), alpha=2
            )
        own = product(panel, metrics[:, start:stop, start:stop])
        if less is not None:
            own -= panel * less
        losses += own.mul_(panel).sum(1)
    return losses


def check_shapes(weight: Tensor, statistics: LayerStatistics, name: str) -> None:
    """Refuse a weight that is no matrix, or one whose columns or blocks of rows are not those of its statistics."""
    if weight.dim() != 2 or weight.shape[1] != statistics.columns:
        raise LayerError(
            f"{name}: weight has shape {tuple(weight.shape)}, its statistics are for "
            f"{statistics.columns} columns; give (N, {statistics.columns})"
        )
    if weight.shape[0] % statistics.blocks:
        raise LayerError(
            f"{name}: weight has {weight.shape[0]} rows, its statistics {statistics.blocks} "
            f"blocks; give blocks of equally many rows, N a multiple of {statistics.blocks}"
        )


def check_values(weight: Tensor, statistics: LayerStatistics | None, name: str) -> None:
    """Refuse NaN and inf in the weight, and in the statistics if there are any, and statistics of no tokens."""
    zero = torch.zeros((), device=weight.device)
    inputs, total, count = [], zero, zero + 1
    if statistics is not None:
        inputs = [
            values for values in (statistics.hessian, statistics.deviation) if values is not None
        ]
        total = torch.stack([values.sum() for values in inputs]).sum()
        count = statistics.count.to(weight.device).reshape(())
    # A sum is finite only if every part is: one pass, where looking at every entry is five, and masks. It may
    # overflow, too, so the entries are looked at where it is not.
    whole, sums, tokens = to_host(weight.sum(), total, count)
    if not math.isfinite(whole) and (bad := _bad(weight)):
        raise LayerError(
            f"{name}: {bad} of its weights are NaN or inf; repair the checkpoint, or add the layer to skip"
        )
    if not tokens > 0:
        raise CalibrationError(
            f"{name}: its statistics hold no tokens; run calibration data through it, or add it to skip"
        )
    if not math.isfinite(sums) and any(map(_bad, inputs)):
        raise CalibrationError(
            f"{name}: NaN or inf in its input statistics; look at the calibration data and for "
            "overflow in half precision, or add the layer to skip"
        )


def _bad(values: Tensor) -> int:
    """Return how many values are NaN or inf."""
    return int(to_host((~torch.isfinite(values)).sum())[0])
