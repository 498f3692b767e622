"""The objective: damping, factorisation and shifted target against float64 loops, and the sign of R by brute force."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from oracles import objective as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.config import QuantConfig
from tsq_layers.errors import CalibrationError, DampingWarning, LayerError, SingularHessianError
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.solver import problem as objective

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Case(NamedTuple):
    """Weights and inputs of both streams, float64: W (N, K), X and X_ref (T, K)."""

    W: Tensor
    X: Tensor
    X_ref: Tensor
    H: Tensor
    R: Tensor

    @property
    def statistics(self) -> LayerStatistics:
        return LayerStatistics(
            len(self.X) * self.H, torch.tensor(len(self.X)), len(self.X) * self.R
        )


def case(K: int = 9, N: int = 4, T: int = 60, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X_ref = normal(T, K) @ (torch.eye(K, dtype=torch.float64) + 0.3 * normal(K, K))
    X = X_ref + 0.3 * normal(T, K) + 0.2 * X_ref.roll(1, dims=1)
    return Case(normal(N, K), X, X_ref, *oracle.statistics(X, X_ref))


def orders(H: Tensor) -> dict[str, Tensor]:
    K = len(H)
    generator = torch.Generator().manual_seed(1)
    return {
        "as-is": torch.arange(K),
        "descending": H.diagonal().argsort(descending=True),
        "random": torch.randperm(K, generator=generator),
    }


ORDERS = ["as-is", "descending", "random"]


# ---- factorise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("K", [1, 2, 9, 40], ids=lambda K: f"K={K}")
def test_factor_is_that_of_the_damped_matrix_in_processing_order(K: int, order: str) -> None:
    H = case(K, T=3 * K).H
    chosen = orders(H)[order]
    damped, V, used, ridge = objective.factorise(H, chosen, 0.01)
    expected = oracle.damped(H, 0.01)
    assert_close(damped, expected, **CLOSE)
    assert_close(V @ V.T, expected[chosen][:, chosen], **CLOSE)
    assert torch.equal(V, V.triu())
    assert (V.diagonal() > 0).all()
    assert used == 0.01
    assert_close(ridge, 0.01 * H.diagonal().mean(), **CLOSE)


def test_factor_differs_when_the_order_is_reversed() -> None:
    H = case().H
    order = orders(H)["random"]
    V = objective.factorise(H, order, 0.01)[1]
    wrong = order.flip(0)
    with pytest.raises(AssertionError):
        assert_close(V @ V.T, oracle.damped(H, 0.01)[wrong][:, wrong], **CLOSE)


def test_factor_differs_from_that_of_the_undamped_matrix() -> None:
    H = case().H
    order = torch.arange(len(H))
    V = objective.factorise(H, order, 0.01)[1]
    with pytest.raises(AssertionError):
        assert_close(V @ V.T, H, **CLOSE)


def test_factorise_of_zeros_is_the_identity_times_the_damping() -> None:
    damped, V, used, _ = objective.factorise(
        torch.zeros(5, 5, dtype=torch.float64), torch.arange(5), 0.01
    )
    eye = torch.eye(5, dtype=torch.float64)
    assert_close(damped, 0.01 * eye, **CLOSE)
    assert_close(V, 0.1 * eye, **CLOSE)
    assert used == 0.01


def test_singular_hessian_of_few_tokens_needs_no_more_damping_than_configured() -> None:
    H = case(K=30, T=4).H.float()
    assert objective.factorise(H, torch.arange(30), 0.01)[2] == 0.01


# Eigenvalues 1 ± b: 1 − b + λ is positive for the first of the λ's beyond b − 1.
@pytest.mark.parametrize(
    ("b", "damping", "used"),
    [(1.05, 0.01, 0.1), (1.5, 0.01, 1.0), (1.5, 0.3, 1.0), (1.05, 0.001, 0.1)],
    ids=str,
)
def test_more_damping_is_named(b: float, damping: float, used: float) -> None:
    H = torch.tensor([[1.0, b], [b, 1.0]], dtype=torch.float64)
    with pytest.warns(
        DampingWarning,
        match=rf"mlp\.up: damping was raised from {damping:g} to {used:g} to factorise",
    ):
        damped, V, found, ridge = objective.factorise(H, torch.arange(2), damping, "mlp.up")
    assert found == pytest.approx(used, rel=1e-12)
    assert float(ridge) == pytest.approx(used, rel=1e-12)
    assert_close(damped, oracle.damped(H, used), **CLOSE)
    assert_close(V @ V.T, damped, **CLOSE)


@pytest.mark.parametrize(
    "H",
    [
        pytest.param(-5 * torch.eye(3), id="negative-definite"),
        pytest.param(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), id="indefinite"),
        pytest.param(torch.tensor([[torch.inf, 0.0], [0.0, 1.0]]), id="infinite"),
        pytest.param(torch.full((2, 2), torch.nan), id="nan"),
    ],
)
def test_hopeless_hessian_is_an_error(H: Tensor) -> None:
    with pytest.raises(
        SingularHessianError,
        match=r"mlp\.up: the Hessian is not positive definite even with damping 1;",
    ):
        objective.factorise(H, torch.arange(len(H)), 0.01, "mlp.up")


# ---- shift_target ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0], ids=lambda s: f"strength={s}")
@pytest.mark.parametrize("order", ORDERS)
def test_shifted_target_equals_the_oracle(order: str, strength: float) -> None:
    c = case()
    chosen = orders(c.H)[order]
    damped, V, *_ = objective.factorise(c.H, chosen, 0.01)
    shifted = objective.shift_target(c.W, c.R, V, chosen, strength)
    assert_close(shifted, oracle.shift_target(c.W, damped, c.R, strength), **CLOSE)


@pytest.mark.parametrize(
    "corrupt",
    [lambda R: R.T, lambda R: -R, lambda R: R.roll(1, 0)],
    ids=["transposed", "negated", "rolled"],
)
def test_shifted_target_differs_when_the_deviation_is_corrupted(corrupt) -> None:
    c = case()
    order = orders(c.H)["random"]
    damped, V, *_ = objective.factorise(c.H, order, 0.01)
    shifted = objective.shift_target(c.W, c.R, V, order, 1.0)
    with pytest.raises(AssertionError):
        assert_close(shifted, oracle.shift_target(c.W, damped, corrupt(c.R), 1.0), **CLOSE)


def test_shifted_target_differs_when_the_order_is_reversed() -> None:
    c = case()
    order = orders(c.H)["random"]
    damped, V, *_ = objective.factorise(c.H, order, 0.01)
    shifted = objective.shift_target(c.W, c.R, V, order.flip(0), 1.0)
    with pytest.raises(AssertionError):
        assert_close(shifted, oracle.shift_target(c.W, damped, c.R, 1.0), **CLOSE)


# ---- the loss, by brute force ----------------------------------------------------------------------------------------


def loss_differences(c: Case, R: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between candidates of the library's loss at this R and of E‖Qx − Wx̃‖²."""
    order = torch.arange(c.H.shape[0])
    V = objective.factorise(c.H, order, 0.0)[1]
    target = objective.shift_target(c.W, R, V, order, 1.0)
    candidates = [c.W, torch.zeros_like(c.W), c.W.round(), c.W.roll(1, dims=1)]
    library = [float(objective.squared_error(Q - target, c.H).sum()) for Q in candidates]
    brute = [oracle.brute_force_loss(Q, c.W, c.X, c.X_ref) for Q in candidates]
    return tuple(
        torch.tensor([b - a for a, b in pairwise(losses)], dtype=torch.float64)
        for losses in (library, brute)
    )


