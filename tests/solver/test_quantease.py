"""QuantEase: the same codes as plain loops, and a loss that never rises."""

import itertools

import pytest
import torch
from descents import Case, case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import descent as oracle
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.solver.descent import quantease as cyclic

STARTS = ["nearest", "random", "lowest"]
SIZES = [
    (1, 1, 1),
    (3, 5, 2),
    (2, 16, 4),
    (4, 17, 4),
    (3, 33, 8),
    (2, 40, 40),
    (2, 70, 64),
    (2, 31, 1),
    (2, 150, 20),
]


def descend(c: Case, sweeps: int = 1, relax: bool = False) -> Tensor:
    return cyclic.descend(c, sweeps, relax=relax)


def relaxed(sweeps: int) -> tuple[int, ...]:
    return tuple(sweep for sweep in range(sweeps) if cyclic.is_relaxed(sweep, sweeps))


# ---- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize(("N", "K", "g"), SIZES, ids=[f"N={N}-K={K}-g={g}" for N, K, g in SIZES])
def test_codes_equal_the_oracle(N: int, K: int, g: int, sweeps: int) -> None:
    c = case(N, K, g)
    codes = descend(c, sweeps)
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    assert torch.equal(codes.long(), oracle.cyclic(*c[:-1], sweeps))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_width_equal_the_oracle(bits: int, symmetric: bool, start: str) -> None:
    c = case(K=21, g=8, bits=bits, symmetric=symmetric, start=start)
    assert torch.equal(descend(c, 2).long(), oracle.cyclic(*c[:-1], 2))


@pytest.mark.parametrize("sweeps", [1, 2, 3, 4, 5, 8, 10])
def test_relaxed_codes_equal_the_oracle(sweeps: int) -> None:
    c = case(N=8, K=17)
    assert torch.equal(
        descend(c, sweeps, relax=True).long(), oracle.cyclic(*c[:-1], sweeps, relaxed(sweeps))
    )


def test_relaxing_is_at_work_and_sometimes_for_the_worse() -> None:
    c = case(N=40, K=17)
    with_it, without = c.loss(descend(c, 9, relax=True)), c.loss(descend(c, 9))
    assert (with_it < without - c.slack()).any()
    assert (with_it > without + c.slack()).any()


CORRUPTED = {
    "no correlations": lambda c: c._replace(hessian=c.H.diagonal().diag()),
    "another target": lambda c: c._replace(target=c.target.flip(1)),
    "group borders shifted": lambda c: c._replace(
        scales=c.scales.roll(1, 1), zeros=c.zeros.roll(1, 1)
    ),
    "another start": lambda c: c._replace(codes=3 - c.codes),
}


@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_codes_differ_from_the_oracle_when_it_is_given_something_else(corrupt) -> None:
    c = case(N=6, K=21)
    assert not torch.equal(descend(c).long(), oracle.cyclic(*corrupt(c)[:-1], 1))


def test_codes_differ_from_the_oracle_in_another_order_of_columns() -> None:
    c = case(N=6, K=20)
    groups = torch.arange(5).flip(0)
    turned = Case(
        c.codes.flip(1),
        c.target.flip(1),
        c.H.flip(0, 1),
        c.scales[:, groups],
        c.zeros[:, groups],
        c.bits,
        c.g,
    )
    assert not torch.equal(descend(c).long(), oracle.cyclic(*turned[:-1], 1).flip(1))


@pytest.mark.parametrize("relax", [True, False], ids=["relaxed", "plain"])
@pytest.mark.parametrize("elements", [1, 50, 10**6], ids=lambda e: f"chunk={e}")
@pytest.mark.parametrize(("B", "n", "K"), [(3, 5, 14), (14, 1, 9), (4, 2, 1), (1, 4, 8)], ids=str)
def test_blocks_are_descended_as_if_one_at_a_time(
    B: int, n: int, K: int, elements: int, relax: bool, monkeypatch
) -> None:
    c = case(B * n, K, B=B)
    monkeypatch.setattr(cyclic, "_CHUNK_ELEMENTS", elements)
    expected = [oracle.cyclic(*c.block(b)[:-1], 4, relaxed(4) if relax else ()) for b in range(B)]
    assert torch.equal(descend(c, 4, relax).long(), torch.cat(expected))


