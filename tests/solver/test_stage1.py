"""Stage 1: the best of the candidates that it tries, by loops, whichever they are; and what holds for every grid."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import grid as oracle_grid
from oracles import objective as oracle_objective
from oracles import stage1 as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.numerics import grid
from tsq_layers.solver import problem as objective
from tsq_layers.solver import stage1

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
WIDTHS = range(1, 9)
KINDS = [pytest.param(True, id="symmetric"), pytest.param(False, id="asymmetric")]
N, K, GROUP = 3, 11, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_hessian(columns: int = K, seed: int = 0) -> Tensor:
    """A damped H: that of mildly correlated inputs."""
    X = normal(4 * columns, columns, seed=seed) @ (
        torch.eye(columns, dtype=torch.float64) + 0.3 * normal(columns, columns, seed=seed + 1)
    )
    H = X.T @ X / len(X)
    return oracle_objective.damped((H + H.T) / 2, 0.01)


Tried = list[tuple[Tensor, Tensor]]


def fit_and_record(
    monkeypatch: pytest.MonkeyPatch, W: Tensor, metric: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tried]:
    """Grids, and every candidate (scales, zero points), each (N, G), that was tried for them."""
    tried: Tried = []
    candidates = stage1._candidates

    def recorded(*args: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for scale, zero in candidates(*args, **options):
            tried.append((scale.T, zero.T))
            yield scale, zero

    with monkeypatch.context() as patch:
        patch.setattr(stage1, "_candidates", recorded)
        scales, zeros = stage1.fit_grids(W, metric, bits, GROUP, symmetric)
    return scales, zeros, tried


def scan(
    w: Tensor, M: Tensor, candidates: list[tuple[float, int]], bits: int
) -> tuple[float, int, float]:
    """Best (scale, zero, loss) of all candidates, each with the closed-form scale of its integers, by loops."""
    best = (math.nan, 0, math.inf)
    for s, z in candidates:
        n = oracle.round_group(w, s, z, bits)
        refitted = oracle.best_scale(w, n, M)
        if refitted > 0:
            best = min(
                best,
                (refitted, z, oracle.group_loss(w, n, refitted, M)),
                key=lambda found: found[2],
            )
    return best


def compare(W: Tensor, M: Tensor, scales: Tensor, zeros: Tensor, tried: Tried, bits: int) -> None:
    """Assert that every group has the scale of the best candidate; its loss, should two be equally good."""
    for r, w in enumerate(W):
        for i, columns in enumerate(oracle_grid.group_columns(W.shape[1], GROUP)):
            block = M[columns][:, columns]
            candidates = [(float(s[r, i]), int(z[r, i])) for s, z in tried]
            expected = scan(w[columns], block, candidates, bits)
            own = [(s, z) for s, z in candidates if z == int(zeros[r, i])]
            losses = [
                oracle.group_loss(
                    w[columns],
                    oracle.round_group(w[columns], s, z, bits),
                    float(scales[r, i]),
                    block,
                )
                for s, z in own
            ]
            assert min(losses) <= expected[2] + 1e-10 * float(w[columns] @ block @ w[columns])


def coarse(bits: int) -> list[float]:
    return stage1.clip_factors(bits, stage1._CLIP_COUNT)


def fine(bits: int) -> list[float]:
    return stage1.clip_factors(bits, stage1._WEIGHT_CLIP_COUNT)


# ---- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_grids_of_blocks_are_the_best_of_those_tried(
    bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, H = normal(N, K, seed=bits), some_hessian(seed=bits)
    compare(W, H, *fit_and_record(monkeypatch, W, H, bits, symmetric), bits)


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_grids_of_a_diagonal_are_the_best_of_those_tried(
    bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, metric = normal(N, K, seed=bits), normal(K, seed=20).square() + 0.1
    compare(W, metric.diag(), *fit_and_record(monkeypatch, W, metric, bits, symmetric), bits)


CORRUPTED = {
    "scales 10 % larger": lambda W, H, s, z, tried: (W, H, 1.1 * s, z, tried),
    "rows shifted": lambda W, H, s, z, tried: (W, H, s.roll(1, 0), z, tried),
    "group borders shifted": lambda W, H, s, z, tried: (W.roll(1, 1), H, s, z, tried),
    "columns of H shifted": lambda W, H, s, z, tried: (W, H.roll((1, 1), (0, 1)), s, z, tried),
    "the worst of those tried": lambda W, H, s, z, tried: (W, H, *tried[-1], tried),
}


@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_corrupted_grids_are_not_the_best_of_those_tried(
    corrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, H = normal(12, K), some_hessian()
    with pytest.raises(AssertionError):
        compare(*corrupt(W, H, *fit_and_record(monkeypatch, W, H, 3, False)), 3)


def fitted_and_expected(W: Tensor, bits: int, symmetric: bool) -> list[Tensor]:
    """Scales and zero points of `weight_grids`, and the oracle's over the same clipping factors."""
    found = stage1.weight_grids(W, bits, GROUP, symmetric)
    scales, zeros = torch.zeros_like(found[0]), torch.zeros_like(found[1])
    for r, w in enumerate(W):
        for i, columns in enumerate(oracle_grid.group_columns(K, GROUP)):
            eye = torch.eye(len(columns), dtype=torch.float64)
            scales[r, i], zeros[r, i], loss = oracle.scan_with_refit(
                w[columns], eye, bits, symmetric, fine(bits)
            )
            if (
                loss > (1 - 1e-12) * w[columns].square().sum()
            ):  # positive weights on a grid of 0 and −s: every scale is as good
                scales[r, i] = found[0][r, i]
    return [*found, scales, zeros]


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_weight_grids_equal_the_oracle(bits: int, symmetric: bool) -> None:
    scales, zeros, expected_scales, expected_zeros = fitted_and_expected(
        normal(N, K, seed=bits), bits, symmetric
    )
    assert_close(scales, expected_scales, **CLOSE)
    assert torch.equal(zeros, expected_zeros)