def test_loss_is_the_mean_squared_output_error_up_to_a_constant() -> None:
    c = case()
    assert_close(*loss_differences(c, c.R), **CLOSE)


@pytest.mark.parametrize(
    "corrupt", [lambda R: -R, lambda R: R.T, lambda R: 0 * R], ids=["negated", "transposed", "none"]
)
def test_loss_with_a_corrupted_deviation_is_another(corrupt) -> None:
    c = case()
    with pytest.raises(AssertionError):
        assert_close(*loss_differences(c, corrupt(c.R)), **CLOSE)


def test_squared_error_is_a_mean_over_tokens_for_every_row() -> None:
    c = case()
    D = c.W - c.W.round()
    expected = [oracle.brute_force_loss(d[None], torch.zeros_like(d[None]), c.X, c.X) for d in D]
    assert_close(
        objective.squared_error(D, c.H), torch.tensor(expected, dtype=torch.float64), **CLOSE
    )


# ---- build -----------------------------------------------------------------------------------------------------------

# float32: K products, each rounded by 2^-24, amplified by the condition of the damped H (below 60), with W' of up to 3:
# 9 · 2^-24 · 60 · 3 ≈ 1e-4.
FLOAT32 = {"rtol": 0, "atol": 1e-4}


@pytest.mark.parametrize(
    ("deviation", "in_grid", "in_refine"),
    [("target", True, True), ("refine", False, True), ("none", False, False)],
)
def test_build_puts_the_deviation_where_the_configuration_says(
    deviation: str, in_grid: bool, in_refine: bool
) -> None:
    c = case()
    problem = objective.build(
        c.W, c.statistics, QuantConfig(deviation=deviation, deviation_strength=0.5)
    )
    shifted = oracle.shift_target(c.W, oracle.damped(c.H, 0.01), c.R, 0.5)
    assert torch.linalg.cond(oracle.damped(c.H, 0.01)) < 60
    assert (shifted - c.W).abs().max() > 0.01  # a hundred times what the comparisons below let pass
    assert_close(problem.grid_target.double(), shifted if in_grid else c.W, **FLOAT32)
    assert_close(problem.refine_target.double(), shifted if in_refine else c.W, **FLOAT32)
    assert torch.equal(problem.weight, c.W.float())


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_build_leaves_the_target_of_the_baselines_alone(method: str) -> None:
    c = case()
    problem = objective.build(c.W, c.statistics, QuantConfig(method=method))
    assert torch.equal(problem.grid_target, c.W.float())
    assert torch.equal(problem.refine_target, c.W.float())


