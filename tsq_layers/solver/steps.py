"""Compose methods from steps: functions that take a layer and change its state.

:data:`METHODS` is the table. A step has a name, a function, the options that it reads, and a
condition; the options of each method are in :mod:`tsq_layers.config.methods`. To add a method, add
its options there and its row here.

Symbols: see :mod:`tsq_layers.solver.problem`. Shapes: N rows, K columns, G groups a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsq_layers.config import QuantConfig
from tsq_layers.config.methods import LNQ, CDQuant, QuantEase, TwoStage
from tsq_layers.numerics import grid
from tsq_layers.solver import gptq, joint, lnq, offsets, outliers, stage1, stage2
from tsq_layers.solver.descent import cdquant, clipping, pairs, quantease
from tsq_layers.solver.state import Layer, State

# The second argument of a step is the state that it changes, the third the options of its method.
StepFunction = Callable[[Layer, State, Any], None]


def _always(options: Any) -> bool:  # noqa: ARG001
    return True


@dataclass(frozen=True)
class Step:
    """One step of a method.

    Attributes:
        name: of the step, in results and reports.
        run: the function. It takes the layer, the state, which it changes, and the options.
        reads: names of the options that it reads.
        condition: whether the options ask for the step.
    """

    name: str
    run: StepFunction
    reads: tuple[str, ...] = ()
    condition: Callable[[Any], bool] = _always


# --- initialize: grids or tables --------------------------------------------------------------


def fit_range_grids(layer: Layer, state: State, options: Any) -> None:  # noqa: ARG001
    """Fit grids that span the range of each group of weights."""
    config = layer.config
    scales, zeros = grid.minmax(layer.weight, config.bits, layer.group_size, config.symmetric)
    _set_grids(layer, state, scales, zeros)


def fit_weight_grids(layer: Layer, state: State, options: Any) -> None:  # noqa: ARG001
    """Fit grids of the least weight error, by clipping."""
    _fit_grids_to(layer, state, layer.known.grid_target)


def fit_grids_beside_outliers(layer: Layer, state: State, options: QuantEase) -> None:
    """Store the largest weights apart, if so asked, and fit grids to the others."""
    target = layer.known.grid_target
    if options.has_outliers:
        state.sparse = outliers.start(target, _budget(layer, options))
    _fit_grids_to(layer, state, state.reduced(layer, target))


def fit_tables(layer: Layer, state: State, options: LNQ) -> None:
    """Fit look-up tables to the weights, weighted by the diagonal of H."""
    problem = layer.known
    state.tables = lnq.start(
        problem.grid_target,
        problem.hessian,
        layer.config.bits,
        layer.group_size,
        per_group=options.codebook == "group",
        dtype=layer.config.torch_scale_dtype,
    )


def fit_stage1(layer: Layer, state: State, options: TwoStage) -> None:
    """Fit grids of the least group-wise loss (stage 1), or of what GPTQ will leave of it."""
    config, problem = layer.config, layer.known
    if options.grid_metric == "blocks":
        metric = problem.hessian
    else:
        metric = stage1.feedback_metric(problem.factor, problem.order)
    if options.zero_points == "float":
        scales, added = offsets.fit_grids(
            problem.grid_target, metric, config.bits, layer.group_size
        )
        state.offsets = offsets.storable(added, config.torch_scale_dtype)
        zeros = torch.zeros_like(scales)
    else:
        scales, zeros = stage1.fit_grids(
            problem.grid_target, metric, config.bits, layer.group_size, config.symmetric
        )
    _set_grids(layer, state, scales, zeros)


def _fit_grids_to(layer: Layer, state: State, target: Tensor) -> None:
    config = layer.config
    scales, zeros = stage1.weight_grids(target, config.bits, layer.group_size, config.symmetric)
    _set_grids(layer, state, scales, zeros)


def _set_grids(layer: Layer, state: State, scales: Tensor, zeros: Tensor) -> None:
    # Later steps must see the scales that will be stored, with their rounding.
    state.scales = grid.storable(scales, layer.config.torch_scale_dtype)
    state.zeros = zeros


# --- assign: codes ----------------------------------------------------------------------------


def round_weight(layer: Layer, state: State, options: Any) -> None:  # noqa: ARG001
    """Round the weight itself to the nearest codes."""
    state.codes = state.nearest(layer, layer.weight)


def round_target(layer: Layer, state: State, options: Any) -> None:  # noqa: ARG001
    """Round the target to the nearest codes or levels."""
    state.codes = state.nearest(layer, layer.known.grid_target)


def assign_by_gptq(layer: Layer, state: State, options: Any) -> None:
    """Choose codes on the present grids by GPTQ."""
    problem = layer.known
    scales, zeros = state.grids(layer)
    target = state.reduced(layer, problem.grid_target)
    state.codes, loss, whitened = gptq.assign(
        target,
        problem.factor,
        problem.order,
        scales,
        zeros,
        layer.config.bits,
        layer.group_size,
        layer.free,
    )
    if problem.refine_target is problem.grid_target:
        # GPTQ's loss is that of stage 2 too. Its error is kept only for stage 2: it is as large as W.
        state.loss = loss
        refines = isinstance(options, TwoStage) and options.refine != "none"
        state.whitened = whitened if refines else None


def assign_start(layer: Layer, state: State, options: QuantEase | CDQuant) -> None:
    """Choose the codes from which a descent starts."""
    if options.descent_start == "nearest":
        round_target(layer, state, options)
    else:
        assign_by_gptq(layer, state, options)


# --- descend: better codes --------------------------------------------------------------------


def descend_cyclically(layer: Layer, state: State, options: QuantEase) -> None:
    """Improve codes column by column (QuantEase), and the outliers in turn with them."""
    if not options.has_outliers:
        state.codes = quantease.descend(
            state.integers(layer), options.descent_sweeps, relax=options.descent_relax
        )
        return
    start = state.integers(layer)._replace(target=layer.known.refine_target)
    assert state.sparse is not None  # there are codes, so there are grids and outliers
    state.codes, state.sparse, state.outliers = outliers.solve(
        start,
        sparse=state.sparse,
        budget=_budget(layer, options),
        sweeps=options.descent_sweeps,
        dtype=layer.config.torch_scale_dtype,
    )


def descend_greedily(layer: Layer, state: State, options: CDQuant) -> None:
    """Improve clipping factors, then codes, by the best move of each row (CDQuant)."""
    state.codes, state.scales = clipping.descend(
        state.integers(layer),
        dtype=layer.config.torch_scale_dtype,
        nearest=options.descent_start == "nearest",
    )
    state.codes = cdquant.descend(state.integers(layer), _moves(layer, options))


def descend_in_pairs(layer: Layer, state: State, options: CDQuant) -> None:
    """Improve codes by the best move of a pair in each row (CDQuant)."""
    state.codes = pairs.descend(state.integers(layer), _moves(layer, options), reach=1)


def improve_tables(layer: Layer, state: State, options: LNQ) -> None:
    """Improve codes and tables in turn (LNQ)."""
    problem = layer.known
    codes = state.chosen(layer)
    assert state.tables is not None  # there are codes, so there are tables
    state.codes, state.tables = lnq.improve(
        codes,
        problem.refine_target,
        problem.hessian,
        state.tables,
        layer.group_size,
        rounds=options.codebook_rounds,
        sweeps=options.codebook_sweeps,
        dtype=layer.config.torch_scale_dtype,
    )


def _moves(layer: Layer, options: CDQuant) -> int:
    """Return how many moves a row may make at most."""
    return max(1, round(options.greedy_steps * layer.weight.shape[1]))


def _budget(layer: Layer, options: QuantEase) -> outliers.Budget:
    """Return how many entries or columns are stored apart; one entry at least."""
    if options.outlier_columns:
        return outliers.Budget(columns=options.outlier_columns)
    return outliers.Budget(entries=max(1, round(options.outliers * layer.weight.numel())))


# --- refine and joint: better grids ------------------------------------------------------------


def refine(layer: Layer, state: State, options: TwoStage) -> None:
    """Solve for all scales, and offsets, on the layer-wise loss, codes frozen (stage 2).

    The objective of both solvers is recorded in the state, whichever of them is asked for.
    """
    config = layer.config
    positive = state.grids(layer)[0].shape[1]
    error_H = state.error_H(layer)
    loss = state.loss
    if loss is None:
        loss = (error_H * state.difference(layer)).sum(1)
    small = _small_problem(layer, state, options, error_H)
    del error_H  # as large as the weight
    state.change()
    descent = stage2.descent(small, options.refine_sweeps, positive)
    solutions = {
        "descent": descent,
        "exact": stage2.exact(small, fallback=descent, positive=positive),
    }
    solution = solutions[options.refine]
    if state.offsets is None:
        state.scales = stage2.accept(small, solution, config.torch_scale_dtype)
        variables = state.scales
    else:
        state.scales, state.offsets = offsets.accept(
            small, solution, state.offsets, config.bits, config.torch_scale_dtype
        )
        middle = grid.code_max(config.bits) / 2
        variables = torch.cat([state.scales, state.offsets + middle * state.scales], 1)
    state.loss = loss + small.loss(variables)
    state.objective = {"assign": loss + small.objective(small.start)}
    for name, values in solutions.items():
        state.objective[name] = loss + small.objective(values)


def _small_problem(
    layer: Layer, state: State, options: TwoStage, error_H: Tensor
) -> stage2.SmallProblem:
    """Return the problem of stage 2 in the scales (and offsets) of each row."""
    scales, zeros = state.grids(layer)
    codes, hessian = state.chosen(layer), layer.known.hessian
    if state.offsets is None:
        levels = grid.centered(codes, zeros, layer.group_size)
        return stage2.small_problem(
            levels, error_H, hessian, scales, layer.group_size, options.refine_ridge
        )
    return offsets.small_problem(
        codes,
        error_H,
        hessian,
        scales,
        state.offsets,
        layer.config.bits,
        layer.group_size,
        options.refine_ridge,
    )


def refine_jointly(layer: Layer, state: State, options: TwoStage) -> None:
    """Improve codes and grids in turn, on the loss that :func:`refine` minimises."""
    arguments: dict[str, Any] = {
        "rounds": options.joint_rounds,
        "sweeps": options.joint_sweeps,
        "ridge": options.refine_ridge,
        "dtype": layer.config.torch_scale_dtype,
    }
    start = state.integers(layer)
    if state.offsets is not None:
        start = start._replace(target=layer.known.refine_target)
        state.codes, state.scales, state.offsets = joint.refine_with_offsets(
            start, state.offsets, **arguments
        )
    elif layer.config.symmetric:
        state.codes, state.scales = joint.refine(start, **arguments)
    else:
        state.codes, state.scales, state.zeros = joint.refine_with_zeros(start, **arguments)


# --- the table ---------------------------------------------------------------------------------

PROBLEM_READS = ("damping", "deviation", "deviation_strength", "deviation_damping")
"""Options from which the problem is built, before the first step (:mod:`tsq_layers.solver.problem`)."""

_START_READS = ("descent_start", "act_order")

METHODS: dict[str, tuple[Step, ...]] = {
    "rtn": (
        Step("initialize", fit_range_grids),
        Step("assign", round_weight),
    ),
    "gptq": (
        Step("initialize", fit_weight_grids),
        Step("assign", assign_by_gptq, ("act_order",)),
    ),
    "quantease": (
        Step("initialize", fit_grids_beside_outliers, ("outliers", "outlier_columns")),
        Step("assign", assign_start, _START_READS),
        Step(
            "descend",
            descend_cyclically,
            ("descent_sweeps", "descent_relax", "outliers", "outlier_columns"),
        ),
    ),
    "cdquant": (
        Step("initialize", fit_weight_grids),
        Step("assign", assign_start, _START_READS),
        Step("descend", descend_greedily, ("descent_start", "greedy_steps")),
        Step(
            "pairs",
            descend_in_pairs,
            ("greedy_pairs", "greedy_steps"),
            condition=lambda options: bool(options.greedy_pairs),
        ),
    ),
    "lnq": (
        Step("initialize", fit_tables, ("codebook",)),
        Step("assign", round_target),
        Step("descend", improve_tables, ("codebook_rounds", "codebook_sweeps")),
    ),
    "two-stage": (
        Step("initialize", fit_stage1, ("grid_metric", "zero_points")),
        Step("assign", assign_by_gptq, ("act_order", "refine")),
        Step(
            "refine",
            refine,
            ("refine", "refine_ridge", "refine_sweeps"),
            condition=lambda options: bool(options.refine != "none"),
        ),
        Step(
            "joint",
            refine_jointly,
            ("joint_rounds", "joint_sweeps", "refine_ridge"),
            condition=lambda options: bool(options.joint_rounds > 0),
        ),
    ),
}
"""Method → its steps, in their order."""


def recipe(config: QuantConfig) -> dict[str, Step]:
    """Return the steps that a configuration asks for, by name and in their order.

    Example:
        >>> list(recipe(QuantConfig(method="quantease")))
        ['initialize', 'assign', 'descend']
        >>> list(recipe(QuantConfig(refine="none")))
        ['initialize', 'assign']
    """
    return {step.name: step for step in METHODS[config.method] if step.condition(config.options)}
