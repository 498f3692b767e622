"""Self-checks that make the oracles trustworthy; each comparison has a companion that fails on corrupted input."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from oracles import gptq as oracle_gptq
from oracles import grid, objective, stage1, stage2
from torch import Tensor
from torch.testing import assert_close

BITS, GROUP = 3, 4
DAMPING = 0.01


class Problem(NamedTuple):
    """Rows N = 3, columns K = 10 in groups of 4, 4 and 2, tokens T = 40 with correlated inputs."""

    W: Tensor
    X: Tensor
    X_ref: Tensor
    H: Tensor
    R: Tensor
    scales: Tensor
    zeros: Tensor
    codes: Tensor

    @property
    def Q(self) -> Tensor:
        return grid.dequantize(self.codes, self.scales, self.zeros, GROUP)


@pytest.fixture
def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W = normal(3, 10)
    X_ref = normal(40, 10) @ (torch.eye(10, dtype=torch.float64) + 0.4 * normal(10, 10))
    X = X_ref + 0.3 * normal(40, 10) + 0.2 * X_ref.roll(1, dims=1)
    H, R = objective.statistics(X, X_ref)
    scales, zeros = grid.minmax_grid(W, BITS, GROUP, symmetric=False)
    codes = grid.quantize(W, scales, zeros, BITS, GROUP)
    return Problem(W, X, X_ref, H, R, scales, zeros, codes)


def candidates(p: Problem) -> list[Tensor]:
    """Weights whose losses are compared: the rounded ones, W, zero, and the rounded ones shifted by a column."""
    return [p.Q, p.W, torch.zeros_like(p.W), p.Q.roll(1, dims=1)]


def differences(losses: list[float]) -> Tensor:
    return torch.tensor([b - a for a, b in pairwise(losses)], dtype=torch.float64)


def close(a: Tensor | float, b: Tensor | float, rtol: float = 1e-10) -> None:
    assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=1e-12)


def not_close(a: Tensor | float, b: Tensor | float, rtol: float = 1e-10) -> None:
    with pytest.raises(AssertionError, match="not close"):
        close(a, b, rtol)


# ---------------------------------------------------------------- grid


def test_group_of_last_group_is_short() -> None:
    assert [grid.group_of(k, 4) for k in range(10)] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert grid.group_columns(10, 4)[-1] == [8, 9]


def test_code_of_rounds_half_to_even_and_clips() -> None:
    assert [grid.code_of(w, 1.0, 2, 3) for w in (0.5, 1.5, -0.5, -1.5, 9.0, -9.0)] == [
        2,
        4,
        2,
        0,
        7,
        0,
    ]
    assert grid.code_of(0.5, 1.0, 1, 3) == 1, "the zero point is added after rounding"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_of_dequantize_is_identity(problem: Problem, bits: int, symmetric: bool) -> None:
    scales, zeros = grid.minmax_grid(problem.W, bits, GROUP, symmetric)
    codes = grid.quantize(problem.W, scales, zeros, bits, GROUP)
    W_hat = grid.dequantize(codes, scales, zeros, GROUP)
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    assert torch.equal(grid.quantize(W_hat, scales, zeros, bits, GROUP), codes)
    assert not torch.equal(grid.quantize(W_hat + scales.max(), scales, zeros, bits, GROUP), codes)


def fits(w: Tensor, s: Tensor) -> bool:
    """Whether three symmetric bits of scale s, n in -4..3, hold w unclipped."""
    return bool((w >= -4 * s).all() and (w <= 3 * s).all())


def test_symmetric_minmax_is_the_smallest_scale_that_clips_nothing(problem: Problem) -> None:
    scales, zeros = grid.minmax_grid(problem.W, BITS, GROUP, symmetric=True)
    assert (zeros == 4).all()
    for r in range(3):
        for i, columns in enumerate(grid.group_columns(10, GROUP)):
            w, s = problem.W[r, columns], scales[r, i]
            assert fits(w, s * (1 + 1e-12))
            assert not fits(w, s * (1 - 1e-9))


def test_asymmetric_minmax_spans_the_range() -> None:
    scales, zeros = grid.minmax_grid(
        torch.tensor([[-1.0, 2.0, 0.5], [1.0, 2.0, 3.0]]).double(), 2, 3, symmetric=False
    )
    close(scales, torch.tensor([[1.0], [1.0]]).double())
    assert zeros.tolist() == [[1], [0]]


def test_minmax_of_special_groups() -> None:
    assert grid.minmax_group([0.0, 0.0], 4, symmetric=False) == (1.0, 0)
    assert grid.minmax_group([0.0, 0.0], 4, symmetric=True) == (1.0, 8)
    assert grid.minmax_group([-2.0, 3.0], 1, symmetric=True) == (2.0, 1)
    assert grid.minmax_group([2.0, 3.0], 1, symmetric=True) == (3.0, 1)


# ----------------------------------------------------------- objective


def test_quadratic_loss_is_brute_force_loss_less_a_constant(problem: Problem) -> None:
    p = problem
    brute = differences([objective.brute_force_loss(Q, p.W, p.X, p.X_ref) for Q in candidates(p)])
    close(differences([objective.quadratic_loss(Q, p.W, p.H, p.R) for Q in candidates(p)]), brute)


@pytest.mark.parametrize(
    "corrupt", [lambda R: -R, lambda R: R.T, torch.zeros_like], ids=["sign", "transpose", "none"]
)
def test_quadratic_loss_differs_when_deviation_is_corrupted(
    problem: Problem, corrupt: Callable[[Tensor], Tensor]
) -> None:
    p = problem
    brute = differences([objective.brute_force_loss(Q, p.W, p.X, p.X_ref) for Q in candidates(p)])
    not_close(
        differences([objective.quadratic_loss(Q, p.W, p.H, corrupt(p.R)) for Q in candidates(p)]),
        brute,
    )


def test_statistics_by_loops_equal_matrix_products(problem: Problem) -> None:
    p = problem
    close(p.H, p.X.T @ p.X / 40)
    close(p.R, (p.X - p.X_ref).T @ p.X / 40)
    not_close(p.R, p.X.T @ (p.X - p.X_ref) / 40)


def test_shift_target_completes_the_square(problem: Problem) -> None:
    p, no_deviation = problem, torch.zeros_like(problem.R)
    losses = differences([objective.quadratic_loss(Q, p.W, p.H, p.R) for Q in candidates(p)])
    for R, check in ((p.R, close), (-p.R, not_close), (p.R.T, not_close)):
        target = objective.shift_target(p.W, p.H, R, 1.0)
        check(
            differences(
                [objective.quadratic_loss(Q, target, p.H, no_deviation) for Q in candidates(p)]
            ),
            losses,
        )


def test_shift_target_is_the_least_squares_refit(problem: Problem) -> None:
    p = problem
    refit = torch.linalg.lstsq(p.X, p.X_ref @ p.W.T).solution.T
    close(objective.shift_target(p.W, p.H, p.R, 1.0), refit)
    not_close(objective.shift_target(p.W, p.H, -p.R, 1.0), refit)


def test_shift_target_is_linear_in_strength(problem: Problem) -> None:
    p = problem
    none, quarter, full = (objective.shift_target(p.W, p.H, p.R, a) for a in (0.0, 0.25, 1.0))
    assert torch.equal(none, p.W)
    close(quarter, 0.75 * p.W + 0.25 * full)
    not_close(quarter, full)


def test_damped_adds_a_share_of_the_mean_diagonal() -> None:
    H = torch.tensor([[1.0, 0.5], [0.5, 3.0]]).double()
    expected = torch.tensor([[1.2, 0.5], [0.5, 3.2]], dtype=torch.float64)
    close(objective.damped(H, 0.1), expected)
    not_close(objective.damped(H, 0.2), expected)


# ------------------------------------------------------------- stage 1


def test_best_scale_is_stationary(problem: Problem) -> None:
    w, H = problem.W[0, :4], problem.H[:4, :4]
    n = stage1.round_group(w, 0.5, 3, BITS)
    s, step = stage1.best_scale(w, n, H), 1e-3

    def slope(at: float) -> float:
        return (stage1.group_loss(w, n, at + step, H) - stage1.group_loss(w, n, at - step, H)) / (
            2 * step
        )

    assert abs(slope(s)) < 1e-10
    assert abs(slope(1.01 * s)) > 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
def test_scan_keeps_the_best_candidate(problem: Problem, symmetric: bool) -> None:
    clips = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    for w in problem.W[:, :4]:
        H = problem.H[:4, :4]
        singles = [stage1.scan(w, H, BITS, symmetric, [c])[2] for c in clips]
        scale, zero, loss = stage1.scan(w, H, BITS, symmetric, clips)
        assert loss == min(singles)
        close(stage1.group_loss(w, stage1.round_group(w, scale, zero, BITS), scale, H), loss)
        not_close(
            stage1.group_loss(w, stage1.round_group(w, 1.3 * scale, zero, BITS), 1.3 * scale, H),
            loss,
        )
        assert stage1.scan_with_refit(w, H, BITS, symmetric, clips)[2] < loss


def test_scan_without_clipping_is_minmax(problem: Problem) -> None:
    w, H = problem.W[0, :4], problem.H[:4, :4]
    scale, zero, _ = stage1.scan(w, H, BITS, symmetric=False, clip_factors=[1.0])
    assert (scale, zero) == (float(problem.scales[0, 0]), int(problem.zeros[0, 0]))
    assert stage1.scan(w, H, BITS, symmetric=False, clip_factors=[0.9])[0] != scale


# ---------------------------------------------------------------- GPTQ


def run_gptq(p: Problem, H: Tensor, order: list[int]) -> Tensor:
    return oracle_gptq.gptq(p.W, H, p.scales, p.zeros, BITS, GROUP, order)


def conditional_minimiser(p: Problem, H: Tensor, order: list[int]) -> Tensor:
    """GPTQ otherwise: before each rounding the free columns F minimise the loss given the fixed ones C.

    w_F + d_F with H_FF d_F = -H_FC (q_C - w_C).
    """
    Q, codes = p.W.clone(), torch.zeros_like(p.codes)
    for step, j in enumerate(order):
        C, F = order[:step], order[step:]
        d = -torch.linalg.solve(H[F][:, F], H[F][:, C] @ (Q - p.W)[:, C].T)
        free = Q.clone()
        free[:, F] = p.W[:, F] + d.T
        codes[:, j] = grid.quantize(free, p.scales, p.zeros, BITS, GROUP)[:, j]
        Q[:, j] = grid.dequantize(codes, p.scales, p.zeros, GROUP)[:, j]
    return codes


@pytest.mark.parametrize(
    "order", [list(range(10)), [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]], ids=["natural", "permuted"]
)
def test_gptq_rounds_the_conditional_minimiser(problem: Problem, order: list[int]) -> None:
    H = objective.damped(problem.H, DAMPING)
    expected = conditional_minimiser(problem, H, order)
    assert torch.equal(run_gptq(problem, H, order), expected)
    assert not torch.equal(run_gptq(problem, H, order[::-1]), expected)
    assert not torch.equal(run_gptq(problem, objective.damped(problem.H, 10.0), order), expected)


def test_gptq_with_identity_hessian_is_plain_rounding(problem: Problem) -> None:
    identity, order = torch.eye(10, dtype=torch.float64), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    assert torch.equal(run_gptq(problem, identity, order), problem.codes)
    assert not torch.equal(
        run_gptq(problem, objective.damped(problem.H, DAMPING), order), problem.codes
    )


def test_gptq_loses_less_than_rounding_on_correlated_inputs(problem: Problem) -> None:
    p, order = problem, list(range(10))
    H = objective.damped(p.H, DAMPING)

    def loss(codes: Tensor) -> float:
        Q = grid.dequantize(codes, p.scales, p.zeros, GROUP)
        return objective.quadratic_loss(Q, p.W, p.H, torch.zeros_like(p.R))

    wrong_sign = 2 * torch.diag(H.diagonal()) - H
    wrong_sign += (1e-2 - min(0.0, float(torch.linalg.eigvalsh(wrong_sign)[0]))) * torch.eye(
        10, dtype=torch.float64
    )
    assert loss(run_gptq(p, H, order)) < loss(p.codes)
    assert loss(run_gptq(p, wrong_sign, order)) > loss(p.codes)


# ------------------------------------------------------------- stage 2


def exact_of(p: Problem, **options: object) -> Tensor:
    return stage2.exact(p.codes, p.zeros, p.W, p.H, GROUP, **options)  # type: ignore[arg-type]


def scale_loss(p: Problem, scales: Tensor) -> float:
    Q = grid.dequantize(p.codes, scales, p.zeros, GROUP)
    return objective.quadratic_loss(Q, p.W, p.H, torch.zeros_like(p.R))


def slopes(p: Problem, scales: Tensor, step: float = 1e-3) -> Tensor:
    """Central differences of the loss, exact for a quadratic but for rounding."""
    out = torch.zeros_like(scales)
    for index in range(scales.numel()):
        move = torch.zeros_like(scales)
        move.view(-1)[index] = step
        out.view(-1)[index] = (scale_loss(p, scales + move) - scale_loss(p, scales - move)) / (
            2 * step
        )
    return out


def test_descent_on_shifted_target_equals_descent_with_deviation(problem: Problem) -> None:
    p = problem
    with_deviation = stage2.descent_with_deviation(
        p.codes, p.zeros, p.scales, p.W, p.H, p.R, GROUP, 3
    )
    for R, check in ((p.R, close), (-p.R, not_close), (p.R.T, not_close)):
        target = objective.shift_target(p.W, p.H, R, 1.0)
        check(
            stage2.descent(p.codes, p.zeros, p.scales, target, p.H, GROUP, 3), with_deviation, 1e-9
        )


def test_descent_with_deviation_lowers_the_brute_force_loss(problem: Problem) -> None:
    p = problem

    def loss(R: Tensor, sweeps: int) -> float:
        scales = stage2.descent_with_deviation(
            p.codes, p.zeros, p.scales, p.W, p.H, R, GROUP, sweeps
        )
        Q = grid.dequantize(p.codes, scales, p.zeros, GROUP)
        return objective.brute_force_loss(Q, p.W, p.X, p.X_ref)

    losses = [loss(p.R, sweeps) for sweeps in range(4)]
    assert all(after < before for before, after in pairwise(losses))
    assert loss(-p.R, 3) > losses[0]


def test_descent_converges_to_exact(problem: Problem) -> None:
    p = problem
    expected = exact_of(p)
    close(stage2.descent(p.codes, p.zeros, p.scales, p.W, p.H, GROUP, 200), expected, 1e-9)
    not_close(stage2.descent(p.codes, p.zeros, p.scales, p.W, p.H, GROUP, 1), expected, 1e-9)
    not_close(
        stage2.descent(p.codes, p.zeros, p.scales, p.W, p.H.diag().diag(), GROUP, 200),
        expected,
        1e-9,
    )


def test_exact_is_stationary(problem: Problem) -> None:
    scales = exact_of(problem)
    assert slopes(problem, scales).abs().max() < 1e-9
    assert slopes(problem, 1.01 * scales).abs().max() > 1e-3


def test_exact_ridge_draws_towards_start(problem: Problem) -> None:
    p = problem
    assert_close(exact_of(p, ridge=1e9, start=p.scales), p.scales, rtol=1e-6, atol=0)
    close(exact_of(p, ridge=0.0, start=p.scales), exact_of(p))
    not_close(exact_of(p, ridge=0.1, start=p.scales), exact_of(p))


def test_exact_ridge_is_stationary_for_the_penalised_loss(problem: Problem) -> None:
    """The ridge adds ridge sum_i A_ii (s_i - start_i)^2, with slope 2 ridge A_ii (s_i - start_i)."""
    p, ridge = problem, 0.1
    scales = exact_of(p, ridge=ridge, start=p.scales)
    n = stage2.integers(p.codes, p.zeros, GROUP)
    A_ii = torch.stack(
        [(stage2.basis(row, GROUP).T @ p.H @ stage2.basis(row, GROUP)).diagonal() for row in n]
    )
    penalty = 2 * ridge * A_ii * (scales - p.scales)
    assert (slopes(p, scales) + penalty).abs().max() < 1e-9
    assert (slopes(p, scales) - penalty).abs().max() > 1e-3


def test_groups_of_zeros_keep_their_scale(problem: Problem) -> None:
    p = problem._replace(codes=problem.codes.clone())
    p.codes[:, 4:8] = p.zeros[:, 1:2]
    for scales in (
        stage2.descent(p.codes, p.zeros, p.scales, p.W, p.H, GROUP, 2),
        exact_of(p, start=p.scales),
        exact_of(p, ridge=0.1, start=p.scales),
    ):
        assert torch.equal(scales[:, 1], p.scales[:, 1])
        assert not torch.isclose(scales[:, [0, 2]], p.scales[:, [0, 2]]).any()


def test_basis_maps_scales_to_weights(problem: Problem) -> None:
    p = problem
    n = stage2.integers(p.codes, p.zeros, GROUP)
    Q = torch.stack([stage2.basis(n[r], GROUP) @ p.scales[r] for r in range(3)])
    close(Q, p.Q)
    not_close(Q, p.Q.roll(1, dims=1))