def test_build_divides_by_the_count_and_damps() -> None:
    c = case()
    problem = objective.build(c.W, c.statistics, QuantConfig(damping=0.1))
    assert problem.hessian.dtype == torch.float32
    assert_close(problem.hessian.double(), oracle.damped(c.H, 0.1), rtol=2**-22, atol=2**-22)
    assert problem.damping == 0.1
    assert_close(problem.ridge.double(), 0.1 * c.H.diagonal().mean(), rtol=2**-20, atol=0)


def test_build_processes_columns_by_descending_diagonal_if_asked() -> None:
    c = case()
    ordered = objective.build(c.W, c.statistics, QuantConfig(act_order=True)).order
    assert (c.H.diagonal()[ordered].diff() <= 0).all()
    assert torch.equal(
        objective.build(c.W, c.statistics, QuantConfig(act_order=False)).order, torch.arange(9)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_build_takes_weights_of_any_float_dtype(dtype: torch.dtype) -> None:
    c = case()
    weight = c.W.to(dtype)
    assert torch.equal(objective.build(weight, c.statistics, QuantConfig()).weight, weight.float())


def test_build_takes_a_count_of_one_element() -> None:
    c = case()
    statistics = LayerStatistics(c.statistics.hessian, torch.tensor([60]), c.statistics.deviation)
    expected = objective.build(c.W, c.statistics, QuantConfig())
    assert torch.equal(objective.build(c.W, statistics, QuantConfig()).hessian, expected.hessian)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_build_takes_a_count_on_the_host() -> None:
    c = case()
    statistics = LayerStatistics(c.H.cuda(), torch.tensor(1))
    assert objective.build(c.W.cuda(), statistics, QuantConfig()).hessian.is_cuda


def test_build_modifies_nothing() -> None:
    c = case()
    statistics, weight = c.statistics, c.W.float()
    tensors = (weight, statistics.hessian, statistics.deviation, statistics.count)
    kept = [tensor.clone() for tensor in tensors]
    objective.build(weight, statistics, QuantConfig())
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_build_names_weights_that_are_no_numbers(value: float) -> None:
    c = case()
    c.W[1, 2] = c.W[0, 0] = value
    with pytest.raises(
        LayerError, match=r"mlp\.up: 2 of its weights are NaN or inf; repair the checkpoint, or add"
    ):
        objective.build(c.W, c.statistics, QuantConfig(), "mlp.up")


def test_build_names_weights_beyond_float32() -> None:
    c = case()
    c.W[0, 0] = 1e300
    with pytest.raises(LayerError, match="1 of its weights are NaN or inf"):
        objective.build(c.W, c.statistics, QuantConfig())


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["H", "R"])
def test_build_names_statistics_that_are_no_numbers(where: str, value: float) -> None:
    c = case()
    getattr(c, where)[1, 2] = value
    with pytest.raises(
        CalibrationError,
        match=r"mlp\.up: NaN or inf in its input statistics; look at the calibration data",
    ):
        objective.build(c.W, c.statistics, QuantConfig(), "mlp.up")


