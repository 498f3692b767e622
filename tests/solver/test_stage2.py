"""Stage 2: the small space equals the layer's, descent and exact equal the loops, and the loss never rises."""

from typing import NamedTuple

import pytest
import torch
from oracles import objective as oracle_objective
from oracles import stage2 as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.numerics import grid
from tsq_layers.solver import problem as objective
from tsq_layers.solver import stage2
from tsq_layers.solver.stage2 import SmallProblem

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
RIDGES = [
    pytest.param(0.0, id="no-ridge"),
    pytest.param(0.01, id="ridge=0.01"),
    pytest.param(1.0, id="ridge=1"),
]
BITS, GROUP = 3, 4


class Case(NamedTuple):
    """Frozen integers in float64: W, target W', R, damped H, codes, zero points and scales."""

    W: Tensor
    target: Tensor
    R: Tensor
    H: Tensor
    codes: Tensor
    zeros: Tensor
    scales: Tensor

    @property
    def steps(self) -> Tensor:
        return oracle.integers(self.codes, self.zeros, GROUP)

    def small(self, ridge: float = 0.0) -> SmallProblem:
        pulled = (
            grid.dequantize(self.codes, self.scales, self.zeros, GROUP, torch.float64) - self.target
        ) @ self.H
        return stage2.small_problem(self.steps, pulled, self.H, self.scales, GROUP, ridge)


