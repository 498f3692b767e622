"""Stage 1: never above a scan by loops over the same clipping factors, whatever else is tried."""

from collections.abc import Iterable

import pytest
import torch
from oracles import grid as oracle_grid
from oracles import objective as oracle_objective
from oracles import stage1 as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers import grid
from tsq_layers.solver import objective, stage1

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
WIDTHS = range(1, 9)
KINDS = [pytest.param(True, id="symmetric"), pytest.param(False, id="asymmetric")]
N, K, GROUP = 3, 11, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_hessian(columns: int = K, seed: int = 0) -> Tensor:
    """A damped H: that of mildly correlated inputs."""
    X = normal(4 * columns, columns, seed=seed) @ (torch.eye(columns, dtype=torch.float64) + 0.3 * normal(columns, columns, seed=seed + 1))
    return oracle_objective.damped(X.T @ X / len(X), 0.01)


def reached(w: Tensor, H: Tensor, s: float, z: int, bits: int, symmetric: bool, factors: Iterable[float]) -> float:
    """Least group loss at scale s and zero point z of the integers that rounding at any clipped range gives.

    Stage 1 judges a scale by the integers that it belongs to, which need not be the nearest ones at that scale.
    """
    full, _ = oracle_grid.minmax_group(w.tolist(), bits, symmetric)
    tried = [full * factor for factor in [*factors, *torch.linspace(0.2, 1.3, 200).tolist()]]
    t = torch.tensor(tried, dtype=torch.float64).unsqueeze(1)
    n = ((w / t).round() + z).clamp(0, 2**bits - 1) - z
    D = s * n - w
    return float(((D @ H) * D).sum(1).min())


def compare(weight: Tensor, metric: Tensor, fitted: tuple[Tensor, Tensor], bits: int, symmetric: bool, factors: list[float]) -> Tensor:
    """Loss reached less the oracle's, relative to wᵀMw, of every group (N, G)."""
    scales, zeros = fitted
    groups = oracle_grid.group_columns(weight.shape[1], GROUP)
    excess = torch.empty(len(weight), len(groups), dtype=torch.float64)
    for r, w in enumerate(weight):
        for i, columns in enumerate(groups):
            M = metric[columns][:, columns]
            found = reached(w[columns], M, float(scales[r, i]), int(zeros[r, i]), bits, symmetric, factors)
            least = oracle.scan_with_refit(w[columns], M, bits, symmetric, factors)[2]
            excess[r, i] = (found - least) / float(w[columns] @ M @ w[columns])
    return excess


def coarse(bits: int) -> list[float]:
    return stage1.clip_factors(bits, stage1._CLIP_COUNT)


def fine(bits: int) -> list[float]:
    return stage1.clip_factors(bits, stage1._WEIGHT_CLIP_COUNT)


# ---- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_grids_of_blocks_lose_no_more_than_the_oracle(bits: int, symmetric: bool) -> None:
    W, H = normal(N, K, seed=bits), some_hessian(seed=bits)
    fitted = stage1.fit_grids(W, H, bits, GROUP, symmetric)
    assert (compare(W, H, fitted, bits, symmetric, coarse(bits)) <= 1e-10).all()


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_grids_of_a_diagonal_lose_no_more_than_the_oracle(bits: int, symmetric: bool) -> None:
    W, metric = normal(N, K, seed=bits), normal(K, seed=20).square() + 0.1
    fitted = stage1.fit_grids(W, metric, bits, GROUP, symmetric)
    assert (compare(W, metric.diag(), fitted, bits, symmetric, coarse(bits)) <= 1e-10).all()


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_weight_grids_lose_no_more_than_the_oracle(bits: int, symmetric: bool) -> None:
    W, eye = normal(N, K, seed=bits), torch.eye(K, dtype=torch.float64)
    fitted = stage1.weight_grids(W, bits, GROUP, symmetric)
    assert (compare(W, eye, fitted, bits, symmetric, fine(bits)) <= 1e-10).all()


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weight_grids_equal_the_oracle(bits: int, symmetric: bool) -> None:
    W, eye = normal(N, K, seed=bits), torch.eye(GROUP, dtype=torch.float64)
    scales, zeros = stage1.weight_grids(W, bits, GROUP, symmetric)
    for r, w in enumerate(W):
        for i, columns in enumerate(oracle_grid.group_columns(K, GROUP)):
            H = eye[: len(columns), : len(columns)]
            s, z, _ = oracle.scan_with_refit(w[columns], H, bits, symmetric, fine(bits))
            assert float(scales[r, i]) == pytest.approx(s, rel=1e-10)
            assert int(zeros[r, i]) == z