@pytest.mark.parametrize("with_nan", [False, True], ids=["zeros", "nan"])
def test_build_names_statistics_of_no_tokens(with_nan: bool) -> None:
    H = torch.full((9, 9), torch.nan if with_nan else 0.0)
    with pytest.raises(
        CalibrationError,
        match=r"mlp\.up: its statistics hold no tokens; run calibration data through it",
    ):
        objective.build(case().W, LayerStatistics(H, torch.tensor(0)), QuantConfig(), "mlp.up")


@pytest.mark.parametrize("shape", [(4, 8), (9,), (2, 4, 9)], ids=str)
def test_build_names_a_weight_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        LayerError,
        match=r"mlp\.up: weight has shape .* statistics are for 9 columns; give \(N, 9\)",
    ):
        objective.build(torch.ones(shape), case().statistics, QuantConfig(), "mlp.up")


# ---- blocks ----------------------------------------------------------------------------------------------------------

B = 3


def block_cases(K: int = 9, N: int = 4, blocks: int = B) -> list[Case]:
    """A problem for every block, with inputs of different size."""
    return [
        c._replace(X=2.0**b * c.X, X_ref=2.0**b * c.X_ref, H=4.0**b * c.H, R=4.0**b * c.R)
        for b, c in enumerate(case(K, N, seed=seed) for seed in range(blocks))
    ]


def stacked(cases: list[Case]) -> tuple[Tensor, LayerStatistics]:
    H, R, tokens = (
        torch.stack([c.H for c in cases]),
        torch.stack([c.R for c in cases]),
        len(cases[0].X),
    )
    return torch.cat([c.W for c in cases]), LayerStatistics(
        tokens * H, torch.tensor(tokens), tokens * R
    )


def block_orders(cases: list[Case]) -> Tensor:
    return torch.stack([orders(c.H)["descending"] for c in cases])