def test_weight_grids_differ_from_the_oracle_when_group_borders_are_shifted() -> None:
    W = normal(N, K)
    found, expected = (
        fitted_and_expected(W, 3, False)[0],
        fitted_and_expected(W.roll(1, 1), 3, False)[2],
    )
    with pytest.raises(AssertionError):
        assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_grids_lose_no_more_than_the_oracle(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, H = normal(N, K, seed=bits), some_hessian(seed=bits)
    tried = fit_and_record(monkeypatch, W, H, bits, True)[2]
    for r, w in enumerate(W):
        for i, columns in enumerate(oracle_grid.group_columns(K, GROUP)):
            block = H[columns][:, columns]
            least = scan(
                w[columns], block, [(float(s[r, i]), int(z[r, i])) for s, z in tried], bits
            )[2]
            expected = oracle.scan_with_refit(w[columns], block, bits, True, coarse(bits))[2]
            signal = float(w[columns] @ block @ w[columns])
            assert (
                min(least, signal) <= expected + 1e-10 * signal
            )  # every integer 0 loses the signal


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize(
    "bits", range(1, 6)
)  # beyond, clipping gains nothing that could be compared
def test_grids_lose_less_than_minmax_grids(bits: int, symmetric: bool) -> None:
    W, H = normal(200, 32, seed=bits), some_hessian(32, seed=bits)
    blocks = torch.block_diag(*stage1.diagonal_blocks(H, 16))

    def loss(scales: Tensor, zeros: Tensor) -> float:
        values = grid.dequantize(
            grid.quantize(W, scales, zeros, bits, 16), scales, zeros, 16, torch.float64
        )
        return float(objective.squared_error(values - W, blocks).sum())

    assert loss(*stage1.fit_grids(W, H, bits, 16, symmetric)) < loss(
        *grid.minmax(W, bits, 16, symmetric)
    )


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
    metrics = [
        stage1.feedback_metric(factor, chosen)
        for factor, chosen in zip(factors, (order, order.flip(0)), strict=True)
    ]
    with pytest.raises(AssertionError):
        assert_close(*metrics, **CLOSE)


def test_feedback_metric_of_rounding_errors_is_the_layer_loss() -> None:
    # With E the errors of the working weights, E diag(V) = (W' − Q) V in processing order (see solver/gptq.py).
    H, D = some_hessian(), normal(N, K)
    order = H.diagonal().argsort(descending=True)
    damped, V, *_ = objective.factorise(H, order, 0.01)
    E = D[:, order] @ V / V.diagonal()
    loss = (E.square() * stage1.feedback_metric(V, order)[order]).sum(1)
    assert_close(loss, objective.squared_error(D, damped), **CLOSE)


# ---- properties ------------------------------------------------------------------------------------------------------


def fitted_with(
    W: Tensor, H: Tensor, bits: int, symmetric: bool, group_size: int = GROUP
) -> list[tuple[Tensor, Tensor]]:
    """Grids of every way to fit them: blocks, diagonal, weights alone."""
    return [
        stage1.fit_grids(W, H, bits, group_size, symmetric),
        stage1.fit_grids(W, H.diagonal(), bits, group_size, symmetric),
        stage1.weight_grids(W, bits, group_size, symmetric),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_are_positive_and_zero_points_are_codes(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
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
    for (scales, zeros), (scales_p, zeros_p) in zip(
        fitted_with(W, H, 3, False), fitted_with(W[p], H, 3, False), strict=True
    ):
        assert_close(scales_p, scales[p], **CLOSE)
        assert torch.equal(zeros_p, zeros[p])


@pytest.mark.parametrize("elements", [1, K, 3 * K, 10**6], ids=lambda e: f"chunk={e}")
def test_chunks_do_not_change_the_grids(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = normal(10, K), some_hessian()
    expected = fitted_with(W, H, 3, False)
    monkeypatch.setattr(stage1, "SCAN_WEIGHTS", elements)
    for found, wanted in zip(fitted_with(W, H, 3, False), expected, strict=True):
        assert_close(found, wanted, **CLOSE)


def test_one_group_for_the_row_equals_a_group_wider_than_it() -> None:
    W, H = normal(N, K), some_hessian()
    for found, wanted in zip(
        fitted_with(W, H, 3, False, K), fitted_with(W, H, 3, False, 2 * K), strict=True
    ):
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
def test_clip_factors_fall(bits: int) -> None:
    factors = stage1.clip_factors(bits, 7)
    assert len(factors) == 7
    assert 1 >= factors[0]
    assert all(a > b > 0 for a, b in pairwise(factors))


# ---- blocks ----------------------------------------------------------------------------------------------------------


def block_metrics(B: int, kind: str) -> Tensor:
    """A metric for every block: (B, K, K), or (B, 1, K) if they are diagonals."""
    H = torch.stack([2.0**b * some_hessian(seed=b) for b in range(B)])
    return H if kind == "matrix" else H.diagonal(dim1=1, dim2=2).unsqueeze(1).contiguous()


def fitted_alone(
    W: Tensor, metrics: Tensor, bits: int, symmetric: bool, group_size: int
) -> list[Tensor]:
    n = len(W) // len(metrics)
    fits = [
        stage1.fit_grids(
            W[b * n : (b + 1) * n],
            metric if len(metric) > 1 else metric[0],
            bits,
            group_size,
            symmetric,
        )
        for b, metric in enumerate(metrics)
    ]
    return [torch.cat(part) for part in zip(*fits, strict=True)]


# B = K: a diagonal for each of eleven blocks is no matrix.
@pytest.mark.parametrize(("B", "n"), [(3, 4), (K, 1), (1, 5)], ids=str)
@pytest.mark.parametrize("kind", ["matrix", "diagonal"])
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("group_size", [1, GROUP, K, 2 * K], ids=lambda g: f"g={g}")
def test_grids_of_blocks_of_rows_are_those_of_each(
    group_size: int, symmetric: bool, kind: str, B: int, n: int
) -> None:
    W, metrics = normal(B * n, K), block_metrics(B, kind)
    found = stage1.fit_grids(W, metrics, 3, group_size, symmetric)
    expected = fitted_alone(W, metrics, 3, symmetric, group_size)
    assert_close(found[0], expected[0], **CLOSE)
    assert torch.equal(found[1], expected[1])
    assert found[0].shape == (B * n, grid.group_count(K, group_size))


@pytest.mark.parametrize("kind", ["matrix", "diagonal"])
def test_grids_of_blocks_differ_when_the_metrics_are_those_of_other_blocks(kind: str) -> None:
    W, metrics = normal(12, K), block_metrics(3, kind)
    found = stage1.fit_grids(W, metrics, 3, GROUP, False)[0]
    for wrong in (metrics.roll(1, 0), metrics[:1].expand_as(metrics)):
        with pytest.raises(AssertionError):
            assert_close(found, fitted_alone(W, wrong, 3, False, GROUP)[0], **CLOSE)


@pytest.mark.parametrize("kind", ["matrix", "diagonal"])
@pytest.mark.parametrize("elements", [1, 2 * K, 5 * K, 9 * K, 10**6], ids=lambda e: f"chunk={e}")
def test_chunks_do_not_change_the_grids_of_blocks(
    elements: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, metrics = normal(15, K), block_metrics(5, kind)
    expected = stage1.fit_grids(W, metrics, 3, GROUP, False)
    monkeypatch.setattr(stage1, "SCAN_WEIGHTS", elements)
    for found, wanted in zip(stage1.fit_grids(W, metrics, 3, GROUP, False), expected, strict=True):
        assert_close(found, wanted, **CLOSE)


def test_feedback_metric_of_blocks_is_that_of_each() -> None:
    H = block_metrics(3, "matrix")
    order = H.diagonal(dim1=1, dim2=2).argsort(descending=True)
    factor = objective.factorise(H, order, 0.01)[1]
    found = stage1.feedback_metric(factor, order)
    expected = [stage1.feedback_metric(*each) for each in zip(factor, order, strict=True)]
    assert found.shape == (3, 1, K)
    assert torch.equal(found[:, 0], torch.stack(expected))
    assert not torch.equal(found[:, 0], torch.stack(expected).roll(1, 0))
    assert not torch.equal(stage1.feedback_metric(factor, order.roll(1, 0)), found)


@pytest.mark.parametrize(("columns", "group_size"), [(12, 4), (11, 4), (5, 8), (4, 1)])
def test_diagonal_blocks_of_many_are_those_of_each(columns: int, group_size: int) -> None:
    H = torch.stack([some_hessian(columns, seed=b) for b in range(3)])
    expected = torch.stack([stage1.diagonal_blocks(each, group_size) for each in H])
    assert torch.equal(stage1.diagonal_blocks(H, group_size), expected)