def test_blocks_differ_when_they_are_exchanged() -> None:
    c = case(12, 14, B=3)
    for H in (c.H.roll(1, 0), c.H[:1].expand_as(c.H), c.H[0]):
        assert not torch.equal(descend(c._replace(hessian=H), 2), descend(c, 2))


# ---- what must hold --------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(1, 5), st.booleans())
def test_loss_never_rises(c: Case, sweeps: int, relax: bool) -> None:
    losses = [c.loss(c.codes)]
    for count in (1, sweeps) if relax else range(1, sweeps + 1):
        codes = descend(c, count, relax)
        assert int(codes.max()) <= grid.code_max(c.bits)
        losses.append(c.loss(codes))
    # A tie is broken by rounding, so a row may rise by as much as rounding is.
    assert all((after <= before + c.slack()).all() for before, after in itertools.pairwise(losses))


def test_loss_rises_when_the_curvature_is_wrong() -> None:
    # What the property above is there to see.
    c = case(N=20, K=30)
    wrong = c._replace(hessian=c.H - 0.7 * c.H.diagonal().diag())
    assert (c.loss(descend(wrong)) > c.loss(c.codes) + c.slack()).any()


@pytest.mark.parametrize("start", STARTS)
def test_many_sweeps_end_where_no_single_code_can_be_changed_with_profit(start: str) -> None:
    c = case(N=5, K=12, start=start)
    codes = descend(c, 50)
    assert torch.equal(descend(c._replace(codes=codes)), codes)
    assert torch.equal(oracle.greedy(*c._replace(codes=codes)[:-1], 1), codes.long())


def test_columns_never_seen_are_rounded() -> None:
    dead = (0, 7, 13)
    c = case(dead=dead, start="random")
    rounded = grid.quantize(c.target, c.scales, c.zeros, c.bits, c.g)
    assert torch.equal(descend(c)[:, dead], rounded[:, dead])
    undamped = c._replace(
        hessian=c.H - 0.01 / 1.01 * c.H.diagonal().mean() * torch.eye(14, dtype=torch.float64)
    )
    undamped.H[list(dead)], undamped.H[:, list(dead)] = 0, 0
    assert torch.equal(descend(undamped)[:, dead], rounded[:, dead])


@pytest.mark.parametrize("start", STARTS)
def test_identity_gives_plain_rounding(start: str) -> None:
    c = case(start=start)._replace(hessian=torch.eye(14, dtype=torch.float64))
    assert torch.equal(descend(c), grid.quantize(c.target, c.scales, c.zeros, c.bits, c.g))


def test_target_on_the_grid_is_found_and_kept() -> None:
    c = case()
    exact = c._replace(target=grid.dequantize(c.codes, c.scales, c.zeros, c.g, torch.float64))
    assert torch.equal(descend(exact, 3), c.codes)


def test_rows_are_independent() -> None:
    c = case(N=9)
    p = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(descend(c.rows(p), 3, relax=True), descend(c, 3, relax=True)[p])


def test_scaling_the_metric_changes_nothing() -> None:
    c = case()
    assert torch.equal(descend(c._replace(hessian=2.0**20 * c.H), 3), descend(c, 3))


def test_float32_is_near_float64() -> None:
    c = case(N=40, K=60, g=16, bits=3)
    single = Case(
        c.codes, c.target.float(), c.H.float(), c.scales.float(), c.zeros.float(), c.bits, c.g
    )
    assert (descend(single, 2) != descend(c, 2)).float().mean() < 0.01


def test_inputs_are_not_modified() -> None:
    for c in (case(), case(6, B=2)):
        kept = [tensor.clone() for tensor in c[:5]]
        descend(c, 4, relax=True)
        assert all(torch.equal(a, b) for a, b in zip(c[:5], kept, strict=True))


def test_schedule_is_the_published_one() -> None:
    assert relaxed(3) == (1,)
    assert relaxed(2) == ()  # never the last
    assert relaxed(40) == (1, 4, 7, 10, 13, 16, 19, 22, 25)