@pytest.mark.parametrize("elements", [1, 9 * 9, 2 * 9 * 9, 10**6], ids=lambda e: f"chunk={e}")
def test_every_block_is_damped_and_factorised_for_itself(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_CHUNK_ELEMENTS", elements)
    cases = block_cases()
    H, order = torch.stack([c.H for c in cases]), block_orders(cases)
    damped, V, used, ridge = objective.factorise(H, order, 0.01)
    assert used == 0.01
    for b, c in enumerate(cases):
        expected = oracle.damped(c.H, 0.01)
        assert_close(damped[b], expected, **CLOSE)
        assert_close(V[b] @ V[b].T, expected[order[b]][:, order[b]], **CLOSE)
        assert torch.equal(V[b], V[b].triu())
        assert_close(ridge[b], 0.01 * c.H.diagonal().mean(), **CLOSE)


@pytest.mark.parametrize("K", [1, 2, 40, 129, 260], ids=lambda K: f"K={K}")
def test_blocks_have_the_factors_that_they_have_alone(K: int) -> None:
    cases = block_cases(K)
    H, order = torch.stack([c.H for c in cases]), block_orders(cases)
    V = objective.factorise(H, order, 0.01)[1]
    alone = [
        objective.factorise(c.H, chosen, 0.01)[1] for c, chosen in zip(cases, order, strict=True)
    ]
    for b, expected in enumerate(alone):
        assert_close(V[b], expected, **CLOSE)
        with pytest.raises(AssertionError):
            assert_close(V[b], alone[b - 1], **CLOSE)


def test_factors_differ_when_the_orders_are_those_of_other_blocks() -> None:
    cases = block_cases()
    H, order = torch.stack([c.H for c in cases]), block_orders(cases)
    assert not torch.equal(order, order.roll(1, 0))
    with pytest.raises(AssertionError):
        assert_close(
            objective.factorise(H, order.roll(1, 0), 0.01)[1],
            objective.factorise(H, order, 0.01)[1],
            **CLOSE,
        )


def test_block_never_seen_is_the_identity_times_the_damping_and_leaves_the_others_alone() -> None:
    H = torch.stack([c.H for c in block_cases(K=5)])
    H[1] = 0
    damped, V, used, ridge = objective.factorise(H, torch.arange(5).expand(B, 5), 0.01)
    eye = torch.eye(5, dtype=torch.float64)
    assert_close(damped[1], 0.01 * eye, **CLOSE)
    assert_close(V[1], 0.1 * eye, **CLOSE)
    assert_close(damped[2], oracle.damped(H[2], 0.01), **CLOSE)
    assert float(ridge[1]) == used == 0.01


def needing(*values: float) -> Tensor:
    """A block for each b, with eigenvalues 1 ± b: 1 − b + λ is positive for the first λ beyond b − 1."""
    return torch.stack([torch.tensor([[1.0, b], [b, 1.0]], dtype=torch.float64) for b in values])


def test_more_damping_is_given_to_the_blocks_that_need_it_and_named() -> None:
    H = needing(0.5, 1.05, 0.0, 1.5)
    order = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])
    message = r"mlp\.up: damping was raised from 0\.01 to 1 to factorise the Hessian of 2 of its 4 blocks; more"
    with pytest.warns(DampingWarning, match=message):
        damped, V, used, ridge = objective.factorise(H, order, 0.01, "mlp.up")
    assert used == pytest.approx(1.0, rel=1e-12)
    expected = torch.tensor([0.01, 0.1, 0.01, 1.0], dtype=torch.float64)
    assert_close(ridge, expected, **CLOSE)
    for b, damping in enumerate(expected.tolist()):
        assert_close(damped[b], oracle.damped(H[b], damping), **CLOSE)
        assert_close(V[b] @ V[b].T, damped[b][order[b]][:, order[b]], **CLOSE)


def test_hopeless_block_is_an_error_that_says_how_many() -> None:
    with pytest.raises(
        SingularHessianError,
        match=r"mlp\.up: the Hessian of 2 of its 3 blocks is not positive definite even with",
    ):
        objective.factorise(needing(3.0, 0.5, 3.0), torch.arange(2).expand(3, 2), 0.01, "mlp.up")


def block_targets(cases: list[Case], Rs: list[Tensor], strength: float) -> Tensor:
    return torch.cat(
        [
            oracle.shift_target(c.W, oracle.damped(c.H, 0.01), R, strength)
            for c, R in zip(cases, Rs, strict=True)
        ]
    )


def shifted_blocks(cases: list[Case], strength: float) -> Tensor:
    W, S = stacked(cases)
    order = block_orders(cases)
    V = objective.factorise(S.hessian / S.count, order, 0.01)[1]
    return objective.shift_target(W, S.deviation / S.count, V, order, strength)


@pytest.mark.parametrize("strength", [0.25, 1.0], ids=lambda s: f"strength={s}")
@pytest.mark.parametrize("N", [1, 4], ids=lambda N: f"n={N}")
def test_shifted_target_of_blocks_equals_the_oracle(N: int, strength: float) -> None:
    cases = block_cases(N=N)
    expected = block_targets(cases, [c.R for c in cases], strength)
    assert_close(shifted_blocks(cases, strength), expected, **CLOSE)


CORRUPT_BLOCKS = {
    "of other blocks": lambda Rs: Rs[1:] + Rs[:1],
    "transposed": lambda Rs: [R.T for R in Rs],
    "of one block": lambda Rs: [Rs[0]] * len(Rs),
}


