"""`TwoStageGroupQuantizer` with tables, offsets and outliers: the steps together, and what is handed over."""

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from applicable import applicable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import tsq_layers as tsq
from tsq_layers.config import QuantConfig
from tsq_layers.config.methods import option_names, readers
from tsq_layers.errors import StateError
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.reports import STEPS
from tsq_layers.solver import SolverResult, TwoStageGroupQuantizer
from tsq_layers.solver import problem as objective
from tsq_layers.solver.steps import METHODS, PROBLEM_READS, recipe

pytestmark = pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")
N, K, GROUP, TOKENS = 12, 22, 8, 200
WAYS = {
    "lnq": {"method": "lnq"},
    "lnq by group": {"method": "lnq", "codebook": "group"},
    "lnq, one bit": {"method": "lnq", "bits": 1, "codebook": "group", "scale_dtype": "float32"},
    "lnq, nearest deviation": {"method": "lnq", "deviation": "refine"},
    "offsets": {"zero_points": "float"},
    "offsets, blocks metric": {
        "zero_points": "float",
        "grid_metric": "blocks",
        "deviation": "refine",
    },
    "offsets by descent": {"zero_points": "float", "refine": "descent", "scale_dtype": "bfloat16"},
    "offsets, joint": {"zero_points": "float", "joint_rounds": 2},
    "offsets of a row": {"zero_points": "float", "group_size": None},
    "zero points, joint": {"joint_rounds": 2},
    "outliers": {"method": "quantease", "outliers": 0.05},
    "outliers, nearest": {"method": "quantease", "outliers": 0.05, "descent_start": "nearest"},
    "outlier columns": {"method": "quantease", "outlier_columns": 2},
}
every_way = pytest.mark.parametrize("way", WAYS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(B: int | None = None, seed: int = 0, dead: tuple[int, ...] = ()) -> LayerStatistics:
    X_ref = normal(B or 1, TOKENS, K, seed=seed) @ (
        torch.eye(K) + 0.2 * normal(B or 1, K, K, seed=100)
    )
    X = X_ref + 0.2 * normal(B or 1, TOKENS, K, seed=seed + 1)
    X[..., list(dead)] = X_ref[..., list(dead)] = 0
    H, R = X.mT @ X, (X - X_ref).mT @ X
    return LayerStatistics(H if B else H[0], torch.tensor(TOKENS), R if B else R[0])


def weight(rows: int = N) -> Tensor:
    return normal(rows, K, seed=50).float() + 0.3


def solver(way: str, S: LayerStatistics, rows: int = N) -> TwoStageGroupQuantizer:
    return TwoStageGroupQuantizer(
        weight(rows), S, QuantConfig(**{"bits": 2, "group_size": GROUP, **WAYS[way]})
    )


def solve(way: str, S: LayerStatistics, rows: int = N) -> SolverResult:
    return solver(way, S, rows).run()


@every_way
def test_what_is_stored_is_what_the_losses_speak_of(way: str) -> None:
    S = statistics()
    quantizer = solver(way, S)
    result = quantizer.run(statistics(seed=7))
    found = result.weight
    expected = objective.squared_error(
        found.dequantize().double() - quantizer.problem.refine_target.double(), S.hessian / S.count
    )
    last = list(result.losses)[-1]
    assert_close(
        result.losses[last].double(), expected, rtol=1e-4, atol=1e-5 * float(result.signal.max())
    )
    dtype = getattr(torch, quantizer.config.scale_dtype)
    assert found.scales.dtype == dtype
    for part in (
        found.offsets,
        found.tables,
        None if found.outliers is None else found.outliers.values,
    ):
        assert part is None or part.dtype == dtype


@every_way
def test_parts_are_those_of_the_method(way: str) -> None:
    found, changes = solve(way, statistics()).weight, WAYS[way]
    groups = 1 if changes.get("group_size", 0) is None else 3
    lnq = changes.get("method") == "lnq"
    assert (found.tables is not None) == lnq
    assert (found.offsets is not None) == ("zero_points" in changes)
    assert (found.outliers is not None) == ("outliers" in changes or "outlier_columns" in changes)
    assert found.scales.shape == found.zeros.shape == (N, 0 if lnq else groups)
    if lnq:
        assert found.tables.shape == (
            N,
            groups if "codebook" in changes else 1,
            2 ** changes.get("bits", 2),
        )
    if found.offsets is not None:
        assert found.offsets.shape == (N, groups)
        assert (found.zeros == 0).all()
    if "outliers" in changes:
        assert len(found.outliers.values) == round(0.05 * N * K)
    if "outlier_columns" in changes:
        assert found.outliers.values.shape == (N, 2)


def test_reports_know_all_steps() -> None:
    names = {step.name for steps in METHODS.values() for step in steps}
    assert set(STEPS) == names
    for steps in METHODS.values():
        order = [STEPS.index(step.name) for step in steps]
        assert order == sorted(order)


@every_way
def test_steps_follow_each_other_and_the_last_lose_less(way: str) -> None:
    losses = {step: float(values.sum()) for step, values in solve(way, statistics()).losses.items()}
    changes = WAYS[way]
    last = (
        ["descend"] if "method" in changes else ["refine"] + ["joint"] * ("joint_rounds" in changes)
    )
    assert list(losses) == ["initialize", "assign", *last]
    order = [losses[step] for step in ("assign", *last)]
    if changes.get("deviation") != "refine":  # codes and grids are then for another target
        assert all(after < before * 1.02 for before, after in itertools.pairwise(order))
    assert order[-1] < losses["initialize"]


def test_more_freedom_loses_less() -> None:
    def loss(**changes: Any) -> float:
        config = QuantConfig(**{"bits": 2, "group_size": GROUP, "deviation": "none", **changes})
        result = TwoStageGroupQuantizer(weight(60), statistics(), config).run()
        return float(result.losses[list(result.losses)[-1]].sum())

    assert loss(zero_points="float", joint_rounds=2) < loss(zero_points="float") < loss()
    assert loss(joint_rounds=2) < loss()
    assert (
        loss(method="lnq", codebook="group")
        < loss(method="lnq")
        < loss(method="quantease", group_size=None)
    )
    assert (
        loss(method="quantease", outliers=0.1)
        < loss(method="quantease", outliers=0.02)
        < loss(method="quantease")
    )
    assert loss(method="quantease", outlier_columns=3) < loss(method="quantease")


@every_way
def test_blocks_with_equal_statistics_are_solved_like_rows_that_share_them(way: str) -> None:
    S = statistics()
    repeated = LayerStatistics(S.hessian.expand(3, K, K), S.count, S.deviation.expand(3, K, K))
    found, expected = solve(way, repeated).weight, solve(way, S).weight
    assert torch.equal(found.codes, expected.codes)
    assert_close(found.dequantize(), expected.dequantize(), rtol=2**-7, atol=1e-3)


@every_way
def test_blocks_are_solved_each_with_its_own(way: str) -> None:
    S = statistics(B=3)
    found = solve(way, S)
    alone = [
        TwoStageGroupQuantizer(
            part, LayerStatistics(S.hessian[b], S.count, S.deviation[b]), solver(way, S).config
        ).run()
        for b, part in enumerate(weight().split(N // 3))
    ]
    if "outlier" in way:  # where outliers are is decided for the layer as a whole
        assert torch.isfinite(found.weight.dequantize()).all()
        return
    assert torch.equal(found.weight.codes, torch.cat([result.weight.codes for result in alone]))


@every_way
def test_columns_never_seen_and_rows_of_zeros_are_harmless(way: str) -> None:
    W = weight()
    W[0], W[1, :GROUP] = 0, 0
    S = statistics(dead=(0, 9, K - 1))
    found = TwoStageGroupQuantizer(W, S, solver(way, S).config).run().weight
    assert torch.isfinite(found.dequantize()).all()
    unseen = TwoStageGroupQuantizer(
        W,
        LayerStatistics(torch.zeros(K, K), torch.tensor(5), torch.zeros(K, K)),
        solver(way, S).config,
    ).run()
    assert torch.isfinite(unseen.weight.dequantize()).all()
    assert all((loss == 0).all() for loss in unseen.losses.values())


@every_way
def test_inputs_are_not_modified_and_running_again_gives_the_same(way: str) -> None:
    S, W = statistics(), weight()
    kept = S.hessian.clone(), S.deviation.clone(), W.clone()
    quantizer = TwoStageGroupQuantizer(W, S, solver(way, S).config)
    first, second = (quantizer.run().weight.dequantize() for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(kept, (S.hessian, S.deviation, W), strict=True))


@every_way
def test_nothing_is_read_from_the_device(way: str, monkeypatch) -> None:
    # Where tensors have no values, a read raises.
    monkeypatch.setattr(
        objective, "to_host", lambda *values: [0.0, 0.0, 1e4] if len(values) == 3 else [0.0]
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        S = LayerStatistics(torch.empty(K, K), torch.tensor(TOKENS), torch.empty(K, K))
        found = TwoStageGroupQuantizer(torch.empty(N, K), S, solver(way, S).config).run().weight
    assert found.codes.shape == (N, K)


@pytest.mark.parametrize("call", ["descend_codes", "quantized_weight"])
def test_tables_without_codes_are_refused(call: str) -> None:
    quantizer = solver("lnq", statistics())
    with pytest.raises(StateError, match="there are no scales yet"):
        quantizer.loss()
    quantizer.initialize_scales()
    assert float(quantizer.loss()) > 0
    with pytest.raises(StateError, match="there are no codes yet"):
        getattr(quantizer, call)()


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_points": "float", "symmetric": True},
        {"zero_points": "float", "method": "gptq"},
        {"outliers": 0.1},
    ],
    ids=str,
)
def test_options_of_other_methods_in_files_of_version_0_1_are_not_looked_at(
    changes: dict[str, Any],
) -> None:
    flat = {"schema_version": 1, "bits": 2, "group_size": GROUP, **changes}
    plain = {**flat, "zero_points": "integer", "outliers": 0.0}
    found, expected = (
        TwoStageGroupQuantizer(weight(), statistics(), QuantConfig.from_dict(fields)).run().weight
        for fields in (flat, plain)
    )
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert found.offsets is None
    assert found.outliers is None


@pytest.mark.parametrize("method", METHODS)
def test_steps_read_every_option_of_their_method(method: str) -> None:
    reads = {name for step in METHODS[method] for name in step.reads}
    reads |= set(PROBLEM_READS) & set(option_names(method))
    assert reads == set(option_names(method))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("descent_start", ["gptq", "nearest"])
def test_steps_read_no_other_option_than_they_say(way: str, descent_start: str) -> None:
    fields = applicable(**{"bits": 2, "group_size": GROUP, **WAYS[way]})
    if readers("descent_start")[0] == fields.get("method"):
        fields["descent_start"] = descent_start
    config = QuantConfig(**fields)
    names, recording = recorder(config)
    quantizer = TwoStageGroupQuantizer(weight(), statistics(), recording)
    # The order of the columns belongs to the problem; the others are conditions of steps.
    assert names <= {*PROBLEM_READS, "act_order", "refine", "joint_rounds", "greedy_pairs"}
    for name, step in recipe(config).items():
        names.clear()
        quantizer._run_step(name)
        assert names <= {*step.reads}, name


def recorder(config: QuantConfig) -> tuple[set[str], QuantConfig]:
    """A configuration whose options note the names of those that are read, and these names."""
    kind, names = type(config.options), set()

    def read(options: Any, name: str) -> Any:
        if name in option_names(kind.method):
            names.add(name)
        return object.__getattribute__(options, name)

    noted = type(kind.__name__, (kind,), {"__getattribute__": read})
    recording = copy.copy(config)
    object.__setattr__(recording, "options", noted(**dataclasses.asdict(config.options)))
    names.clear()
    return names, recording


def test_held_out_losses_are_relative_to_the_held_out_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, K)
    model = torch.nn.Linear(K, N, bias=False)
    wrapped = torch.nn.Sequential(model)
    expected = model.weight.detach().clone()
    other = 10 * torch.randn(50, K)
    layer = tsq.quantize(
        wrapped, QuantConfig(bits=3, group_size=GROUP), [x], held_out=[other]
    ).tsq_report.layers[0]
    difference = wrapped[0].dequantize(torch.float32) - expected
    ratio = float((other @ difference.T).square().sum() / (other @ expected.T).square().sum())
    assert layer.held_out_losses["refine"] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("changes", [{"outliers": 0.02}, {"outlier_columns": 2}], ids=str)
def test_outliers_of_a_layer_do_not_depend_on_the_others_with_its_input(
    changes: dict[str, Any],
) -> None:
    class Pair(torch.nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                torch.manual_seed(ord(name))
                layer = torch.nn.Linear(64, 32, bias=False)
                layer.weight.data *= 0.1 if name == "b" else 1.0
                self.add_module(name, layer)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [child(x) for child in self.children()]

    x = normal(400, 64).float()
    config = QuantConfig(bits=3, group_size=32, method="quantease", **changes)
    both, one = (tsq.quantize(Pair(names), config, [x]) for names in ("ab", "b"))
    assert torch.equal(both.b.dequantize(torch.float32), one.b.dequantize(torch.float32))
    assert both.b.bits_per_weight == one.b.bits_per_weight


PRUNED = {
    "joint": {"joint_rounds": 2},
    "symmetric, joint": {"joint_rounds": 2, "symmetric": True},
    "quantease": {"method": "quantease"},
    "quantease, relaxed": {"method": "quantease", "descent_relax": True},
    "quantease, nearest": {"method": "quantease", "descent_start": "nearest"},
    "cdquant": {"method": "cdquant"},
    "cdquant, pairs": {"method": "cdquant", "greedy_pairs": True},
}


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("way", PRUNED)
def test_no_step_on_a_pruned_layer_raises_the_loss_of_a_row(way: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 64, generator=generator) + 5 * torch.randn(
        300, 4, generator=generator
    ) @ torch.randn(4, 64, generator=generator)
    weight = torch.randn(16, 64, generator=generator)
    weight *= weight.abs() > weight.abs().median()
    known = LayerStatistics(x.T @ x, torch.tensor(300))
    config = QuantConfig(bits=bits, group_size=16, deviation="none", keep_zeros=True, **PRUNED[way])
    result = TwoStageGroupQuantizer(weight, known, config).run()
    assert (result.weight.dequantize()[weight == 0] == 0).all()
    steps = [step for step in result.losses if step != "initialize"]
    for before, after in itertools.pairwise(steps):
        if config.option("descent_start") != "nearest":
            assert (result.losses[after] <= result.losses[before] * (1 + 1e-4) + 1e-5).all(), (
                before,
                after,
            )
    free = config.changed(keep_zeros=False)
    plain = TwoStageGroupQuantizer(
        weight, known, free.changed(keep_zeros=True, method="gptq")
    ).run()
    assert result.losses[steps[-1]].sum() < 0.8 * plain.losses["assign"].sum()