CORRUPTED = {
    "scales 10 % larger": lambda W, H, s, z: (W, H, 1.1 * s, z),
    "rows shifted": lambda W, H, s, z: (W, H, s.roll(1, 0), z.roll(1, 0)),
    "group borders shifted": lambda W, H, s, z: (W.roll(1, 1), H, s, z),
}


@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_corrupted_grids_lose_more_than_the_oracle(corrupt) -> None:
    W, H = normal(N, K), some_hessian()
    W_wrong, H_wrong, *fitted = corrupt(W, H, *stage1.fit_grids(W, H, 3, GROUP, False))
    assert (compare(W_wrong, H_wrong, fitted, 3, False, coarse(3)) > 1e-4).any()


def test_grids_under_a_corrupted_hessian_lose_more_than_the_oracle() -> None:
    # Weak correlations hardly move the best grids: take strong ones, and many rows.
    X = normal(200, K) @ (torch.eye(K, dtype=torch.float64) + normal(K, K, seed=1))
    W, H = normal(12, K), X.T @ X / 200
    fitted = stage1.fit_grids(W, H.roll((1, 1), dims=(0, 1)), 2, GROUP, False)
    assert (compare(W, H, fitted, 2, False, coarse(2)) > 1e-4).any()


# ---- the metric of error feedback ------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "as-is"])
def test_feedback_metric_is_what_later_columns_cannot_make_up_for(act_order: bool) -> None:
    H = some_hessian()
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(K)
    damped, factor, *_ = objective.factorise(H, order, 0.01)
    metric = stage1.feedback_metric(factor, order)
    for position, column in enumerate(order.tolist()):
        free = order[position:]  # this column, and those that are fixed after it
        residual = 1 / torch.linalg.inv(damped[free][:, free])[0, 0]
        assert_close(metric[column], residual, **CLOSE)


def test_feedback_metric_differs_when_the_order_is_reversed() -> None:
    H = some_hessian()
    order = H.diagonal().argsort(descending=True)
    factors = [objective.factorise(H, chosen, 0.01)[1] for chosen in (order, order.flip(0))]
    metrics = [stage1.feedback_metric(factor, chosen) for factor, chosen in zip(factors, (order, order.flip(0)), strict=True)]
    with pytest.raises(AssertionError):
        assert_close(*metrics, **CLOSE)


def test_feedback_metric_of_rounding_errors_is_the_layer_loss() -> None:
    # With E the errors of the working weights, W' − Q = E Ũ in processing order (see solver/gptq.py).
    H, D = some_hessian(), normal(N, K)
    order = H.diagonal().argsort(descending=True)
    damped, U, *_ = objective.factorise(H, order, 0.01)
    E = torch.linalg.solve_triangular(U / U.diagonal().unsqueeze(1), D[:, order], upper=True, left=False)
    loss = (E.square() * stage1.feedback_metric(U, order)[order]).sum(1)
    assert_close(loss, objective.squared_error(D, damped), **CLOSE)


# ---- properties ------------------------------------------------------------------------------------------------------