@pytest.mark.parametrize("corrupt", CORRUPT_BLOCKS.values(), ids=CORRUPT_BLOCKS)
def test_shifted_target_of_blocks_differs_when_the_deviation_is_corrupted(corrupt) -> None:
    cases = block_cases()
    with pytest.raises(AssertionError):
        assert_close(
            shifted_blocks(cases, 1.0),
            block_targets(cases, corrupt([c.R for c in cases]), 1.0),
            **CLOSE,
        )


def test_squared_error_of_blocks_is_that_of_each() -> None:
    cases = block_cases()
    W, S = stacked(cases)
    D, H = W - W.round(), S.hessian / S.count
    expected = torch.cat([objective.squared_error(c.W - c.W.round(), c.H) for c in cases])
    assert_close(objective.squared_error(D, H), expected, **CLOSE)
    with pytest.raises(AssertionError):
        assert_close(objective.squared_error(D, H.roll(1, 0)), expected, **CLOSE)


def test_build_orders_the_columns_of_every_block_for_itself() -> None:
    cases = block_cases()
    W, S = stacked(cases)
    assert torch.equal(
        objective.build(W, S, QuantConfig(act_order=True)).order, block_orders(cases)
    )
    plain = objective.build(W, S, QuantConfig(act_order=False)).order
    assert torch.equal(plain, torch.arange(9).expand(B, 9))


def test_build_shifts_the_target_of_every_block_by_its_own_deviation() -> None:
    cases = block_cases()
    W, S = stacked(cases)
    problem = objective.build(W, S, QuantConfig(deviation="target", deviation_strength=0.5))
    expected = block_targets(cases, [c.R for c in cases], 0.5)
    condition = max(float(torch.linalg.cond(oracle.damped(c.H, 0.01))) for c in cases)
    tolerance = 9 * 2**-24 * condition * float(expected.abs().max())  # as for FLOAT32
    assert (expected - W).abs().max() > 10 * tolerance
    assert_close(problem.grid_target.double(), expected, rtol=0, atol=tolerance)
    assert problem.hessian.shape == problem.factor.shape == (B, 9, 9)


@pytest.mark.parametrize("where", ["H", "R"])
def test_build_names_blocks_that_are_no_numbers(where: str) -> None:
    cases = block_cases()
    getattr(cases[2], where)[1, 2] = torch.nan
    W, S = stacked(cases)
    with pytest.raises(CalibrationError, match=r"mlp\.up: NaN or inf in its input statistics"):
        objective.build(W, S, QuantConfig(), "mlp.up")


def test_build_names_rows_that_are_no_blocks() -> None:
    W, S = stacked(block_cases())
    with pytest.raises(
        LayerError, match=r"mlp\.up: weight has 11 rows, its statistics 3 blocks; .* multiple of 3"
    ):
        objective.build(W[:-1], S, QuantConfig(), "mlp.up")


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-12, 1.0])
def test_inputs_however_small_do_not_fail(size):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(512, 16, generator=generator) * size,
        torch.randn(8, 16, generator=generator),
    )
    statistics = LayerStatistics(x.T @ x, torch.tensor(512))
    assert torch.isfinite(objective.build(weight, statistics, QuantConfig(), "layer").factor).all()


def test_finite_values_whose_sum_overflows_are_no_offence() -> None:
    weight, H = torch.full((4, 8), 3e38), torch.full((8, 8), 3e38)
    assert torch.isinf(weight.sum())
    objective.check_values(weight, LayerStatistics(H, torch.tensor(9), H), "layer")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_counted_and_found_in_either_statistic(value: float) -> None:
    weight, H = torch.ones(4, 8), torch.eye(8)
    bad = torch.ones(4, 8)
    bad[2, 3], bad[0, 0], bad[0, 1] = value, torch.inf, -torch.inf
    spoiled = H.clone()
    spoiled[1, 2] = value
    with pytest.raises(LayerError, match="3 of its weights are NaN or inf"):
        objective.check_values(bad, LayerStatistics(H, torch.tensor(9)), "layer")
    for statistics in (
        LayerStatistics(spoiled, torch.tensor(9), H),
        LayerStatistics(H, torch.tensor(9), spoiled),
    ):
        with pytest.raises(CalibrationError, match="NaN or inf in its input statistics"):
            objective.check_values(weight, statistics, "layer")
