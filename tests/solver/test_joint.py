"""Joint refinement: the same codes and scales as plain loops, and a loss that never rises."""

import itertools

import pytest
import torch
from descents import Case, case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import descent as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.numerics import grid
from tsq_layers.solver import joint, stage2
from tsq_layers.solver.descent import quantease as cyclic

STORED = [torch.float16, torch.bfloat16, torch.float32]


def refine(
    c: Case,
    rounds: int = 1,
    sweeps: int = 1,
    ridge: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """From scales as they are stored."""
    start = c._replace(scales=grid.storable(c.scales, dtype))
    return joint.refine(start, rounds=rounds, sweeps=sweeps, ridge=ridge, dtype=dtype)


def expected(
    c: Case, rounds: int, sweeps: int, ridge: float = 0.01, dtype: torch.dtype = torch.float32
):
    return oracle.joint(
        *c._replace(scales=grid.storable(c.scales, dtype))[:-1], rounds, sweeps, ridge, dtype
    )


def loss(c: Case, codes: Tensor, scales: Tensor) -> Tensor:
    return c.loss(codes, scales)


# ---- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize(("rounds", "sweeps"), [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize(("N", "K", "g"), [(5, 14, 4), (4, 16, 16), (3, 9, 2), (2, 1, 1)], ids=str)
def test_codes_and_scales_equal_the_oracle(
    N: int, K: int, g: int, rounds: int, sweeps: int, ridge: float, dtype: torch.dtype
) -> None:
    c = case(N, K, g)
    codes, scales = refine(c, rounds, sweeps, ridge, dtype)
    wanted_codes, wanted_scales = expected(c, rounds, sweeps, ridge, dtype)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), wanted_codes)
    # Before they are rounded to their dtype, the scales agree to 1e-10: few of them round to another neighbour.
    assert_close(scales, wanted_scales, rtol=torch.finfo(dtype).eps, atol=0)
    assert (scales != wanted_scales).float().mean() < 0.05


CORRUPTED = {
    "no correlations": lambda c: c._replace(hessian=c.H.diagonal().diag()),
    "another target": lambda c: c._replace(target=c.target.flip(1)),
    "other zero points": lambda c: c._replace(zeros=3 - c.zeros),
}


@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_codes_and_scales_differ_from_the_oracle_when_it_is_given_something_else(corrupt) -> None:
    c = case(N=6)
    codes, scales = refine(c, 2)
    wanted_codes, wanted_scales = expected(corrupt(c), 2, 1)
    assert not torch.equal(codes.long(), wanted_codes)
    with pytest.raises(AssertionError):
        assert_close(scales, wanted_scales, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("B", "n", "K"), [(3, 5, 14), (7, 1, 9), (4, 2, 1)], ids=str)
def test_blocks_are_refined_as_if_one_at_a_time(B: int, n: int, K: int) -> None:
    c = case(B * n, K, B=B)
    codes, scales = refine(c, 2)
    parts = [refine(c.block(b), 2) for b in range(B)]
    assert torch.equal(codes, torch.cat([part for part, _ in parts]))
    assert_close(
        scales, torch.cat([part for _, part in parts]), rtol=torch.finfo(torch.float32).eps, atol=0
    )


# ---- what must hold --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 3), st.sampled_from([0.0, 0.01]), st.sampled_from(STORED))
def test_loss_never_rises(c: Case, rounds: int, ridge: float, dtype: torch.dtype) -> None:
    found = [(c.codes, grid.storable(c.scales, dtype))]
    found += [refine(c, count, ridge=ridge, dtype=dtype) for count in range(1, rounds + 1)]
    losses = [loss(c, *state) for state in found]
    assert (found[-1][1] > 0).all()
    assert torch.equal(found[-1][1], grid.storable(found[-1][1], dtype))
    for before, after in itertools.pairwise(losses):
        assert (after <= before + 10 * c.slack()).all()


def test_loss_rises_without_the_check_of_stored_scales(monkeypatch) -> None:
    # What the property above is there to see.
    c = case(N=60, bits=3)
    codes, scales = refine(c, 10, dtype=torch.bfloat16)
    monkeypatch.setattr(stage2, "accept", lambda small, scales, dtype: grid.storable(scales, dtype))
    again = refine(c._replace(codes=codes, scales=scales), dtype=torch.bfloat16)
    assert (loss(c, *again) > loss(c, codes, scales) + 10 * c.slack()).any()


def test_each_round_gains_over_codes_and_scales_alone() -> None:
    c = case(N=60)
    scales = grid.storable(c.scales, torch.float32)
    codes_alone = loss(c, cyclic.descend(c, 20), scales).sum()
    one, three = (loss(c, *refine(c, rounds)).sum() for rounds in (1, 3))
    assert three < one < loss(c, c.codes, scales).sum()
    assert three < codes_alone


def test_no_rounds_change_nothing() -> None:
    c = case()
    codes, scales = refine(c, 0)
    assert torch.equal(codes, c.codes)
    assert torch.equal(scales, grid.storable(c.scales, torch.float32))


def test_rows_are_independent() -> None:
    c = case(N=9)
    p = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    (codes, scales), (permuted_codes, permuted_scales) = refine(c, 2), refine(c.rows(p), 2)
    assert torch.equal(permuted_codes, codes[p])
    assert_close(permuted_scales, scales[p], rtol=torch.finfo(torch.float32).eps, atol=0)


def test_inputs_are_not_modified() -> None:
    for c in (case(), case(6, B=2)):
        kept = [tensor.clone() for tensor in c[:5]]
        refine(c, 2)
        assert all(torch.equal(a, b) for a, b in zip(c[:5], kept, strict=True))