def case(N: int = 5, K: int = 14, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X_ref = normal(5 * K, K) @ (torch.eye(K, dtype=torch.float64) + 0.3 * normal(K, K))
    X = X_ref + 0.2 * normal(5 * K, K) + 0.1 * X_ref.roll(1, dims=1)
    H, R = oracle_objective.statistics(X, X_ref)
    damped = oracle_objective.damped(H, 0.01)
    W = normal(N, K)
    scales, zeros = grid.minmax(W, BITS, GROUP, False)
    codes = grid.quantize(W, scales, zeros, BITS, GROUP)
    return Case(
        W,
        oracle_objective.shift_target(W, damped, R, 1.0),
        R,
        damped,
        codes,
        zeros.to(torch.uint8),
        scales,
    )


def row_problem(
    gram: list[list[float]], linear: list[float], start: list[float], ridge: float = 0.0
) -> SmallProblem:
    """A single row of given numbers."""
    A, t, s = (torch.tensor([values], dtype=torch.float64) for values in (gram, linear, start))
    return SmallProblem(A, t - torch.einsum("nij,nj->ni", A, s), s, ridge)


# ---- the small space -------------------------------------------------------------------------------------------------


def expected_small(c: Case) -> tuple[Tensor, Tensor]:
    bases = [oracle.basis(n, GROUP) for n in c.steps]
    gram = torch.stack([B.T @ c.H @ B for B in bases])
    return gram, torch.stack(
        [B.T @ c.H @ (w - B @ s) for B, w, s in zip(bases, c.target, c.scales, strict=True)]
    )


@pytest.mark.parametrize("K", [3, 8, 14], ids=["one-short-group", "whole-groups", "ragged"])
def test_gram_and_slope_equal_the_oracle(K: int) -> None:
    c = case(K=K)
    small = c.small()
    gram, slope = expected_small(c)
    assert_close(small.gram, gram, **CLOSE)
    assert_close(small.slope, slope, **CLOSE)


CORRUPTED = {
    "group borders shifted": lambda c: c._replace(codes=c.codes.roll(1, dims=1)),
    "columns of H shifted": lambda c: c._replace(H=c.H.roll((1, 1), dims=(0, 1))),
    "zero points shifted": lambda c: c._replace(zeros=c.zeros.roll(1, dims=1)),
}


@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_gram_and_slope_differ_when_the_input_is_corrupted(corrupt) -> None:
    c = case()
    for found, wrong in zip(
        (c.small().gram, c.small().slope), expected_small(corrupt(c)), strict=True
    ):
        with pytest.raises(AssertionError):
            assert_close(found, wrong, **CLOSE)


@pytest.mark.parametrize("elements", [1, 30, 10**6], ids=lambda e: f"chunk={e}")
def test_chunks_do_not_change_the_small_problem(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case()
    expected = c.small()
    monkeypatch.setattr(stage2, "GRAM_WEIGHTS", elements)
    assert_close(c.small().gram, expected.gram, **CLOSE)
    assert_close(c.small().slope, expected.slope, **CLOSE)


@pytest.mark.parametrize("panel", [1, 4, 8, 11, 1000])
@pytest.mark.parametrize("K", [3, 8, 14, 16, 27])
def test_panels_do_not_change_the_small_problem(
    K: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage2, "PANEL_COLUMNS", panel)
    c = case(K=K)
    gram, slope = expected_small(c)
    assert_close(c.small().gram, gram, **CLOSE)
    assert_close(c.small().slope, slope, **CLOSE)


def test_loss_is_that_of_the_layer_up_to_a_constant() -> None:
    c = case()
    start = grid.dequantize(c.codes, c.scales, c.zeros, GROUP, torch.float64)
    constant = objective.squared_error(start - c.target, c.H)
    for scales in (c.scales, 0.7 * c.scales, c.scales.roll(1, dims=1)):
        Q = grid.dequantize(c.codes, scales, c.zeros, GROUP, torch.float64)
        assert_close(
            c.small().loss(scales) + constant, objective.squared_error(Q - c.target, c.H), **CLOSE
        )


def test_objective_adds_the_pull_towards_the_start() -> None:
    c = case()
    small, scales = c.small(0.3), 0.7 * c.scales
    assert_close(small.objective(c.scales), small.loss(c.scales), **CLOSE)
    pull = 0.3 * (small.gram.diagonal(dim1=1, dim2=2) * (0.3 * c.scales) ** 2).sum(1)
    assert_close(small.objective(scales), small.loss(scales) + pull, **CLOSE)


# ---- descent ---------------------------------------------------------------------------------------------------------


def expected_descent(c: Case, sweeps: int) -> Tensor:
    return oracle.descent(c.codes, c.zeros, c.scales, c.target, c.H, GROUP, sweeps)


@pytest.mark.parametrize("sweeps", [1, 2, 3, 8])
def test_descent_equals_the_oracle(sweeps: int) -> None:
    c = case()
    expected = expected_descent(c, sweeps)
    assert (expected > 0).all()  # else a guard that the paper lacks would act
    assert_close(stage2.descent(c.small(), sweeps), expected, **CLOSE)


@pytest.mark.parametrize(
    "corrupt",
    [
        *CORRUPTED.values(),
        lambda c: c._replace(target=c.W),
        lambda c: c._replace(H=c.H.diagonal().diag()),
    ],
    ids=[*CORRUPTED, "target not shifted", "no correlations"],
)
def test_descent_differs_from_the_oracle_when_its_input_is_corrupted(corrupt) -> None:
    c = case()
    with pytest.raises(AssertionError):
        assert_close(stage2.descent(c.small(), 2), expected_descent(corrupt(c), 2), **CLOSE)


def test_descent_differs_from_the_oracle_of_another_sweep() -> None:
    c = case()
    with pytest.raises(AssertionError):
        assert_close(stage2.descent(c.small(), 2), expected_descent(c, 3), **CLOSE)


@pytest.mark.parametrize("sweeps", [1, 4])
def test_descent_on_the_shifted_target_equals_the_papers_deviation_term(sweeps: int) -> None:
    c = case()
    expected = oracle.descent_with_deviation(
        c.codes, c.zeros, c.scales, c.W, c.H, c.R, GROUP, sweeps
    )
    assert_close(stage2.descent(c.small(), sweeps), expected, **CLOSE)


@pytest.mark.parametrize(
    "corrupt", [lambda R: -R, lambda R: R.T, lambda R: 0 * R], ids=["negated", "transposed", "none"]
)
def test_descent_differs_from_the_papers_deviation_term_when_it_is_corrupted(corrupt) -> None:
    c = case()
    wrong = oracle.descent_with_deviation(
        c.codes, c.zeros, c.scales, c.W, c.H, corrupt(c.R), GROUP, 2
    )
    with pytest.raises(AssertionError):
        assert_close(stage2.descent(c.small(), 2), wrong, **CLOSE)


@pytest.mark.parametrize("ridge", RIDGES)
def test_descent_never_raises_the_objective(ridge: float) -> None:
    small = case(N=20).small(ridge)
    values = torch.stack([small.objective(stage2.descent(small, sweeps)) for sweeps in range(12)])
    assert torch.equal(values[0], small.objective(small.start))
    assert (values.diff(dim=0) <= 1e-12 * values[-1].abs()).all()


@pytest.mark.parametrize("ridge", RIDGES)
def test_descent_converges_to_exact(ridge: float) -> None:
    small = case().small(ridge)
    expected = stage2.exact(small, torch.full_like(small.start, torch.nan))
    assert_close(stage2.descent(small, 500), expected, **CLOSE)


def test_descent_keeps_the_scale_of_a_step_to_a_scale_that_is_not_positive() -> None:
    small = row_problem([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [-1, 2, 0], [0.5, 0.5, 0.25])
    assert stage2.descent(small, 3).tolist() == [[0.5, 2, 0.25]]


def test_descent_keeps_the_scale_of_a_step_that_is_not_finite() -> None:
    small = row_problem([[1e-300, 0], [0, 1]], [1e300, 2], [0.5, 0.5])
    assert stage2.descent(small, 1).tolist() == [[0.5, 2]]


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", RIDGES)
def test_exact_equals_the_oracle(ridge: float) -> None:
    c = case()
    expected = oracle.exact(c.codes, c.zeros, c.target, c.H, GROUP, ridge, c.scales)
    assert (expected > 0).all()
    assert_close(
        stage2.exact(c.small(ridge), torch.full_like(c.scales, torch.nan)), expected, **CLOSE
    )


@pytest.mark.parametrize(
    "corrupt",
    [
        *CORRUPTED.values(),
        lambda c: c._replace(scales=2 * c.scales),
        lambda c: c._replace(target=c.W),
    ],
    ids=[*CORRUPTED, "other start", "target not shifted"],
)
def test_exact_differs_from_the_oracle_when_its_input_is_corrupted(corrupt) -> None:
    c, wrong = case(), corrupt(case())
    expected = oracle.exact(
        wrong.codes, wrong.zeros, wrong.target, wrong.H, GROUP, 0.1, wrong.scales
    )
    with pytest.raises(AssertionError):
        assert_close(stage2.exact(c.small(0.1), c.scales), expected, **CLOSE)


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("sweeps", [1, 3, 10])
def test_exact_is_at_most_descent(sweeps: int, ridge: float) -> None:
    small = case(N=20).small(ridge)
    descent = stage2.descent(small, sweeps)
    exact = small.objective(stage2.exact(small, descent))
    assert (exact <= small.objective(descent) + 1e-12 * exact.abs()).all()


def test_exact_takes_the_whole_row_of_the_fallback_when_a_scale_is_not_positive() -> None:
    small = row_problem([[1, 0], [0, 1]], [-1, 2], [0.5, 0.5])
    assert stage2.exact(small, torch.tensor([[0.25, 0.75]], dtype=torch.float64)).tolist() == [
        [0.25, 0.75]
    ]


def test_exact_takes_the_fallback_when_the_system_is_singular() -> None:
    fallback = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    singular = row_problem([[1, 1], [1, 1]], [1, 1], [0.5, 0.5])
    assert torch.equal(stage2.exact(singular, fallback), fallback)
    pulled = row_problem([[1, 1], [1, 1]], [1, 1], [0.5, 0.5], ridge=0.01)
    assert_close(
        stage2.exact(pulled, fallback), torch.tensor([[0.5, 0.5]], dtype=torch.float64), **CLOSE
    )


@pytest.mark.parametrize("elements", [1, 33, 10**6])
def test_rows_that_are_solved_together_do_not_change_the_scales(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = case(N=7).small(0.1)
    expected = stage2.exact(small, small.start)
    monkeypatch.setattr(stage2, "SYSTEM_ENTRIES", elements)
    assert_close(stage2.exact(small, small.start), expected, **CLOSE)


def test_exact_falls_back_by_row() -> None:
    c = case()
    sound = c.small()
    wrong = SmallProblem(sound.gram, sound.slope.clone(), sound.start, 0.0)
    wrong.slope[2] -= 2 * sound.gram[2] @ sound.start[2]  # its solution has negative scales
    found, expected = stage2.exact(wrong, c.scales), stage2.exact(sound, c.scales)
    expected[2] = c.scales[2]
    assert_close(found, expected, **CLOSE)


# ---- groups without integers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", RIDGES)
def test_groups_of_zeros_keep_their_scale(ridge: float) -> None:
    c = case()
    c.codes[1, :4], c.codes[2, 12:], c.codes[3] = (
        c.zeros[1, 0],
        c.zeros[2, 3],
        c.zeros[3].repeat_interleave(GROUP)[:14],
    )
    empty = [(1, 0), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)]
    small = c.small(ridge)
    descent = stage2.descent(small, 3)
    exact = stage2.exact(small, torch.full_like(c.scales, torch.nan))
    for row, group in empty:
        assert (
            small.gram[row, group].count_nonzero() == small.gram[row, :, group].count_nonzero() == 0
        )
        assert descent[row, group] == c.scales[row, group]
        assert exact[row, group] == c.scales[row, group]
    assert_close(
        exact, oracle.exact(c.codes, c.zeros, c.target, c.H, GROUP, ridge, c.scales), **CLOSE
    )
    if ridge == 0:
        assert_close(descent, expected_descent(c, 3), **CLOSE)


# ---- accept ----------------------------------------------------------------------------------------------------------

STORED = [torch.float16, torch.bfloat16, torch.float32]


def test_accept_takes_the_rows_whose_loss_falls() -> None:
    gram = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    start = torch.ones(3, 2, dtype=torch.float64)
    small = SmallProblem(gram, 2 * start, start, 0.0)  # least at 2
    scales = torch.tensor([[2.0, 2.0], [0.5, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert stage2.accept(small, scales, torch.float16).tolist() == [[2, 2], [1, 1], [1, 1]]


def test_accept_judges_scales_as_they_will_be_stored() -> None:
    # 1 + 0.6·2^-10 is better than 1, but float16 stores 1 + 2^-10, which is worse.
    small = row_problem([[1.0]], [1 + 0.4 * 2**-10], [1.0])
    candidate = torch.tensor([[1 + 0.6 * 2**-10]], dtype=torch.float64)
    assert small.loss(candidate) < small.loss(small.start)
    assert stage2.accept(small, candidate, torch.float16).tolist() == [[1.0]]
    assert float(stage2.accept(small, candidate, torch.float32)) == pytest.approx(
        1 + 0.6 * 2**-10, rel=2**-24
    )


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_accept_never_raises_the_loss(dtype: torch.dtype) -> None:
    # Near its minimum and almost singular, a problem whose rows often lose by rounding.
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(200, 6, 2, generator=generator, dtype=torch.float64)
    gram = B @ B.transpose(1, 2) + 1e-8 * torch.eye(6, dtype=torch.float64)
    best = torch.rand(200, 6, generator=generator, dtype=torch.float64) + 0.1
    size = torch.finfo(dtype).eps
    start = grid.storable(
        best * (1 + size * torch.randn(200, 6, generator=generator, dtype=torch.float64)), dtype
    )
    small = SmallProblem(gram, (gram @ best.unsqueeze(-1)).squeeze(-1), start, 0.0)
    before = small.loss(start)
    assert (
        small.loss(grid.storable(best, dtype)) > before
    ).any()  # without the check, rows would lose
    accepted = stage2.accept(small, best, dtype)
    assert (small.loss(accepted) <= before).all()
    assert (small.loss(accepted) < before).any()
    assert torch.equal(accepted, grid.storable(accepted, dtype))


def test_rows_are_independent() -> None:
    c = case(N=6)
    p = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    permuted = c._replace(
        W=c.W[p], target=c.target[p], codes=c.codes[p], zeros=c.zeros[p], scales=c.scales[p]
    )
    for solve in (lambda s: stage2.descent(s, 4), lambda s: stage2.exact(s, s.start)):
        assert_close(solve(permuted.small(0.01)), solve(c.small(0.01))[p], **CLOSE)


def test_inputs_are_not_modified() -> None:
    c = case()
    small = c.small(0.01)
    tensors = (c.target, c.H, c.scales, small.gram, small.slope, small.start)
    kept = [tensor.clone() for tensor in tensors]
    c.small(0.01)
    scales = stage2.descent(small, 2)
    stage2.accept(small, stage2.exact(small, scales), torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


# ---- blocks ----------------------------------------------------------------------------------------------------------


def small_of_blocks(cases: list[Case], H: Tensor) -> SmallProblem:
    """The small problem of all blocks; the gradient is that of the blocks' own H, A that of the given ones."""
    pulled = torch.cat(
        [
            (grid.dequantize(c.codes, c.scales, c.zeros, GROUP, torch.float64) - c.target) @ c.H
            for c in cases
        ]
    )
    steps, scales = torch.cat([c.steps for c in cases]), torch.cat([c.scales for c in cases])
    return stage2.small_problem(steps, pulled, H, scales, GROUP, 0.01)


def joined(parts: list[SmallProblem], name: str) -> Tensor:
    return torch.cat([getattr(part, name) for part in parts])


@pytest.mark.parametrize("panel", [1, 8, 1000])
@pytest.mark.parametrize("elements", [1, 30, 60, 10**6], ids=lambda e: f"chunk={e}")
@pytest.mark.parametrize(("B", "n", "K"), [(3, 5, 14), (14, 1, 14), (4, 2, 3), (1, 4, 8)], ids=str)
def test_small_problem_of_blocks_is_that_of_each(
    B: int, n: int, K: int, elements: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [case(n, K, seed) for seed in range(B)]
    alone = [c.small(0.01) for c in cases]
    monkeypatch.setattr(stage2, "PANEL_COLUMNS", panel)
    monkeypatch.setattr(stage2, "GRAM_WEIGHTS", elements)
    small = small_of_blocks(cases, torch.stack([c.H for c in cases]))
    for name in ("gram", "slope", "start"):
        assert_close(getattr(small, name), joined(alone, name), **CLOSE)


def test_small_problem_of_blocks_differs_when_they_are_exchanged() -> None:
    cases = [case(seed=seed) for seed in range(3)]
    H = torch.stack([c.H for c in cases])
    for wrong in (H.roll(1, 0), H[:1].expand_as(H), H[0]):
        with pytest.raises(AssertionError):
            assert_close(
                small_of_blocks(cases, wrong).gram,
                joined([c.small() for c in cases], "gram"),
                **CLOSE,
            )


def test_refined_scales_of_blocks_are_those_of_each() -> None:
    cases = [case(seed=seed) for seed in range(3)]
    small = small_of_blocks(cases, torch.stack([c.H for c in cases]))
    alone = [c.small(0.01) for c in cases]
    assert_close(
        stage2.descent(small, 3), torch.cat([stage2.descent(one, 3) for one in alone]), **CLOSE
    )
    expected = torch.cat([stage2.exact(one, one.start) for one in alone])
    assert_close(stage2.exact(small, small.start), expected, **CLOSE)
