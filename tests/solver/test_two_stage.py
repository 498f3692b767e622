"""`TwoStageGroupQuantizer`: its steps together, the order of calls, odd layers, and what must hold for every layer."""

from typing import Any

import pytest
import torch
from applicable import applicable
from oracles import grid as oracle_grid
from oracles import objective as oracle_objective
from oracles import stage2 as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.config import QuantConfig
from tsq_layers.errors import (
    CalibrationError,
    DampingWarning,
    LayerError,
    SingularHessianError,
    StateError,
)
from tsq_layers.numerics import grid
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.observer import HessianObserver
from tsq_layers.solver import SolverResult, TwoStageGroupQuantizer, gptq, joint, stage1
from tsq_layers.solver import problem as objective
from tsq_layers.solver import state as state_of_layers
from tsq_layers.solver.coded import Coded
from tsq_layers.solver.descent import cdquant as greedy
from tsq_layers.solver.descent import clipping, pairs
from tsq_layers.solver.descent import quantease as cyclic

N, K, GROUP, TOKENS = 6, 22, 8, 200
METHODS = ["rtn", "gptq", "quantease", "cdquant", "two-stage"]
DESCENTS = ["quantease", "cdquant"]
REFINES = ["exact", "descent", "none"]
DTYPES = ["float16", "bfloat16", "float32"]
KINDS = [pytest.param(True, id="symmetric"), pytest.param(False, id="asymmetric")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streams(seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Inputs (T, K) of the quantised and of the full-precision stream, float64."""
    X_ref = normal(tokens, K, seed=seed) @ (
        torch.eye(K, dtype=torch.float64) + 0.2 * normal(K, K, seed=100)
    )
    return X_ref + 0.2 * normal(tokens, K, seed=seed + 1) + 0.1 * X_ref.roll(1, dims=1), X_ref


def statistics(seed: int = 0, paired: bool = True) -> LayerStatistics:
    X, X_ref = streams(seed)
    observer = HessianObserver(K, dtype=torch.float64)
    observer.observe(X, X_ref if paired else None)
    return observer.statistics()


def weight(rows: int = N, seed: int = 50) -> Tensor:
    return normal(rows, K, seed=seed).float()


def config(**changes: Any) -> QuantConfig:
    return QuantConfig(**applicable(**{"bits": 3, "group_size": GROUP, **changes}))


def solve(W: Tensor, S: LayerStatistics | None, **changes: Any) -> SolverResult:
    return TwoStageGroupQuantizer(W, S, config(**changes)).run()


def assert_equal(a: SolverResult, b: SolverResult) -> None:
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(a.weight, name), getattr(b.weight, name)), name


def true_loss(Q: Tensor, target: Tensor, H: Tensor) -> Tensor:
    """(q − w')ᵀ H (q − w') of each row, in float64."""
    return objective.squared_error(Q.double() - target.double(), H.double())


# ---- the paper's form of the deviation -------------------------------------------------------------------------------


def refined(
    W: Tensor, S: LayerStatistics
) -> tuple[TwoStageGroupQuantizer, QuantizedWeight, Tensor]:
    """A solver after GPTQ, and the scales that stage 2 makes of it; R at full strength, no pull."""
    settings = {
        "deviation": "refine",
        "deviation_strength": 1.0,
        "refine": "descent",
        "refine_sweeps": 3,
    }
    solver = TwoStageGroupQuantizer(
        W, S, config(**settings, refine_ridge=0.0, scale_dtype="float32")
    )
    solver.initialize_scales()
    solver.assign_codes()
    before = solver.quantized_weight()
    solver.refine_scales()
    return solver, before, solver.quantized_weight().scales.double()


def expected_scales(
    solver: TwoStageGroupQuantizer, before: QuantizedWeight, W: Tensor, H: Tensor, R: Tensor
) -> Tensor:
    damped = oracle_objective.damped(H, 0.01)
    return oracle.descent_with_deviation(
        before.codes, before.zeros, before.scales, W.double(), damped, R, GROUP, 3
    )


def float32_tolerance(H: Tensor) -> float:
    """Relative error of stage 2 in float32: products of K terms (K roundings each), amplified by the condition of H."""
    eigenvalues = torch.linalg.eigvalsh(oracle_objective.damped(H, 0.01))
    return float(K * 2**-24 * eigenvalues[-1] / eigenvalues[0])


def test_refine_only_deviation_equals_the_papers_descent() -> None:
    W, S = weight(), statistics()
    H, R = oracle_objective.statistics(*streams())
    solver, before, found = refined(W, S)
    expected = expected_scales(solver, before, W, H, R)
    tolerance = float32_tolerance(H)
    assert tolerance < 1e-3
    assert_close(found, expected, rtol=tolerance, atol=0)
    assert ((found - before.scales).abs() > 10 * tolerance * found).any()


@pytest.mark.parametrize(
    "corrupt", [lambda R: -R, lambda R: R.T, lambda R: 0 * R], ids=["negated", "transposed", "none"]
)
def test_refine_only_deviation_differs_from_the_papers_descent_when_it_is_corrupted(
    corrupt,
) -> None:
    W, S = weight(), statistics()
    H, R = oracle_objective.statistics(*streams())
    solver, before, found = refined(W, S)
    with pytest.raises(AssertionError):
        assert_close(
            found,
            expected_scales(solver, before, W, H, corrupt(R)),
            rtol=float32_tolerance(H),
            atol=0,
        )


def test_refine_only_deviation_leaves_grids_and_codes_to_the_weight() -> None:
    W, S = weight(), statistics()
    with_deviation, without = (
        solve(W, S, deviation=kind, deviation_strength=1.0) for kind in ("refine", "none")
    )
    assert torch.equal(with_deviation.weight.codes, without.weight.codes)
    assert not torch.equal(with_deviation.weight.scales, without.weight.scales)
    in_every_step = solve(W, S, deviation="target", deviation_strength=1.0)
    assert not torch.equal(in_every_step.weight.codes, without.weight.codes)


@pytest.mark.parametrize(
    "changes", [{"deviation": "none"}, {"deviation_strength": 0.0}], ids=["none", "strength-0"]
)
def test_deviation_that_is_not_used_equals_none(changes: dict[str, Any]) -> None:
    W, S = weight(), statistics()
    unpaired = LayerStatistics(S.hessian, S.count)
    assert_equal(solve(W, S, **changes), solve(W, unpaired))


def test_deviation_in_the_target_lowers_the_error_of_the_outputs() -> None:
    W, (X, X_ref) = weight(), streams()
    losses = {}
    for strength in (0.0, 1.0):
        Q = solve(W, statistics(), deviation_strength=strength).weight.dequantize(torch.float64)
        losses[strength] = float((X @ Q.T - X_ref @ W.double().T).square().sum())
    assert losses[1.0] < losses[0.0]


# ---- the steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_gives_a_weight_that_is_what_it_says(
    bits: int, symmetric: bool, method: str
) -> None:
    result = solve(weight(), statistics(), bits=bits, symmetric=symmetric, method=method)
    found = result.weight
    assert (found.bits, found.group_size, found.symmetric) == (bits, GROUP, symmetric)
    assert found.scales.dtype == torch.float16
    assert (torch.isfinite(found.scales) & (found.scales > 0)).all()
    assert int(found.codes.max()) <= grid.code_max(bits)
    assert int(found.zeros.max()) <= grid.code_max(bits)
    if symmetric:
        assert (found.zeros == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("refine", ["exact", "descent"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_refining_never_raises_the_loss_of_a_row(bits: int, scale_dtype: str, refine: str) -> None:
    W = weight(40)
    W[0], W[1, :GROUP] = 0, 0
    solver = TwoStageGroupQuantizer(
        W, statistics(), config(bits=bits, refine=refine, scale_dtype=scale_dtype)
    )
    solver.initialize_scales()
    solver.assign_codes()
    problem = solver.problem
    before = true_loss(
        solver.quantized_weight().dequantize(), problem.refine_target, problem.hessian
    )
    solver.refine_scales()
    after = true_loss(
        solver.quantized_weight().dequantize(), problem.refine_target, problem.hessian
    )
    # Rows are accepted by a loss in float32 that misses the constant w'ᵀHw': K roundings of numbers of that size.
    signal = true_loss(torch.zeros_like(W), problem.refine_target, problem.hessian)
    assert (after <= before + K * 2**-24 * signal).all()
    assert after.sum() < before.sum()


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("sweeps", [1, 8])
def test_exact_is_at_most_descent_in_the_objective(sweeps: int, ridge: float) -> None:
    result = solve(weight(40), statistics(), refine_sweeps=sweeps, refine_ridge=ridge)
    assert set(result.objective) == {"assign", "descent", "exact"}
    slack = K * 2**-24 * result.signal  # as above
    assert (result.objective["exact"] <= result.objective["descent"] + slack).all()
    assert (result.objective["descent"] <= result.objective["assign"] + slack).all()


def test_refine_none_stops_after_gptq() -> None:
    W, S = weight(), statistics()
    solver = TwoStageGroupQuantizer(W, S, config())
    solver.initialize_scales()
    solver.assign_codes()
    result = solve(W, S, refine="none")
    assert torch.equal(result.weight.codes, solver.quantized_weight().codes)
    assert torch.equal(result.weight.scales, solver.quantized_weight().scales)
    assert set(result.losses) == {"initialize", "assign"}
    assert result.objective == {}


def test_gptq_and_two_stage_lose_less_than_the_steps_that_they_leave_out() -> None:
    W, S = weight(40), statistics(paired=False)
    H = S.hessian / S.count
    losses = [
        float(true_loss(solve(W, S, bits=2, **changes).weight.dequantize(), W, H).sum())
        for changes in (
            {"method": "rtn"},
            {"method": "gptq"},
            {},
            {"joint_rounds": 1},
            {"joint_rounds": 4},
        )
    ]
    assert losses == sorted(losses, reverse=True)


GRIDS = {
    "rtn": lambda W, problem: grid.minmax(W, 3, GROUP, False),
    "gptq": lambda W, problem: stage1.weight_grids(W, 3, GROUP, False),
    "two-stage blocks": lambda W, problem: stage1.fit_grids(
        problem.grid_target, problem.hessian, 3, GROUP, False
    ),
    "two-stage feedback": lambda W, problem: stage1.fit_grids(
        problem.grid_target, stage1.feedback_metric(problem.factor, problem.order), 3, GROUP, False
    ),
}


@pytest.mark.parametrize("method", GRIDS)
def test_grids_and_codes_are_those_of_the_method(method: str) -> None:
    name, *metric = method.split()
    changes = {"grid_metric": metric[0]} if metric else {}
    W = weight()
    solver = TwoStageGroupQuantizer(
        W, statistics(), config(method=name, refine="none", scale_dtype="float32", **changes)
    )
    found, problem = solver.run().weight, solver.problem
    grids = {kind: make(W, problem) for kind, make in GRIDS.items()}
    scales, zeros = grids[method]
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.zeros.to(zeros.dtype), zeros)
    assert all(
        not torch.equal(found.scales, other) for kind, (other, _) in grids.items() if kind != method
    )
    plain = grid.quantize(problem.grid_target, scales, zeros, 3, GROUP)
    by_gptq = gptq.assign(
        problem.grid_target, problem.factor, problem.order, scales, zeros, 3, GROUP
    ).codes
    assert not torch.equal(plain, by_gptq)
    assert torch.equal(found.codes, plain if name == "rtn" else by_gptq)


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("with_statistics", [True, False], ids=["with-statistics", "without"])
def test_rtn_is_minmax_and_nearest_codes(with_statistics: bool, symmetric: bool) -> None:
    W = weight()
    S = statistics() if with_statistics else None
    result = solve(W, S, method="rtn", symmetric=symmetric, scale_dtype="float32")
    scales, zeros = oracle_grid.minmax_grid(W.double(), 3, GROUP, symmetric)
    # Range, its end and their quotient are float32 values: three roundings of 2^-24.
    assert_close(result.weight.scales.double(), scales, rtol=3 * 2**-24, atol=0)
    assert torch.equal(result.weight.zeros.long(), zeros)
    codes = oracle_grid.quantize(W.double(), result.weight.scales.double(), zeros, 3, GROUP)
    assert torch.equal(result.weight.codes.long(), codes)
    assert set(result.losses) == ({"initialize", "assign"} if with_statistics else set())
    assert (result.signal is not None) == (result.damping is not None) == with_statistics


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_scales_are_what_codes_were_chosen_for(method: str, scale_dtype: str) -> None:
    # What is stored, float scales rounded to their dtype, is what the solver's loss speaks of.
    solver = TwoStageGroupQuantizer(
        weight(), statistics(), config(method=method, scale_dtype=scale_dtype)
    )
    result = solver.run()
    H = statistics().hessian / TOKENS
    expected = true_loss(result.weight.dequantize(), solver.problem.refine_target, H)
    last = list(result.losses)[-1]
    slack = K * 2**-24 * float(result.signal.max()) + 2**-20 * expected.max()
    assert_close(result.losses[last].double(), expected, rtol=0, atol=float(slack))


# ---- descents on the codes -------------------------------------------------------------------------------------------


def given(solver: TwoStageGroupQuantizer, start: str) -> Coded:
    """What a descent starts from, on the grids of GPTQ."""
    problem = solver.problem
    scales, zeros = stage1.weight_grids(problem.grid_target, 3, GROUP, False)
    scales = grid.storable(scales, torch.float16)
    codes = STARTS[start](problem, scales, zeros)
    return Coded(codes, problem.refine_target, problem.hessian, scales, zeros, 3, GROUP)


def clipped(a: Coded, start: str) -> Coded:
    """The same after the descent over clipping factors."""
    codes, scales = clipping.descend(a, dtype=torch.float16, nearest=start == "nearest")
    return a._replace(codes=codes, scales=scales)


def solved(**changes: Any) -> tuple[TwoStageGroupQuantizer, SolverResult]:
    solver = TwoStageGroupQuantizer(weight(), statistics(), config(**changes))
    return solver, solver.run()


STARTS = {
    "gptq": lambda p, s, z: gptq.assign(p.grid_target, p.factor, p.order, s, z, 3, GROUP).codes,
    "nearest": lambda p, s, z: grid.quantize(p.grid_target, s, z, 3, GROUP),
}


def in_pairs(a: Coded) -> Tensor:
    return pairs.descend(a._replace(codes=greedy.descend(a, 2 * K)), 2 * K, reach=1)


STEPS = {
    "plain": ({"method": "quantease", "descent_sweeps": 2}, lambda a, start: cyclic.descend(a, 2)),
    "relaxed": (
        {"method": "quantease", "descent_sweeps": 4, "descent_relax": True},
        lambda a, start: cyclic.descend(a, 4, relax=True),
    ),
    "greedy": ({"method": "cdquant"}, lambda a, start: greedy.descend(clipped(a, start), K)),
    "few moves": (
        {"method": "cdquant", "greedy_steps": 0.1},
        lambda a, start: greedy.descend(clipped(a, start), 2),
    ),
    "pairs": (
        {"method": "cdquant", "greedy_pairs": True, "greedy_steps": 2},
        lambda a, start: in_pairs(clipped(a, start)),
    ),
}


@pytest.mark.parametrize("deviation", ["target", "refine", "none"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("step", STEPS)
def test_codes_are_those_of_the_descent(step: str, start: str, deviation: str) -> None:
    changes, descend = STEPS[step]
    solver, result = solved(
        **changes, descent_start=start, deviation=deviation, deviation_strength=1.0
    )
    first = given(solver, start)
    assert torch.equal(result.weight.codes, descend(first, start))
    wanted = (clipped(first, start) if changes["method"] == "cdquant" else first).scales
    assert torch.equal(result.weight.scales.float(), wanted)
    others = [other(first, start) for name, (_, other) in STEPS.items() if name != step]
    assert any(not torch.equal(result.weight.codes, other) for other in others)


@pytest.mark.parametrize("method", DESCENTS)
def test_descent_starts_from_the_grids_of_gptq(method: str) -> None:
    by_gptq, found = (solved(method=name, deviation="none")[1].weight for name in ("gptq", method))
    assert torch.equal(found.scales, by_gptq.scales) == (method == "quantease")
    assert torch.equal(found.zeros, by_gptq.zeros)
    assert not torch.equal(found.codes, by_gptq.codes)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_descending_never_raises_the_loss_of_a_row(bits: int, step: str, start: str) -> None:
    W = weight(40)
    W[0], W[1, :GROUP] = 0, 0
    solver = TwoStageGroupQuantizer(
        W, statistics(), config(bits=bits, descent_start=start, **STEPS[step][0])
    )
    solver.initialize_scales()
    solver.assign_codes()
    problem = solver.problem
    signal = true_loss(torch.zeros_like(W), problem.refine_target, problem.hessian)
    before = true_loss(
        solver.quantized_weight().dequantize(), problem.refine_target, problem.hessian
    )
    for act in (solver.descend_codes, solver.descend_pairs):
        act()
        after = true_loss(
            solver.quantized_weight().dequantize(), problem.refine_target, problem.hessian
        )
        assert (after <= before + K * 2**-24 * signal).all()
    assert after.sum() < before.sum()


def test_descents_lose_less_than_gptq_and_pairs_less_than_single_codes() -> None:
    W, S = weight(60), statistics(paired=False)

    def loss(**changes: Any) -> float:
        result = solve(W, S, bits=2, **changes)
        return float(result.losses[list(result.losses)[-1]].sum())

    by_gptq = loss(method="gptq")
    for start in STARTS:
        single = loss(method="cdquant", descent_start=start)
        assert loss(method="cdquant", descent_start=start, greedy_pairs=True) < single < by_gptq
        assert loss(method="quantease", descent_start=start) < by_gptq


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize(("rounds", "sweeps"), [(1, 1), (3, 2)])
def test_joint_refinement_never_raises_the_loss_of_a_row(
    rounds: int, sweeps: int, scale_dtype: str
) -> None:
    W = weight(40)
    W[0], W[1, :GROUP] = 0, 0
    changes = {"joint_rounds": rounds, "joint_sweeps": sweeps, "scale_dtype": scale_dtype}
    solver = TwoStageGroupQuantizer(W, statistics(), config(bits=2, **changes))
    for step in (solver.initialize_scales, solver.assign_codes, solver.refine_scales):
        step()
    problem, found = solver.problem, solver.quantized_weight()
    signal = true_loss(torch.zeros_like(W), problem.refine_target, problem.hessian)
    before = true_loss(found.dequantize(), problem.refine_target, problem.hessian)
    grids = found.scales.float(), found.zeros.float()
    given = Coded(found.codes, problem.refine_target, problem.hessian, *grids, 2, GROUP)
    options = {"rounds": rounds, "sweeps": sweeps, "ridge": 0.01, "dtype": found.scales.dtype}
    codes, scales, zeros = joint.refine_with_zeros(given, **options)
    solver.refine_jointly()
    found = solver.quantized_weight()
    after = true_loss(found.dequantize(), problem.refine_target, problem.hessian)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.scales.float(), scales)
    assert torch.equal(found.zeros.float(), zeros)
    assert (after <= before + 2 * rounds * K * 2**-24 * signal).all()
    assert after.sum() < before.sum()


@pytest.mark.parametrize(
    "changes", [{"method": "gptq"}, {"method": "rtn"}, {"method": "quantease"}], ids=str
)
def test_other_methods_are_not_refined_jointly(changes: dict[str, Any]) -> None:
    assert_equal(solved(**changes)[1], solved(**changes, joint_rounds=3)[1])


# ---- losses ----------------------------------------------------------------------------------------------------------

STEPS_OF = {
    "rtn": ({"method": "rtn"}, ["initialize", "assign"]),
    "gptq": ({"method": "gptq"}, ["initialize", "assign"]),
    "quantease": ({"method": "quantease"}, ["initialize", "assign", "descend"]),
    "cdquant": ({"method": "cdquant"}, ["initialize", "assign", "descend"]),
    "cdquant with pairs": (
        {"method": "cdquant", "greedy_pairs": True},
        ["initialize", "assign", "descend", "pairs"],
    ),
    "two-stage": ({}, ["initialize", "assign", "refine"]),
    "joint": ({"joint_rounds": 1}, ["initialize", "assign", "refine", "joint"]),
    "joint without stage 2": (
        {"joint_rounds": 1, "refine": "none"},
        ["initialize", "assign", "joint"],
    ),
}


@pytest.mark.parametrize("way", STEPS_OF)
def test_loss_follows_the_steps(way: str) -> None:
    changes, steps = STEPS_OF[way]
    W, S, held_out = weight(), statistics(), statistics(seed=7)
    solver = TwoStageGroupQuantizer(W, S, config(**changes))
    actions = {
        "initialize": solver.initialize_scales,
        "assign": solver.assign_codes,
        "descend": solver.descend_codes,
        "pairs": solver.descend_pairs,
        "refine": solver.refine_scales,
        "joint": solver.refine_jointly,
    }
    seen, seen_held_out = {}, {}
    for name in steps:
        actions[name]()
        seen[name], seen_held_out[name] = solver.row_losses(), solver.row_losses(held_out)
        assert_close(solver.loss(), seen[name].sum())
        assert_close(solver.loss(held_out), seen_held_out[name].sum())
    result = TwoStageGroupQuantizer(W, S, config(**changes)).run(held_out)
    assert list(result.losses) == list(result.held_out_losses) == list(seen)
    assert list(result.seconds) == ["factorise", *steps]
    for name, losses in seen.items():
        assert torch.equal(result.losses[name], losses)
        assert torch.equal(result.held_out_losses[name], seen_held_out[name])


def test_loss_before_codes_is_that_of_the_nearest_ones() -> None:
    solver = TwoStageGroupQuantizer(
        weight(), statistics(), config(method="gptq", scale_dtype="float32")
    )
    solver.initialize_scales()
    scales, zeros = solver._state.grids(solver._layer)
    Q = oracle_grid.dequantize(
        oracle_grid.quantize(weight(), scales, zeros, 3, GROUP), scales, zeros, GROUP
    )
    H = statistics().hessian / TOKENS
    slack = K * 2**-24 * float(true_loss(torch.zeros_like(Q), weight(), H).max())
    assert_close(solver.row_losses().double(), true_loss(Q, weight(), H), rtol=1e-5, atol=slack)


def blocked(blocks: int) -> LayerStatistics:
    """Statistics with a metric for each block of rows."""
    parts = [statistics(seed) for seed in range(blocks)]
    count = torch.stack([part.count for part in parts]).sum() / blocks
    R = [part.deviation for part in parts]
    assert all(values is not None for values in R)
    return LayerStatistics(torch.stack([part.hessian for part in parts]), count, torch.stack(R))


LEFT_BY_GPTQ = {
    "usual": {},
    "columns as they are": {"act_order": False},
    "symmetric": {"symmetric": True},
    "offsets": {"zero_points": "float"},
    "zeros kept": {"keep_zeros": True},
    "one stream": {"deviation": "none"},
    "descent": {"refine": "descent"},
}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("changes", LEFT_BY_GPTQ.values(), ids=LEFT_BY_GPTQ)
def test_what_stage_2_is_given_by_gptq_is_that_of_full_products(changes: dict, blocks: int) -> None:
    W = weight()
    W[:, ::3] = 0
    solver = TwoStageGroupQuantizer(
        W, statistics() if blocks == 1 else blocked(blocks), config(**changes)
    )
    solver.initialize_scales()
    solver.assign_codes()
    state, layer = solver._state, solver._layer
    assert state.whitened is not None
    losses, found = solver.row_losses(), state.error_H(layer)
    assert state.whitened is None  # its memory is free again
    state.change()
    difference, expected = state.errors(layer)
    # Sums of K float32 products, of errors whose weight is rounded once, on both ways: K roundings of the largest.
    largest = (
        (difference.abs() + W.abs()).max()
        * layer.known.hessian.diagonal(dim1=-2, dim2=-1).max()
        * K
    )
    assert_close(found, expected, rtol=0, atol=4 * K * 2**-24 * float(largest))
    assert_close(losses, state.losses(layer), rtol=1e-4, atol=0)
    with pytest.raises(AssertionError):
        assert_close(found.roll(1, 0), expected, rtol=0, atol=4 * K * 2**-24 * float(largest))


@pytest.mark.parametrize(
    "changes",
    [{"deviation": "refine"}, {"method": "gptq"}, {"refine": "none"}],
    ids=["two targets", "gptq", "stage 1"],
)
def test_nothing_is_kept_for_stage_2_where_it_has_another_target_or_is_not_asked_for(
    changes: dict,
) -> None:
    solver = TwoStageGroupQuantizer(weight(), statistics(), config(**changes))
    solver.initialize_scales()
    solver.assign_codes()
    assert solver._state.whitened is None
    assert (solver._state.loss is None) == (changes.get("deviation") == "refine")


@pytest.mark.parametrize("elements", [1, 2 * K, 5 * K])
@pytest.mark.parametrize("method", ["gptq", "two-stage"])
def test_losses_do_not_depend_on_how_rows_are_cut(
    method: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = solve(weight(), statistics(), method=method).losses
    monkeypatch.setattr(state_of_layers, "_CHUNK_ELEMENTS", elements)
    assert_close(solve(weight(), statistics(), method=method).losses, whole)


@pytest.mark.parametrize("which", ["fitted", "held-out"])
def test_loss_is_the_mean_squared_error_of_the_outputs(which: str) -> None:
    S, seed = (
        (statistics(paired=False), 0)
        if which == "fitted"
        else (statistics(seed=7, paired=False), 7)
    )
    solver = TwoStageGroupQuantizer(weight(), statistics(paired=False), config())
    Q = solver.run().weight.dequantize(torch.float64)
    X = streams(seed)[0]
    expected = oracle_objective.brute_force_loss(Q, weight().double(), X, X)
    signal = oracle_objective.brute_force_loss(0 * Q, weight().double(), X, X)
    # The fitted loss takes λ·mean(diag H)·‖d‖² back from the damped one: terms of its own size.
    assert float(solver.loss(S if which == "held-out" else None)) == pytest.approx(
        expected, rel=K * 2**-20, abs=K * 2**-24 * signal
    )


def test_signal_is_the_mean_square_of_the_target_outputs() -> None:
    X = streams()[0]
    result = solve(weight(), statistics(paired=False))
    assert_close(
        result.signal.double(), (X @ weight().double().T).square().mean(0), rtol=K * 2**-22, atol=0
    )


def test_result_says_damping_and_seconds() -> None:
    result = solve(weight(), statistics(), damping=0.05)
    assert result.damping == 0.05
    assert list(result.seconds) == ["factorise", "initialize", "assign", "refine"]
    assert all(seconds >= 0 for seconds in result.seconds.values())


# ---- order of calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", ["assign_codes", "refine_scales", "loss", "row_losses", "quantized_weight"]
)
def test_without_scales_a_call_is_refused(call: str) -> None:
    solver = TwoStageGroupQuantizer(weight(), statistics(), config(), name="mlp.up")
    with pytest.raises(
        StateError,
        match=r"mlp\.up: there are no scales yet; call initialize_scales\(\) first, or run\(\)",
    ):
        getattr(solver, call)()


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        ("refine_scales", {}),
        ("quantized_weight", {}),
        ("refine_jointly", {"joint_rounds": 1}),
        ("descend_codes", {"method": "quantease"}),
        ("descend_codes", {"method": "cdquant"}),
        ("descend_pairs", {"method": "cdquant", "greedy_pairs": True}),
    ],
    ids=str,
)
def test_without_codes_a_call_is_refused(call: str, changes: dict[str, Any]) -> None:
    solver = TwoStageGroupQuantizer(weight(), statistics(), config(**changes), name="mlp.up")
    solver.initialize_scales()
    with pytest.raises(
        StateError,
        match=r"mlp\.up: there are no codes yet; call assign_codes\(\) first, or run\(\)",
    ):
        getattr(solver, call)()


def test_initializing_again_forgets_the_codes() -> None:
    solver = TwoStageGroupQuantizer(weight(), statistics(), config())
    solver.run()
    solver.initialize_scales()
    with pytest.raises(StateError, match="there are no codes yet"):
        solver.quantized_weight()


def test_running_again_gives_the_same() -> None:
    solver = TwoStageGroupQuantizer(weight(), statistics(), config())
    assert_equal(solver.run(), solver.run())


@pytest.mark.parametrize("call", ["loss", "row_losses"])
def test_loss_without_statistics_is_refused(call: str) -> None:
    solver = TwoStageGroupQuantizer(weight(), None, config(method="rtn"), name="mlp.up")
    solver.run()
    with pytest.raises(
        StateError, match=r"mlp\.up: no statistics were given, .*; pass LayerStatistics"
    ):
        getattr(solver, call)()


# ---- what must hold for every layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", REFINES)
@pytest.mark.parametrize("method", METHODS)
def test_no_group_size_equals_one_group_for_the_row(method: str, refine: str) -> None:
    found, by_size, wider = (
        solve(weight(), statistics(), method=method, refine=refine, group_size=size)
        for size in (None, K, 4 * K)
    )
    assert_equal(found, by_size)
    assert_equal(found, wider)
    assert found.weight.group_size == wider.weight.group_size == K
    assert found.weight.scales.shape == (N, 1)


@pytest.mark.parametrize("method", METHODS)
def test_identity_hessian_gives_plain_rounding(method: str) -> None:
    S = LayerStatistics(torch.eye(K), torch.tensor(1))
    found = solve(weight(), S, method=method, refine="none").weight
    assert torch.equal(found.codes, grid.quantize(weight(), found.scales, found.zeros, 3, GROUP))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [2.0**-8, 2.0**8], ids=["small", "large"])
def test_scaling_the_inputs_changes_nothing(factor: float, method: str) -> None:
    S = statistics()
    scaled = LayerStatistics(factor**2 * S.hessian, S.count, factor**2 * S.deviation)
    assert_equal(solve(weight(), scaled, method=method), solve(weight(), S, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_scaling_the_weight_scales_the_scales(method: str) -> None:
    small, large = (
        solve(factor * weight(), statistics(), method=method, scale_dtype="float32").weight
        for factor in (1, 8)
    )
    assert torch.equal(large.codes, small.codes)
    assert torch.equal(large.scales, 8 * small.scales)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_independent(method: str) -> None:
    # Products may be summed in another order in a matrix of other height: codes stay, scales
    # are float16 here and may differ by a rounding of it, 2^-10.
    W = weight(9)
    whole = solve(W, statistics(), method=method).weight
    p = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    permuted = solve(W[p], statistics(), method=method).weight
    parts = [solve(part, statistics(), method=method).weight for part in W.split([2, 7])]
    for found, rows in ((permuted, p), *zip(parts, torch.arange(9).split([2, 7]), strict=True)):
        assert torch.equal(found.codes, whole.codes[rows])
        assert torch.equal(found.zeros, whole.zeros[rows])
        assert_close(found.scales, whole.scales[rows], rtol=2**-10, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_not_modified(method: str) -> None:
    W, S, held_out = weight(), statistics(), statistics(seed=7)
    tensors = (
        W,
        S.hessian,
        S.deviation,
        S.count,
        held_out.hessian,
        held_out.deviation,
        held_out.count,
    )
    kept = [tensor.clone() for tensor in tensors]
    TwoStageGroupQuantizer(W, S, config(method=method)).run(held_out)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_float_dtype_are_solved_in_float32(dtype: torch.dtype) -> None:
    W = weight().to(dtype)
    assert_equal(solve(W, statistics()), solve(W.float(), statistics()))


def test_weights_that_require_grad_leave_no_graph() -> None:
    result = solve(weight().requires_grad_(), statistics())
    assert not result.weight.scales.requires_grad
    assert not any(loss.requires_grad for loss in result.losses.values())


def test_statistics_in_either_dtype_give_the_same_codes() -> None:
    S = statistics()
    single = LayerStatistics(S.hessian.float(), S.count, S.deviation.float())
    assert torch.equal(solve(weight(), single).weight.codes, solve(weight(), S).weight.codes)


# ---- odd layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "as-is"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_columns_never_seen_are_rounded(method: str, act_order: bool) -> None:
    X, X_ref = streams()
    dead = torch.tensor([0, 9, K - 1])
    X[:, dead], X_ref[:, dead] = 0, 0
    observer = HessianObserver(K)
    observer.observe(X, X_ref)
    found = solve(
        weight(), observer.statistics(), method=method, act_order=act_order, refine="none"
    ).weight
    rounded = grid.quantize(weight(), found.scales, found.zeros, 3, GROUP)
    assert torch.equal(found.codes[:, dead], rounded[:, dead])
    refined_codes = solve(
        weight(), observer.statistics(), method=method, act_order=act_order
    ).weight.codes
    assert torch.equal(refined_codes, found.codes)


@pytest.mark.parametrize("refine", REFINES)
@pytest.mark.parametrize("method", METHODS)
def test_zero_hessian_is_taken_for_the_identity(method: str, refine: str) -> None:
    S = LayerStatistics(torch.zeros(K, K), torch.tensor(5), torch.zeros(K, K))
    result = solve(weight(), S, method=method, refine=refine)
    # The report divides by the signal: it and the losses are 0, not what rounding leaves.
    assert (result.signal == 0).all()
    assert_equal(
        result,
        solve(
            weight(), LayerStatistics(torch.eye(K), torch.tensor(1)), method=method, refine=refine
        ),
    )
    assert all((loss == 0).all() for loss in result.losses.values())


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_groups_of_zeros_stay_zeros(bits: int, method: str, symmetric: bool) -> None:
    W = weight()
    W[0], W[1, :GROUP], W[2, 2 * GROUP :] = 0, 0, 0
    # R would move the target away from 0.
    found = solve(
        W, statistics(), bits=bits, method=method, symmetric=symmetric, deviation="none"
    ).weight
    values = found.dequantize()
    assert (torch.isfinite(found.scales) & (found.scales > 0)).all()
    assert values[0].count_nonzero() == 0
    if method == "rtn":
        assert values[1, :GROUP].count_nonzero() == values[2, 2 * GROUP :].count_nonzero() == 0


def test_group_without_integers_keeps_its_scale() -> None:
    W = weight()
    W[1, :GROUP] = 0
    S = LayerStatistics(
        torch.block_diag(torch.eye(GROUP), statistics().hessian[GROUP:, GROUP:] / TOKENS),
        torch.tensor(1),
    )
    before, after = (solve(W, S, refine=refine).weight for refine in ("none", "exact"))
    assert (after.codes[1, :GROUP] == after.zeros[1, 0]).all()
    assert after.scales[1, 0] == before.scales[1, 0] == 1


def test_layer_of_a_single_weight() -> None:
    S = LayerStatistics(torch.ones(1, 1), torch.tensor(1))
    found = solve(torch.tensor([[-0.5]]), S, group_size=None).weight
    assert found.codes.shape == (1, 1)
    assert float(found.dequantize()) == pytest.approx(-0.5, rel=2**-11)  # the scale is float16


def test_small_weights_survive_scales_in_float16() -> None:
    # Scales of about 2e-5 lie in float16's subnormal range, where its spacing is 2^-24: 0.3 % of them.
    W = 1e-3 * weight()
    small, exact = (
        solve(W, None, bits=8, method="rtn", scale_dtype=dtype).weight.dequantize()
        for dtype in ("float16", "float32")
    )
    assert (small - W).norm() < 2 * (exact - W).norm() + 2**-25 / 1e-5 * W.norm()
    assert (small - W).norm() < 0.01 * W.norm()


# ---- blocks ----------------------------------------------------------------------------------------------------------


def block_streams(B: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (T, B, K) of both streams; those of block b are mixed in a way of their own, and 2^(b
    mod 5) times as large.
    """
    parts = []
    for b in range(B):
        mixing = torch.eye(width, dtype=torch.float64) + 0.9 / width**0.5 * normal(
            width, width, seed=200 + b
        )
        X_ref = 2.0 ** (b % 5) * normal(TOKENS, width, seed=seed + 300 + b) @ mixing
        parts.append(
            (X_ref + 0.2 * X_ref.std() * normal(TOKENS, width, seed=seed + 400 + b), X_ref)
        )
    return torch.stack([X for X, _ in parts], 1), torch.stack([X_ref for _, X_ref in parts], 1)


def block_statistics(
    B: int, width: int, dead: tuple[int, ...] = (), seed: int = 0
) -> LayerStatistics:
    X, X_ref = block_streams(B, width, seed)
    X[:, dead], X_ref[:, dead] = 0, 0
    observer = HessianObserver(width, blocks=B, dtype=torch.float64)
    observer.observe(X, X_ref)
    S = observer.statistics()
    return (
        S if B > 1 else LayerStatistics(S.hessian.unsqueeze(0), S.count, S.deviation.unsqueeze(0))
    )


def block_of(S: LayerStatistics, b: int) -> LayerStatistics:
    return LayerStatistics(S.hessian[b], S.count, S.deviation[b])


def solve_one_by_one(
    W: Tensor, S: LayerStatistics, held_out: LayerStatistics, **changes: Any
) -> list[SolverResult]:
    parts = W.split(len(W) // S.blocks)
    return [
        TwoStageGroupQuantizer(part, block_of(S, b), config(**changes)).run(block_of(held_out, b))
        for b, part in enumerate(parts)
    ]


def block_tolerance(S: LayerStatistics) -> float:
    """Relative difference of scales that were found in two orders of summation.

    Target and scales are both products of K terms (K roundings) that the condition of H amplifies; two orders each.
    """
    conditions = [torch.linalg.cond(oracle_objective.damped(H, 0.01)) for H in S.hessian if H.any()]
    return 4 * S.columns * 2**-24 * float(max(conditions))


def assert_blocks_are_solved_alike(
    W: Tensor, S: LayerStatistics, expected: LayerStatistics | None = None, **changes: Any
) -> None:
    """Solve all blocks at once, and one at a time: the same codes, scales and losses up to rounding."""
    held_out = block_statistics(S.blocks, S.columns, seed=1000)
    found = TwoStageGroupQuantizer(W, S, config(scale_dtype="float32", **changes)).run(held_out)
    alone = solve_one_by_one(
        W, S if expected is None else expected, held_out, scale_dtype="float32", **changes
    )
    tolerance = block_tolerance(S)
    assert tolerance < 1e-3

    def joined(take: Any) -> Tensor:
        return torch.cat([take(result) for result in alone])

    assert torch.equal(found.weight.codes, joined(lambda r: r.weight.codes))
    assert torch.equal(found.weight.zeros, joined(lambda r: r.weight.zeros))
    assert_close(found.weight.scales, joined(lambda r: r.weight.scales), rtol=tolerance, atol=0)
    signal = joined(lambda r: r.signal)
    assert_close(found.signal, signal, rtol=tolerance, atol=0)
    for table in ("losses", "held_out_losses", "objective"):
        steps = getattr(found, table)
        assert list(steps) == list(getattr(alone[0], table))
        for step, values in steps.items():
            wanted = joined(lambda r, table=table, step=step: getattr(r, table)[step])
            slack = (
                tolerance * signal + tolerance * wanted
            )  # the loss is a small part of numbers of the signal's size
            assert ((values - wanted).abs() <= slack).all(), (table, step)


SHAPES = {
    "rows of 22": (3, 4, 22),
    "depthwise": (12, 1, 9),
    "as many blocks as columns": (9, 2, 9),
    "ragged": (4, 3, 19),
    "one column": (5, 2, 1),
    "one block": (1, 6, 22),
    "wide": (2, 5, 40),
}
WAYS = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "two-stage": {},
    "descent": {"refine": "descent"},
    "no refinement": {"refine": "none"},
    "deviation in stage 2": {"deviation": "refine"},
    "no deviation": {"deviation": "none"},
    "full deviation": {"deviation_strength": 1.0},
    "symmetric": {"symmetric": True},
    "blocks metric": {"grid_metric": "blocks"},
    "as is": {"act_order": False},
    "per channel": {"group_size": None},
    "2 bits": {"bits": 2},
    "8 bits": {"bits": 8, "grid_metric": "blocks"},
    "quantease": {"method": "quantease", "descent_sweeps": 2},
    "quantease, relaxed": {"method": "quantease", "descent_sweeps": 3, "descent_relax": True},
    "cdquant": {"method": "cdquant", "descent_start": "nearest"},
    "cdquant with pairs": {"method": "cdquant", "greedy_pairs": True, "bits": 2},
    "joint": {"joint_rounds": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_blocks_are_solved_as_if_one_at_a_time(way: str, shape: str) -> None:
    B, n, width = SHAPES[shape]
    W = normal(B * n, width, seed=7).float()
    assert_blocks_are_solved_alike(W, block_statistics(B, width), **WAYS[way])


@pytest.mark.parametrize(
    "way", ["gptq", "two-stage", "descent", "deviation in stage 2", "blocks metric"]
)
@pytest.mark.parametrize("n", [1, 4], ids=lambda n: f"n={n}")
def test_blocks_never_seen_are_rounded(n: int, way: str) -> None:
    S = block_statistics(6, 22, dead=(0, 4))
    W = normal(6 * n, 22, seed=7).float()
    found = solve(W, S, **WAYS[way])
    weight, dead = found.weight, torch.tensor([0, 4])
    rows = (dead.unsqueeze(1) * n + torch.arange(n)).flatten()
    before = solve(
        W, S, **{**WAYS[way], "refine": "none"}
    ).weight  # stage 2 moves scales with the codes kept
    assert torch.equal(before.codes, weight.codes)
    rounded = grid.quantize(W[rows], before.scales[rows], before.zeros[rows], 3, GROUP)
    assert torch.equal(weight.codes[rows], rounded)
    assert (found.signal[rows] == 0).all()
    assert all((loss[rows] == 0).all() for loss in found.losses.values())
    alone = solve(W[rows], LayerStatistics(torch.eye(22), torch.tensor(1)), **WAYS[way])
    assert torch.equal(weight.codes[rows], alone.weight.codes)
    assert_blocks_are_solved_alike(W, S, **WAYS[way])


CORRUPTED = {
    "blocks rolled": lambda S: LayerStatistics(
        S.hessian.roll(1, 0), S.count, S.deviation.roll(1, 0)
    ),
    "deviations rolled": lambda S: LayerStatistics(S.hessian, S.count, S.deviation.roll(1, 0)),
    "deviations turned": lambda S: LayerStatistics(S.hessian, S.count, S.deviation.mT.contiguous()),
    "the mean of all blocks": lambda S: LayerStatistics(
        S.hessian.mean(0).expand_as(S.hessian), S.count, S.deviation.mean(0).expand_as(S.deviation)
    ),
}


@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_blocks_are_solved_otherwise_with_corrupted_statistics(corrupt) -> None:
    S = block_statistics(3, 22)
    with pytest.raises(AssertionError):
        assert_blocks_are_solved_alike(normal(12, 22, seed=7).float(), S, expected=corrupt(S))


def test_blocks_with_equal_statistics_are_solved_like_rows_that_share_them() -> None:
    S = statistics()
    repeated = LayerStatistics(S.hessian.expand(3, K, K), S.count, S.deviation.expand(3, K, K))
    found, expected = solve(weight(9), repeated), solve(weight(9), S)
    assert torch.equal(found.weight.codes, expected.weight.codes)
    assert_close(found.weight.scales, expected.weight.scales, rtol=2**-10, atol=0)  # float16


def test_blocks_with_a_pooled_held_out_hessian() -> None:
    S, W = block_statistics(3, 22), normal(12, 22, seed=7).float()
    pooled = statistics(seed=7, paired=False)
    solver = TwoStageGroupQuantizer(W, S, config(deviation="none"))
    result = solver.run(pooled)
    expected = true_loss(result.weight.dequantize(), W, pooled.hessian / pooled.count)
    assert_close(result.held_out_losses["refine"].double(), expected, rtol=K * 2**-20, atol=0)


def test_damping_of_blocks_that_was_raised_is_named_and_reported() -> None:
    H = torch.eye(22).repeat(3, 1, 1)
    H[1, 0, 1] = H[1, 1, 0] = 1.05
    with pytest.warns(
        DampingWarning, match=r"conv: damping was raised from 0.01 to 0.1 .* of 1 of its 3 blocks"
    ):
        solver = TwoStageGroupQuantizer(
            weight(6), LayerStatistics(H, torch.tensor(1)), config(), name="conv"
        )
    result = solver.run()
    assert result.damping == pytest.approx(0.1, rel=1e-12)
    alone = solve(weight(6)[:2], LayerStatistics(H[0], torch.tensor(1)))
    assert torch.equal(result.weight.codes[:2], alone.weight.codes)


def test_inputs_with_blocks_are_not_modified() -> None:
    S, held_out, W = block_statistics(3, 22), block_statistics(3, 22, seed=9), weight(12)
    tensors = (W, S.hessian, S.deviation, S.count, held_out.hessian)
    kept = [tensor.clone() for tensor in tensors]
    TwoStageGroupQuantizer(W, S, config()).run(held_out)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("method", [*METHODS, "rtn without statistics"])
def test_weights_that_are_no_numbers_are_named(method: str, value: float) -> None:
    W, S = weight(), statistics() if method in METHODS else None
    W[1, 2] = value
    with pytest.raises(
        LayerError, match=r"mlp\.up: 1 of its weights are NaN or inf; repair the checkpoint, or add"
    ):
        TwoStageGroupQuantizer(W, S, config(method=method.split(maxsplit=1)[0]), name="mlp.up")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_statistics_that_are_no_numbers_are_named(value: float) -> None:
    S = statistics()
    S.hessian[3, 4] = value
    with pytest.raises(CalibrationError, match=r"mlp\.up: NaN or inf in its input statistics"):
        TwoStageGroupQuantizer(weight(), S, config(), name="mlp.up")


def test_statistics_of_no_tokens_are_named() -> None:
    with pytest.raises(CalibrationError, match=r"mlp\.up: its statistics hold no tokens"):
        TwoStageGroupQuantizer(
            weight(), LayerStatistics(torch.zeros(K, K), torch.tensor(0)), config(), name="mlp.up"
        )


@pytest.mark.parametrize("method", METHODS[1:])
def test_missing_statistics_are_named(method: str) -> None:
    with pytest.raises(
        LayerError,
        match=rf"mlp\.up: method '{method}' needs statistics .*; calibrate, or use method='rtn'",
    ):
        TwoStageGroupQuantizer(weight(), None, config(method=method), name="mlp.up")


@pytest.mark.parametrize(
    "W",
    [torch.ones(K), torch.ones(2, 3, K), torch.ones(N, K).int()],
    ids=["vector", "cube", "integers"],
)
def test_what_is_no_float_matrix_is_named(W: Tensor) -> None:
    with pytest.raises(
        LayerError,
        match=r"mlp\.up: weight is torch\..* of shape .*; give a floating-point matrix \(N, K\)",
    ):
        TwoStageGroupQuantizer(W, statistics(), config(), name="mlp.up")


def test_statistics_of_another_width_are_named() -> None:
    with pytest.raises(
        LayerError, match=r"mlp\.up: weight has shape \(6, 21\), its statistics are for 22 columns"
    ):
        TwoStageGroupQuantizer(weight()[:, :-1], statistics(), config(), name="mlp.up")


def test_rows_that_are_no_blocks_are_named() -> None:
    S = block_statistics(4, K)
    with pytest.raises(LayerError, match=r"mlp\.up: weight has 6 rows, its statistics 4 blocks"):
        TwoStageGroupQuantizer(weight(), S, config(), name="mlp.up")


@pytest.mark.parametrize("shape", [(K - 1, K - 1), (4, K, K)], ids=["width", "blocks"])
def test_held_out_statistics_that_do_not_fit_are_named(shape: tuple[int, ...]) -> None:
    solver = TwoStageGroupQuantizer(weight(), statistics(), config(), name="mlp.up")
    with pytest.raises(LayerError, match=r"mlp\.up: weight has .*, its statistics"):
        solver.run(LayerStatistics(torch.ones(shape), torch.tensor(1)))


def test_damping_that_was_raised_is_named_and_reported() -> None:
    H = torch.eye(K)
    H[0, 1] = H[1, 0] = 1.05
    with pytest.warns(DampingWarning, match=r"mlp\.up: damping was raised from 0.01 to 0.1"):
        solver = TwoStageGroupQuantizer(
            weight(), LayerStatistics(H, torch.tensor(1)), config(), name="mlp.up"
        )
    assert solver.run().damping == pytest.approx(0.1, rel=1e-12)


def test_hopeless_hessian_is_named() -> None:
    S = LayerStatistics(-5 * torch.eye(K), torch.tensor(1))
    with pytest.raises(
        SingularHessianError,
        match=r"mlp\.up: the Hessian is not positive definite even with damping 1",
    ):
        TwoStageGroupQuantizer(weight(), S, config(), name="mlp.up")