def fitted_with(W: Tensor, H: Tensor, bits: int, symmetric: bool, group_size: int = GROUP) -> list[tuple[Tensor, Tensor]]:
    """Grids of every way to fit them: blocks, diagonal, weights alone."""
    return [
        stage1.fit_grids(W, H, bits, group_size, symmetric),
        stage1.fit_grids(W, H.diagonal(), bits, group_size, symmetric),
        stage1.weight_grids(W, bits, group_size, symmetric),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_are_positive_and_zero_points_are_codes(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    W = normal(20, K, seed=bits).to(dtype)
    W[0], W[1, :GROUP], W[2], W[3] = 0, 0, W[2].abs(), -W[3].abs()
    for scales, zeros in fitted_with(W, some_hessian().to(dtype), bits, symmetric):
        assert scales.dtype == zeros.dtype == dtype
        assert scales.shape == zeros.shape == (20, 3)
        assert (torch.isfinite(scales) & (scales > 0)).all()
        assert torch.equal(zeros, zeros.round())
        assert ((zeros >= 0) & (zeros <= grid.code_max(bits))).all()
        if symmetric:
            assert (zeros == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_on_a_symmetric_grid_that_they_span_get_that_grid(bits: int) -> None:
    half = 2 ** (bits - 1)
    n = torch.tensor([[-half, half - 1, 1, 0], [half - 1, 0, -half, -1]], dtype=torch.float64)
    s = torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    for scales, _ in fitted_with(s * n, some_hessian(4), bits, True):
        assert_close(scales, s, **CLOSE)


@pytest.mark.parametrize("symmetric", KINDS)
def test_all_zero_weights_get_the_scale_one(symmetric: bool) -> None:
    for scales, _ in fitted_with(torch.zeros(N, K), some_hessian().float(), 3, symmetric):
        assert torch.equal(scales, torch.ones(N, 3))


@pytest.mark.parametrize("symmetric", KINDS)
def test_scaling_by_powers_of_two_scales_the_grids(symmetric: bool) -> None:
    W, H = normal(N, K), some_hessian()
    plain, scaled = fitted_with(W, H, 3, symmetric), fitted_with(8 * W, 2.0**-30 * H, 3, symmetric)
    for (scales, zeros), (scales_8, zeros_8) in zip(plain, scaled, strict=True):
        assert torch.equal(scales_8, 8 * scales)
        assert torch.equal(zeros_8, zeros)


def test_rows_are_independent() -> None:
    W, H = normal(10, K), some_hessian()
    p = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    for (scales, zeros), (scales_p, zeros_p) in zip(fitted_with(W, H, 3, False), fitted_with(W[p], H, 3, False), strict=True):
        assert_close(scales_p, scales[p], **CLOSE)
        assert torch.equal(zeros_p, zeros[p])


@pytest.mark.parametrize("elements", [1, K, 3 * K, 10**6], ids=lambda e: f"chunk={e}")
def test_chunks_do_not_change_the_grids(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = normal(10, K), some_hessian()
    expected = fitted_with(W, H, 3, False)
    monkeypatch.setattr(stage1, "_CHUNK_ELEMENTS", elements)
    for found, wanted in zip(fitted_with(W, H, 3, False), expected, strict=True):
        assert_close(found, wanted, **CLOSE)


def test_one_group_for_the_row_equals_a_group_wider_than_it() -> None:
    W, H = normal(N, K), some_hessian()
    for found, wanted in zip(fitted_with(W, H, 3, False, K), fitted_with(W, H, 3, False, 2 * K), strict=True):
        assert_close(found, wanted, **CLOSE)


def test_inputs_are_not_modified() -> None:
    W, H = normal(N, K), some_hessian()
    kept = W.clone(), H.clone()
    for group_size in (1, GROUP, K):
        fitted_with(W, H, 3, False, group_size)
    assert torch.equal(W, kept[0])
    assert torch.equal(H, kept[1])


@pytest.mark.parametrize(("columns", "group_size"), [(12, 4), (11, 4), (5, 5), (5, 8), (4, 1)])
def test_diagonal_blocks_are_those_of_the_groups(columns: int, group_size: int) -> None:
    H = some_hessian(columns)
    blocks = stage1.diagonal_blocks(H, group_size)
    groups = oracle_grid.group_columns(columns, group_size)
    assert blocks.shape == (len(groups), group_size, group_size)
    for block, members in zip(blocks, groups, strict=True):
        size = len(members)
        assert torch.equal(block[:size, :size], H[members][:, members])
        assert block[size:].count_nonzero() == block[:, size:].count_nonzero() == 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_clip_factors_fall_from_the_whole_range(bits: int) -> None:
    factors = stage1.clip_factors(bits, 7)
    assert factors[0] == 1
    assert len(factors) == 7
    assert all(a > b > 0 for a, b in zip(factors, factors[1:], strict=False))
