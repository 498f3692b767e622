"""Choose what the configuration leaves open, for each layer, on tokens that are not fitted.

With H_b, R_b of other tokens, the output error of weights Q is, but for a constant (objective.py),

    (Q − W) H_b (Q − W)ᵀ + 2 W R_b (Q − W)ᵀ.

The strength α of the deviation and its damping are chosen for the weights before they are rounded,
Q = W − α W R H⁻¹: for one damping of H the error is a parabola in α, and the best of a few strengths costs two
products. The damping of GPTQ is chosen by GPTQ itself, run once with each.
"""

import torch
from torch import Tensor

from tsq_layers.config import QuantConfig
from tsq_layers.numerics import grid
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.sync import to_host
from tsq_layers.passes.modes import full_precision
from tsq_layers.solver import gptq, stage1
from tsq_layers.solver import problem as objective
from tsq_layers.solver.blocks import product

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DAMPINGS = (0.01, 0.05, 0.25)
DEVIATION_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
_USUAL = {
    "deviation_strength": 0.5,
    "damping": 0.01,
    "deviation_damping": 0.1,
}  # where there are no other tokens


@full_precision()
def settle(
    config: QuantConfig,
    weight: Tensor,
    fitted: LayerStatistics,
    other: LayerStatistics | None,
    name: str = "layer",
) -> QuantConfig:
    """Return the configuration with a number in the place of every ``"auto"``.

    Args:
        config: of the layer.
        weight: W, float (N, K).
        fitted: statistics of most tokens.
        other: those of the other tokens; ``None``, or of no tokens: nothing is chosen, and usual numbers are taken.
        name: how messages call the layer.

    Example:
        >>> x = torch.randn(256, 32)
        >>> most, rest = (LayerStatistics(p.T @ p, torch.tensor(len(p))) for p in (x[:200], x[200:]))
        >>> chosen = settle(QuantConfig(bits=3, damping="auto"), torch.randn(16, 32), most, rest)
        >>> chosen.options.damping in DAMPINGS
        True
    """
    if config.is_settled:
        return config
    if other is None or not to_host(other.count)[0] > 0:
        return _filled(config)
    if "auto" in (config.option("deviation_strength"), config.option("deviation_damping")):
        candidate = _best_deviation(config, weight, fitted, other, name)
        config = candidate.changed(damping=config.option("damping"))
    if config.option("damping") == "auto":
        config = config.changed(damping=_best_damping(config, weight, fitted, other, name))
    return config


def _filled(config: QuantConfig) -> QuantConfig:
    """Return the configuration with a usual number in the place of every ``"auto"``."""
    changes = {name: value for name, value in _USUAL.items() if config.option(name) == "auto"}
    return config.changed(**changes)


def error(difference: Tensor, weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Return the mean squared output error of a weight difference Q − W, but for a constant: a scalar tensor."""
    count = statistics.count
    total = (
        product(difference, (statistics.hessian / count).to(difference.dtype))
        .mul_(difference)
        .sum()
    )
    if statistics.deviation is not None:
        total += (
            2
            * product(weight, (statistics.deviation / count).to(weight.dtype))
            .mul_(difference)
            .sum()
        )
    return total


def _best_deviation(
    config: QuantConfig, weight: Tensor, fitted: LayerStatistics, other: LayerStatistics, name: str
) -> QuantConfig:
    """Return the configuration with the strength and the damping of the deviation that leave the least error."""
    if fitted.deviation is None:
        return _filled(config)
    weight = weight.detach().to(torch.float32)
    strength = config.option("deviation_strength")
    ridge = config.option("deviation_damping")
    strengths = STRENGTHS if strength == "auto" else (strength,)
    dampings = DEVIATION_DAMPINGS if ridge == "auto" else (ridge,)
    start = _filled(config).changed(deviation_strength=1.0)
    candidates = [
        start.changed(deviation_strength=strength, deviation_damping=damping)
        for damping in dampings
        for strength in strengths
    ]
    errors = []
    for damping in dampings:
        # With the same damping for GPTQ, whose factor is not used here, H is factorised once and not twice.
        alike = start.changed(damping=min(float(damping), 1.0), deviation_damping=damping)
        whole = objective.build(weight, fitted, alike, name)
        shift = whole.refine_target - weight
        quadratic = error(shift, torch.zeros_like(weight), other)
        linear = error(shift, weight, other) - quadratic
        errors += [
            strength**2 * quadratic + strength * linear for strength in map(float, strengths)
        ]
    values = to_host(*errors)
    return candidates[min(range(len(values)), key=values.__getitem__)]


def _best_damping(
    config: QuantConfig, weight: Tensor, fitted: LayerStatistics, other: LayerStatistics, name: str
) -> float:
    weight = weight.detach().to(torch.float32)
    group_size = min(config.group_size or weight.shape[1], weight.shape[1])
    errors = []
    for damping in DAMPINGS:
        problem = objective.build(weight, fitted, config.changed(damping=damping), name)
        metric = stage1.feedback_metric(problem.factor, problem.order)
        scales, zeros = stage1.fit_grids(
            problem.grid_target, metric, config.bits, group_size, config.symmetric
        )
        codes = gptq.assign(
            problem.grid_target,
            problem.factor,
            problem.order,
            scales,
            zeros,
            config.bits,
            group_size,
        ).codes
        errors.append(
            error(grid.dequantize(codes, scales, zeros, group_size) - weight, weight, other)
        )
    values = to_host(*errors)
    return DAMPINGS[min(range(len(values)), key=values.__getitem__)]
