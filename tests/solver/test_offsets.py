"""Grids with offsets: the closed forms of both stages, and losses that never rise."""

import itertools

import pytest
import torch
from descents import Case, case, cases, squared
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import offsets as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.numerics import grid
from tsq_layers.solver import joint, offsets, stage1, stage2
from tsq_layers.solver.blocks import product

STORED = [torch.float16, torch.bfloat16, torch.float32]


def grids(c: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and offsets: those of the case."""
    scales = grid.storable(c.scales, dtype)
    return c.codes, scales, offsets.storable(-scales * c.zeros, dtype)


def values(c: Case, codes: Tensor, scales: Tensor, added: Tensor) -> Tensor:
    spread = offsets.spread(added, c.g, c.target.shape[1]).double()
    return grid.dequantize(codes, scales, torch.zeros_like(scales), c.g, torch.float64) + spread


def loss(c: Case, *state: Tensor) -> Tensor:
    return squared(values(c, *state) - c.target, c.H)


def small_problem(
    c: Case, state: tuple[Tensor, Tensor, Tensor], ridge: float = 0.01
) -> stage2.SmallProblem:
    pulled = product(values(c, *state) - c.target, c.H)
    return offsets.small_problem(state[0], pulled, c.H, *state[1:], c.bits, c.g, ridge)


def refine(
    c: Case, state: tuple[Tensor, Tensor, Tensor], **options
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, added = state
    start = c._replace(codes=codes, scales=scales, zeros=torch.zeros_like(scales))
    return joint.refine_with_offsets(start, added, **options)


# ---- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [0.01, 1.0])
@pytest.mark.parametrize(("N", "K", "g"), [(3, 14, 4), (4, 16, 16), (2, 30, 7)], ids=str)
def test_exact_scales_and_offsets_equal_the_oracle(N: int, K: int, g: int, ridge: float) -> None:
    c = case(N, K, g, bits=3)
    state = grids(c)
    assert_close(values(c, *state), oracle.dequantize(*state, g), rtol=1e-14, atol=1e-14)
    small = small_problem(c, state, ridge)
    found = stage2.exact(small, fallback=small.start, positive=state[1].shape[1])
    scales, added = oracle.exact(state[0], c.target, c.H, *state[1:], 3, g, ridge)
    assert (scales > 0).all()
    assert_close(found, torch.cat([scales, added + 3.5 * scales], 1), rtol=1e-8, atol=1e-10)
    other = oracle.exact(state[0], c.target, c.H.diagonal().diag(), *state[1:], 3, g, ridge)[0]
    assert not torch.allclose(found[:, : scales.shape[1]], other, rtol=1e-3)


def test_loss_of_the_small_problem_is_the_loss() -> None:
    c = case(5, 22, 8, bits=2)
    state = grids(c)
    small = small_problem(c, state)
    generator = torch.Generator().manual_seed(1)
    scales, added = (
        v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in state[1:]
    )
    change = small.loss(torch.cat([scales, added + 1.5 * scales], 1))
    assert_close(change, loss(c, state[0], scales, added) - loss(c, *state), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("K", "g"), [(16, 16), (14, 4), (9, 1), (1, 1), (30, 7)], ids=str)
@pytest.mark.parametrize("kind", ["blocks", "diagonal"])
def test_fitted_grids_lose_no_more_than_those_with_integer_zero_points(
    K: int, g: int, kind: str
) -> None:
    c = case(4, K, g, bits=2)
    metric = c.H if kind == "blocks" else c.H.diagonal()
    scales, added = offsets.fit_grids(c.target, metric, 2, g)
    assert (scales > 0).all()
    codes = grid.quantize(
        c.target - offsets.spread(added, g, K), scales, torch.zeros_like(scales), 2, g
    )
    mask = torch.arange(K).unsqueeze(1) // g == torch.arange(K) // g
    own = c._replace(hessian=c.H * mask if kind == "blocks" else metric.diag())
    least = loss(own, codes, scales, added)
    integer = stage1.fit_grids(c.target, metric, 2, g, False)
    rounded = grid.quantize(c.target, *integer, 2, g)
    # Both are scans of a few clipping factors: a group may be unlucky.
    assert (
        least.sum() <= loss(own, rounded, integer[0], -integer[0] * integer[1]).sum() * 1.05 + 1e-20
    )


def test_refitted_grid_is_the_least_squares_for_its_codes() -> None:
    c = case(5, 12, 12, bits=3)
    scales, added = (values.T for values in grids(c)[1:])  # (1 group, 5 rows)
    weight, metric = c.target.unsqueeze(0), c.H.unsqueeze(0)
    centre = added + 3.5 * scales
    found = offsets._refitted(weight, scales, centre, metric, 3)
    codes = offsets._rounded(weight, scales, centre, 3)[0]
    for row in range(5):
        B = torch.stack([codes[row], torch.ones(12, dtype=torch.float64)], 1)
        wanted = torch.linalg.solve(B.T @ c.H @ B, B.T @ c.H @ c.target[row])
        assert_close(
            torch.stack([values[0, row] for values in found]), wanted, rtol=1e-9, atol=1e-12
        )


def test_fit_of_two_stages_beats_integer_zero_points() -> None:
    c = case(60, 64, 16, bits=2)
    scales, added = offsets.fit_grids(c.target, c.H, 2, 16)
    codes = grid.quantize(
        c.target - offsets.spread(added, 16, 64), scales, torch.zeros_like(scales), 2, 16
    )
    integer = stage1.fit_grids(c.target, c.H, 2, 16, False)
    plain = grid.quantize(c.target, *integer, 2, 16)
    mask = torch.arange(64).unsqueeze(1) // 16 == torch.arange(64) // 16
    own = c._replace(hessian=c.H * mask)
    found, wanted = (
        loss(own, codes, scales, added).sum(),
        loss(own, plain, integer[0], -integer[0] * integer[1]).sum(),
    )
    assert found < 0.97 * wanted


@pytest.mark.parametrize("level", [0.0, 3.0, -2.0])
def test_constant_groups_are_met_exactly(level: float) -> None:
    target = torch.full((3, 10), level)
    scales, added = offsets.fit_grids(target, torch.ones(10), 3, 4)
    codes = grid.quantize(
        target - offsets.spread(added, 4, 10), scales, torch.zeros_like(scales), 3, 4
    )
    found = grid.dequantize(codes, scales, torch.zeros_like(scales), 4) + offsets.spread(
        added, 4, 10
    )
    assert torch.equal(found, target)


@pytest.mark.parametrize(("B", "n", "K"), [(3, 5, 14), (7, 1, 9), (4, 2, 1)], ids=str)
def test_blocks_are_solved_as_if_one_at_a_time(B: int, n: int, K: int) -> None:
    c = case(B * n, K, B=B, bits=2)
    parts = [c.block(b) for b in range(B)]
    found = offsets.fit_grids(c.target, c.H, 2, c.g)
    alone = [offsets.fit_grids(p.target, p.H, 2, c.g) for p in parts]
    for whole, pieces in zip(found, zip(*alone, strict=True), strict=True):
        assert_close(whole, torch.cat(pieces), rtol=1e-9, atol=1e-12)
    small = small_problem(c, grids(c))
    pieces = [small_problem(p, grids(p)) for p in parts]
    assert_close(small.gram, torch.cat([p.gram for p in pieces]), rtol=1e-10, atol=1e-12)
    assert_close(small.slope, torch.cat([p.slope for p in pieces]), rtol=1e-10, atol=1e-12)


# ---- what must hold --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 3), st.sampled_from(STORED))
def test_joint_loss_never_rises(c: Case, rounds: int, dtype: torch.dtype) -> None:
    state = grids(c, dtype)
    options = {"sweeps": 1, "ridge": 0.01, "dtype": dtype}
    losses = [loss(c, *state)]
    for count in range(1, rounds + 1):
        codes, scales, added = refine(c, state, rounds=count, **options)
        assert (scales > 0).all()
        assert torch.equal(added, offsets.storable(added, dtype))
        losses.append(loss(c, codes, scales, added))
    assert all(
        (after <= before + 100 * c.slack()).all() for before, after in itertools.pairwise(losses)
    )


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 2), st.sampled_from(STORED))
def test_joint_loss_with_zero_points_never_rises(c: Case, rounds: int, dtype: torch.dtype) -> None:
    start = c._replace(scales=grid.storable(c.scales, dtype))
    codes, scales, zeros = joint.refine_with_zeros(
        start, rounds=rounds, sweeps=1, ridge=0.01, dtype=dtype
    )
    assert ((zeros >= 0) & (zeros <= grid.code_max(c.bits))).all()
    after = c._replace(zeros=zeros).loss(codes, scales)
    assert (after <= start.loss(c.codes) + 100 * c.slack()).all()


def test_rounding_that_is_not_checked_raises_the_loss() -> None:
    # What the properties above are there to see.
    c = case(60, 14, bits=3)
    state = grids(c, torch.bfloat16)
    options = {"rounds": 10, "sweeps": 1, "ridge": 0.01, "dtype": torch.bfloat16}
    state = refine(c, state, **options)
    small = small_problem(c, state)
    solution = stage2.exact(small, small.start, positive=4)
    scales = grid.storable(solution[:, :4], torch.bfloat16)
    added = offsets.storable(solution[:, 4:] - 3.5 * scales, torch.bfloat16)
    assert (loss(c, state[0], scales, added) > loss(c, *state)).any()
    accepted = offsets.accept(small, solution, state[2], 3, torch.bfloat16)
    assert (loss(c, state[0], *accepted) <= loss(c, *state) + c.slack()).all()
