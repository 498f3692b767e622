"""CDQuant, one code at a time and in pairs: the same codes as a search through all changes, and a
loss that never rises.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from descents import Case, case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import descent as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.numerics import grid
from tsq_layers.solver.descent import cdquant as greedy
from tsq_layers.solver.descent import pairs, rows

STARTS = ["nearest", "random", "lowest"]


class Way(NamedTuple):
    """A descent and its oracle, with the same options."""

    descend: object
    oracle: object
    options: Mapping[str, int | None] = MappingProxyType({})

    def codes(self, c: Case, steps: int) -> Tensor:
        return self.descend(c, steps, **self.options)

    def expected(self, c: Case, steps: int) -> Tensor:
        return self.oracle(*c[:-1], steps, **self.options)


WAYS = {
    "greedy": Way(greedy.descend, oracle.greedy),
    "pairs": Way(pairs.descend, oracle.pairs),
    "pairs, one level": Way(pairs.descend, oracle.pairs, {"reach": 1}),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)

# ---- against the oracle ----------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1), (3, 5, 2), (4, 17, 4), (2, 12, 40), (2, 20, 1), (2, 70, 64)]


@pytest.mark.parametrize("steps", [1, 25])
@pytest.mark.parametrize(("N", "K", "g"), SIZES, ids=[f"N={N}-K={K}-g={g}" for N, K, g in SIZES])
def test_greedy_codes_equal_the_oracle(N: int, K: int, g: int, steps: int) -> None:
    c = case(N, K, g)
    codes = WAYS["greedy"].codes(c, steps)
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    assert torch.equal(codes.long(), WAYS["greedy"].expected(c, steps))


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("way", ["pairs", "pairs, one level"])
@pytest.mark.parametrize(("N", "K", "g"), [(1, 1, 1), (2, 2, 1), (3, 5, 2), (4, 11, 4)], ids=str)
def test_codes_of_pairs_equal_the_oracle(N: int, K: int, g: int, way: str, steps: int) -> None:
    c = case(N, K, g)
    codes = WAYS[way].codes(c, steps)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), WAYS[way].expected(c, steps))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_width_equal_the_oracle(bits: int, symmetric: bool, start: str) -> None:
    c = case(N=2, K=6, bits=bits, symmetric=symmetric, start=start)
    assert torch.equal(WAYS["greedy"].codes(c, 10).long(), WAYS["greedy"].expected(c, 10))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("way", ["pairs", "pairs, one level"])
def test_codes_of_pairs_of_some_widths_equal_the_oracle(
    way: str, bits: int, symmetric: bool, start: str
) -> None:
    c = case(N=2, K=7, bits=bits, symmetric=symmetric, start=start)
    assert torch.equal(WAYS[way].codes(c, 10).long(), WAYS[way].expected(c, 10))


CORRUPTED = {
    "no correlations": lambda c: c._replace(hessian=c.H.diagonal().diag()),
    "another target": lambda c: c._replace(target=c.target.flip(1)),
    "group borders shifted": lambda c: c._replace(
        scales=c.scales.roll(1, 1), zeros=c.zeros.roll(1, 1)
    ),
    "another start": lambda c: c._replace(codes=3 - c.codes),
}


@every_way
@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_codes_differ_from_the_oracle_when_it_is_given_something_else(corrupt, way: Way) -> None:
    c = case(N=6, K=9)
    assert not torch.equal(way.codes(c, 5).long(), way.expected(corrupt(c), 5))


@every_way
@pytest.mark.parametrize("elements", [1, 30, 10**6], ids=lambda e: f"chunk={e}")
@pytest.mark.parametrize(("B", "n", "K"), [(3, 5, 10), (14, 1, 6), (4, 2, 1), (1, 4, 8)], ids=str)
def test_blocks_are_descended_as_if_one_at_a_time(
    B: int, n: int, K: int, elements: int, way: Way, monkeypatch
) -> None:
    c = case(B * n, K, B=B)
    monkeypatch.setattr(rows, "_CHUNK_ELEMENTS", elements)
    expected = [way.expected(c.block(b), 7) for b in range(B)]
    assert torch.equal(way.codes(c, 7).long(), torch.cat(expected))


@every_way
def test_blocks_differ_when_they_are_exchanged(way: Way) -> None:
    c = case(12, 10, B=3)
    for H in (c.H.roll(1, 0), c.H[:1].expand_as(c.H), c.H[0]):
        assert not torch.equal(way.codes(c._replace(hessian=H), 20), way.codes(c, 20))


# ---- what must hold --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 60), st.sampled_from(sorted(WAYS)))
def test_loss_never_rises(c: Case, steps: int, way: str) -> None:
    if way == "pairs" and c.bits > 4:
        way = "pairs, one level"
    codes = WAYS[way].codes(c, steps)
    assert int(codes.max()) <= grid.code_max(c.bits)
    assert (c.loss(codes) <= c.loss(c.codes) + c.slack()).all()
    if way == "greedy":
        assert ((codes != c.codes).sum(1) <= steps).all()


@every_way
def test_loss_rises_when_the_curvature_is_wrong(way: Way) -> None:
    # What the property above is there to see.
    c = case(N=20, K=30)
    wrong = c._replace(hessian=c.H - 0.7 * c.H.diagonal().diag())
    assert (c.loss(way.codes(wrong, 30)) > c.loss(c.codes) + c.slack()).any()


@pytest.mark.parametrize("start", STARTS)
def test_greedy_ends_where_no_single_code_can_be_changed_with_profit(start: str) -> None:
    c = case(N=5, K=12, start=start)
    codes = greedy.descend(c, 100)
    assert torch.equal(greedy.descend(c, 10**4), codes)
    assert torch.equal(oracle.greedy(*c._replace(codes=codes)[:-1], 1), codes.long())


@pytest.mark.parametrize("start", STARTS)
def test_pairs_end_where_no_two_codes_can_be_changed_with_profit(start: str) -> None:
    c = case(N=3, K=8, start=start)
    codes = pairs.descend(c, 10**4)
    assert torch.equal(oracle.pairs(*c._replace(codes=codes)[:-1], 8), codes.long())
    assert torch.equal(oracle.greedy(*c._replace(codes=codes)[:-1], 1), codes.long())


def test_pairs_leave_minima_of_single_codes() -> None:
    c = case(N=60, K=14)
    single = c._replace(codes=greedy.descend(c, 200))
    after = c.loss(pairs.descend(single, 200, reach=1))
    before = c.loss(single.codes)
    assert (after <= before + c.slack()).all()
    assert (after < 0.9 * before).any()


def test_a_step_changes_one_code_or_two() -> None:
    c = case(N=100, start="random")
    assert ((greedy.descend(c, 1) != c.codes).sum(1) == 1).all()
    nearly = c._replace(codes=greedy.descend(c, 10))
    changed = (pairs.descend(nearly, 1) != nearly.codes).sum(1)
    assert int(changed.min()) == 0
    assert int(changed.max()) == 2


@every_way
def test_columns_never_seen_are_rounded(way: Way) -> None:
    dead = (0, 7, 13)
    c = case(dead=dead, start="random")
    found = way.codes(c, 500)
    assert torch.equal(
        found[:, dead], grid.quantize(c.target, c.scales, c.zeros, c.bits, c.g)[:, dead]
    )
    undamped = c._replace(
        hessian=c.H - 0.01 / 1.01 * c.H.diagonal().mean() * torch.eye(14, dtype=torch.float64)
    )
    undamped.H[list(dead)], undamped.H[:, list(dead)] = 0, 0
    assert torch.isfinite(c.loss(way.codes(undamped, 500))).all()


@every_way
@pytest.mark.parametrize("start", STARTS)
def test_identity_gives_plain_rounding(start: str, way: Way) -> None:
    c = case(start=start)._replace(hessian=torch.eye(14, dtype=torch.float64))
    assert torch.equal(way.codes(c, 500), grid.quantize(c.target, c.scales, c.zeros, c.bits, c.g))


@every_way
def test_target_on_the_grid_is_kept(way: Way) -> None:
    c = case()
    exact = c._replace(target=grid.dequantize(c.codes, c.scales, c.zeros, c.g, torch.float64))
    assert torch.equal(way.codes(exact, 50), c.codes)


@every_way
def test_a_tie_is_left_alone(way: Way) -> None:
    c = case(N=1, K=1, g=1)._replace(
        scales=torch.ones(1, 1), zeros=torch.zeros(1, 1), hessian=torch.ones(1, 1)
    )
    for code in (1, 2):
        tied = c._replace(
            codes=torch.tensor([[code]], dtype=torch.uint8), target=torch.tensor([[1.5]])
        )
        assert way.codes(tied, 20) == code


@every_way
def test_rows_are_independent(way: Way) -> None:
    c = case(N=9)
    p = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(way.codes(c.rows(p), 40), way.codes(c, 40)[p])


@every_way
def test_float32_is_near_float64(way: Way) -> None:
    c = case(N=40, K=60, g=16, bits=3)
    single = Case(
        c.codes, c.target.float(), c.H.float(), c.scales.float(), c.zeros.float(), c.bits, c.g
    )
    found, expected = way.codes(single, 60), way.codes(c, 60)
    assert_close(c.loss(found).sum(), c.loss(expected).sum(), rtol=0.01, atol=0)
    assert (c.loss(found) <= c.loss(c.codes) * (1 + 1e-5)).all()


@every_way
def test_inputs_are_not_modified(way: Way) -> None:
    for c in (case(), case(6, B=2)):
        kept = [tensor.clone() for tensor in c[:5]]
        way.codes(c, 20)
        assert all(torch.equal(a, b) for a, b in zip(c[:5], kept, strict=True))


# ---- letting rows go -------------------------------------------------------------------------------------------------


@every_way
def test_rows_that_are_done_are_let_go_and_little_is_read(way: Way, monkeypatch) -> None:
    reads, worked = [], []
    to_host, move = rows.to_host, rows.Rows.move
    monkeypatch.setattr(
        rows, "to_host", lambda *values: reads.append(to_host(*values)) or to_host(*values)
    )
    monkeypatch.setattr(
        rows.Rows, "move", lambda self, *args: (worked.append(len(self.index)), move(self, *args))
    )
    c = case(N=100, K=40, g=8, bits=3)
    codes = way.codes(c, 400)
    left = [int(count) for (count,) in reads]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    assert 1 < len(left) <= 400 / rows._FEWEST
    assert set(worked) == {100, *left} - {0}
    monkeypatch.setattr(rows, "_FEWEST", 10**6)
    assert torch.equal(way.codes(c, 400), codes)


@pytest.mark.parametrize("columns", [1, 7, 64, 65, 128, 640])
def test_largest_is_the_maximum(columns: int) -> None:
    values = torch.randn(50, columns, generator=torch.Generator().manual_seed(columns)).round(
        decimals=1
    )
    value, column = rows.largest(values)
    assert torch.equal(value, values.amax(1, keepdim=True))
    assert torch.equal(values.gather(1, column), value)
