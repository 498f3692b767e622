"""What each step does, by method: functions that take a layer and change its state.

Which of them a configuration asks for is in :func:`asked_for`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tsq_layers.config import QuantConfig
from tsq_layers.numerics import grid
from tsq_layers.solver import gptq, joint, offsets, outliers, stage1, stage2
from tsq_layers.solver import lnq as codebook
from tsq_layers.solver.descent import cdquant as greedy
from tsq_layers.solver.descent import clipping, pairs
from tsq_layers.solver.descent import quantease as cyclic
from tsq_layers.solver.state import Layer, State

_DESCENTS = ("quantease", "cdquant")

Step = Callable[[Layer, State], None]


def asked_for(config: QuantConfig) -> dict[str, bool]:
    """Which steps a configuration asks for, in their order.

    Example:
        >>> [step for step, wanted in asked_for(QuantConfig(method="quantease")).items() if wanted]
        ['initialize', 'assign', 'descend']
    """
    two_stage = config.method == "two-stage"
    return {
        "initialize": True,
        "assign": True,
        "descend": config.method in (*_DESCENTS, "lnq"),
        "pairs": config.method == "cdquant" and config.greedy_pairs,
        "refine": two_stage and config.refine != "none",
        "joint": two_stage and config.joint_rounds > 0,
    }


def initialize(layer: Layer, state: State) -> None:
    """Scales and zero points, offsets or tables, and the outliers of the start."""
    config, dtype = layer.config, layer.config.torch_scale_dtype
    if config.method == "lnq":
        problem, per_group = layer.known, config.codebook == "group"
        state.tables = codebook.start(
            problem.grid_target,
            problem.hessian,
            config.bits,
            layer.group_size,
            per_group=per_group,
            dtype=dtype,
        )
        return
    if config.has_offsets:
        scales, added = offsets.fit_grids(
            layer.known.grid_target, _metric(layer), config.bits, layer.group_size
        )
        state.offsets, zeros = offsets.storable(added, dtype), torch.zeros_like(scales)
    elif config.method == "two-stage":
        scales, zeros = stage1.fit_grids(
            layer.known.grid_target, _metric(layer), config.bits, layer.group_size, config.symmetric
        )
    elif config.method == "rtn":
        scales, zeros = grid.minmax(layer.weight, config.bits, layer.group_size, config.symmetric)
    else:
        target = layer.known.grid_target
        if has_outliers(layer):
            state.sparse = outliers.start(target, budget(layer))
        scales, zeros = stage1.weight_grids(
            state.reduced(layer, target), config.bits, layer.group_size, config.symmetric
        )
    state.scales, state.zeros = grid.storable(scales, dtype), zeros


def assign(layer: Layer, state: State) -> None:
    """Codes on the present grids, by GPTQ, or the nearest."""
    config = layer.config
    if config.method == "rtn":
        state.codes = state.nearest(layer, layer.weight)
    elif config.method == "lnq" or (
        config.method in _DESCENTS and config.descent_start == "nearest"
    ):
        state.codes = state.nearest(layer, layer.known.grid_target)
    else:
        problem, (scales, zeros) = layer.known, state.grids(layer)
        target = state.reduced(layer, problem.grid_target)
        state.codes, loss, whitened = gptq.assign(
            target,
            problem.factor,
            problem.order,
            scales,
            zeros,
            config.bits,
            layer.group_size,
            layer.free,
        )
        if problem.refine_target is problem.grid_target:  # that of the loss, and of stage 2
            state.loss = loss
            state.whitened = whitened if asked_for(config)["refine"] else None


def descend(layer: Layer, state: State) -> None:
    """Coordinate descent on the codes, and on tables, outliers or clipping factors where the method has them."""
    config, dtype = layer.config, layer.config.torch_scale_dtype
    if config.method == "lnq":
        _alternate(layer, state)
    elif has_outliers(layer):
        _move_outliers(layer, state)
    elif config.method == "quantease":
        state.codes = cyclic.descend(
            state.integers(layer), config.descent_sweeps, relax=config.descent_relax
        )
    else:
        state.codes, state.scales = clipping.descend(
            state.integers(layer), dtype=dtype, nearest=config.descent_start == "nearest"
        )
        state.codes = greedy.descend(state.integers(layer), _moves(layer))


def _alternate(layer: Layer, state: State) -> None:
    config, problem, codes = layer.config, layer.known, state.chosen(layer)
    if state.tables is not None:
        state.codes, state.tables = codebook.improve(
            codes,
            problem.refine_target,
            problem.hessian,
            state.tables,
            layer.group_size,
            rounds=config.codebook_rounds,
            sweeps=config.codebook_sweeps,
            dtype=config.torch_scale_dtype,
        )


def _move_outliers(layer: Layer, state: State) -> None:
    given = state.integers(layer)._replace(target=layer.known.refine_target)
    if state.sparse is not None:
        state.codes, state.sparse, state.outliers = outliers.solve(
            given,
            sparse=state.sparse,
            budget=budget(layer),
            sweeps=layer.config.descent_sweeps,
            dtype=layer.config.torch_scale_dtype,
        )


def descend_pairs(layer: Layer, state: State) -> None:
    """Coordinate descent on pairs of codes."""
    state.codes = pairs.descend(state.integers(layer), _moves(layer), reach=1)


def refine(layer: Layer, state: State) -> None:
    """All scales, and offsets, on the layer-wise loss, codes frozen; and the objective of both solvers."""
    config, positive = layer.config, state.grids(layer)[0].shape[1]
    pulled = state.pulled(layer)
    before = state.loss if state.loss is not None else (pulled * state.difference(layer)).sum(1)
    small = _small_problem(layer, state, pulled)
    del pulled
    state.change()
    solutions = {"descent": stage2.descent(small, config.refine_sweeps, positive)}
    solutions["exact"] = stage2.exact(small, fallback=solutions["descent"], positive=positive)
    solution, dtype = solutions[config.refine], config.torch_scale_dtype
    if state.offsets is None:
        state.scales = chosen = stage2.accept(small, solution, dtype)
    else:
        state.scales, state.offsets = offsets.accept(
            small, solution, state.offsets, config.bits, dtype
        )
        middle = grid.code_max(config.bits) / 2
        chosen = torch.cat([state.scales, state.offsets + middle * state.scales], 1)
    state.loss = before + small.loss(chosen)
    found = {"assign": small.start, **solutions}
    state.objective = {step: before + small.objective(value) for step, value in found.items()}


def _small_problem(layer: Layer, state: State, pulled: Tensor) -> stage2.SmallProblem:
    config, (scales, zeros), metric = layer.config, state.grids(layer), layer.known.hessian
    if state.offsets is None:
        steps = grid.centered(state.chosen(layer), zeros, layer.group_size)
        return stage2.small_problem(
            steps, pulled, metric, scales, layer.group_size, config.refine_ridge
        )
    given = state.chosen(layer), pulled, metric, scales, state.offsets
    return offsets.small_problem(*given, config.bits, layer.group_size, config.refine_ridge)


def refine_jointly(layer: Layer, state: State) -> None:
    """Codes and grids in turn, on what :func:`refine` minimises."""
    config = layer.config
    options: dict[str, Any] = {
        "rounds": config.joint_rounds,
        "sweeps": config.joint_sweeps,
        "ridge": config.refine_ridge,
        "dtype": config.torch_scale_dtype,
    }
    if state.offsets is not None:
        given = state.integers(layer)._replace(target=layer.known.refine_target)
        state.codes, state.scales, state.offsets = joint.refine_with_offsets(
            given, state.offsets, **options
        )
    elif config.symmetric:
        state.codes, state.scales = joint.refine(state.integers(layer), **options)
    else:
        state.codes, state.scales, state.zeros = joint.refine_with_zeros(
            state.integers(layer), **options
        )


def has_outliers(layer: Layer) -> bool:
    """Whether some entries are kept apart."""
    config = layer.config
    return config.method == "quantease" and (config.outliers > 0 or config.outlier_columns > 0)


def budget(layer: Layer) -> outliers.Budget:
    """How many entries or columns are kept apart; one entry at least."""
    config, weights = layer.config, layer.weight.numel()
    if config.outlier_columns:
        return outliers.Budget(columns=config.outlier_columns)
    return outliers.Budget(entries=max(1, round(config.outliers * weights)))


def _moves(layer: Layer) -> int:
    return max(1, round(layer.config.greedy_steps * layer.weight.shape[1]))


def _metric(layer: Layer) -> Tensor:
    problem = layer.known
    if layer.config.grid_metric == "blocks":
        return problem.hessian
    return stage1.feedback_metric(problem.factor, problem.order)
