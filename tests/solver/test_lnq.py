"""LNQ: tables and codes as plain loops find them, and a loss that never rises."""

import itertools

import pytest
import torch
from descents import Case, case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import codebook as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.numerics import grid
from tsq_layers.solver import kmeans
from tsq_layers.solver import lnq as codebook

STORED = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [(1, 1, 1), (3, 5, 2), (4, 17, 4), (2, 33, 40), (2, 150, 20)]
EXACT = 1e-10


def start(c: Case, per_group: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    tables = codebook.start(c.target, c.H, c.bits, c.g, per_group=per_group, dtype=dtype)
    return codebook.nearest(c.target, tables, c.g), tables


def loss(c: Case, codes: Tensor, tables: Tensor) -> Tensor:
    error = codebook.dequantize(codes, tables, c.g) - c.target
    metrics = (
        c.H.expand(len(error), *c.H.shape)
        if c.H.dim() == 2
        else c.H.repeat_interleave(len(error) // len(c.H), 0)
    )
    return torch.einsum("ri,rij,rj->r", error, metrics, error)


def width(c: Case, per_group: bool) -> int:
    return c.g if per_group else c.target.shape[1]


both = pytest.mark.parametrize("per_group", [True, False], ids=["group", "row"])

# ---- against the oracle ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("N", "K", "g"), SIZES, ids=str)
def test_codes_equal_the_oracle(N: int, K: int, g: int, bits: int, per_group: bool) -> None:
    c = case(N, K, g, bits=bits)
    codes, tables = start(c, per_group)
    found = codebook.descend(codes, c.target, c.H, tables, c.g, 2)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    for row, w in enumerate(c.target):
        wanted = oracle.cyclic(codes[row], tables[row], w, c.H, width(c, per_group), 2)
        # Levels may coincide, and then the codes are a matter of taste.
        wanted_values = oracle.values(wanted, tables[row], width(c, per_group))
        assert_close(codebook.dequantize(found, tables, c.g)[row], wanted_values, rtol=0, atol=0)


@both
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("N", "K", "g"), SIZES, ids=str)
def test_tables_equal_the_oracle(
    N: int, K: int, g: int, bits: int, dtype: torch.dtype, per_group: bool
) -> None:
    c = case(N, K, g, bits=bits)
    codes, tables = start(c, per_group, dtype)
    found, renamed = codebook.fit(codes, c.target, c.H, tables, c.g, dtype)
    assert (found.diff(dim=-1) >= 0).all()
    values = codebook.dequantize(renamed, found, c.g)
    for row, w in enumerate(c.target):
        wanted = oracle.fitted(codes[row], tables[row], w, c.H, width(c, per_group), dtype)
        wanted_values = oracle.values(codes[row], wanted, width(c, per_group))
        assert_close(values[row], wanted_values, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert_close(found[row], wanted.sort(-1).values, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@both
def test_results_differ_from_the_oracle_when_it_is_given_another_metric(per_group: bool) -> None:
    c = case(N=4, K=20, g=10, bits=2)
    codes, tables = start(c, per_group)
    found = codebook.fit(codes, c.target, c.H, tables, c.g, torch.float32)[0]
    other = c.H.diagonal().diag()
    rows = list(zip(codes, tables, c.target, strict=True))
    wanted = torch.stack(
        [oracle.fitted(*row, other, width(c, per_group), torch.float32) for row in rows]
    )
    assert not torch.allclose(found, wanted.sort(-1).values, rtol=1e-4)
    swept = codebook.descend(codes, c.target, c.H, tables, c.g, 1)
    wanted = torch.stack([oracle.cyclic(*row, other, width(c, per_group), 1) for row in rows])
    assert not torch.equal(swept.long(), wanted)


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("size", [1, 3, 30])
def test_kmeans_iterates_like_the_oracle(size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(size)
    numbers, weights = (
        torch.randn(3, size, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    weights = weights.exp()
    for iterations in range(3):
        before, after = (
            kmeans.levels(numbers, weights, count, iterations + more) for more in (0, 1)
        )
        for row in range(3):
            wanted = oracle.lloyd(numbers[row], weights[row], before[row])
            assert_close(after[row], wanted, rtol=1e-9, atol=1e-9)


def test_kmeans_lowers_its_error_and_survives_weights_of_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(20, 200, generator=generator)
    weights = torch.randn(20, 200, generator=generator).mul(6).exp()
    weights[0] = 0
    first, last = (kmeans.levels(numbers, weights, 8, iterations) for iterations in (0, 20))
    assert torch.isfinite(last).all()
    errors = [
        [oracle.weighted_error(*row) for row in zip(numbers, weights, levels, strict=True)]
        for levels in (first, last)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in zip(*errors, strict=True))
    assert sum(errors[1]) < 0.5 * sum(errors[0])


# ---- what must hold --------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(cases(), st.booleans(), st.integers(1, 3), st.sampled_from(STORED))
def test_loss_never_rises(c: Case, per_group: bool, rounds: int, dtype: torch.dtype) -> None:
    c = c._replace(bits=min(c.bits, 4))
    options = {"per_group": per_group, "sweeps": 2, "dtype": dtype}
    losses = []
    for count in range(rounds + 1):
        codes, tables = codebook.solve(c.target, c.H, c.bits, c.g, rounds=count, **options)
        assert codes.shape == c.target.shape
        assert tables.shape == (
            len(codes),
            -(-codes.shape[1] // c.g) if per_group else 1,
            2**c.bits,
        )
        assert int(codes.max()) <= grid.code_max(c.bits)
        assert torch.equal(tables, codebook.rounded(tables, dtype))
        losses.append(loss(c, codes, tables))
    assert all(
        (after <= before + 10 * c.slack()).all() for before, after in itertools.pairwise(losses)
    )


@both
def test_loss_rises_when_the_metric_is_wrong(per_group: bool) -> None:
    # What the property above is there to see.
    c = case(N=20, K=30)
    codes, tables = start(c, per_group)
    wrong = c.H - 0.7 * c.H.diagonal().diag()
    assert (
        loss(c, codebook.descend(codes, c.target, wrong, tables, c.g, 1), tables)
        > loss(c, codes, tables)
    ).any()


@both
@pytest.mark.parametrize(("B", "n", "K"), [(3, 5, 14), (7, 1, 9), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("elements", [1, 200, 10**6])
def test_blocks_are_solved_as_if_one_at_a_time(
    B: int, n: int, K: int, elements: int, per_group: bool, monkeypatch
) -> None:
    c = case(B * n, K, B=B)
    options = {"per_group": per_group, "rounds": 2, "sweeps": 2, "dtype": torch.float32}
    monkeypatch.setattr(codebook, "_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(codebook, "_TOGETHER", elements)
    codes, tables = codebook.solve(c.target, c.H, c.bits, c.g, **options)
    parts = [
        codebook.solve(p.target, p.H, p.bits, p.g, **options)
        for p in (c.block(b) for b in range(B))
    ]
    assert torch.equal(codes, torch.cat([part for part, _ in parts]))
    assert_close(tables, torch.cat([part for _, part in parts]), rtol=2**-22, atol=1e-9)


def test_levels_that_no_column_has_stay() -> None:
    c = case(N=3, K=6, bits=4)
    codes, tables = start(c, False, torch.float32)
    codes.zero_()
    found, _ = codebook.fit(codes, c.target, c.H, tables, c.g, torch.float32)
    for row in range(3):
        assert sum(float(level) in found[row, 0].tolist() for level in tables[row, 0, 1:]) == 15


def test_target_with_few_values_is_found_exactly() -> None:
    c = case(N=4, K=30)
    target = torch.tensor([-3.0, -1.0, 0.5, 4.0], dtype=torch.float64)[c.codes.long()]
    options = {"per_group": False, "rounds": 3, "sweeps": 3, "dtype": torch.float16}
    codes, tables = codebook.solve(target, c.H, 2, c.g, **options)
    assert_close(codebook.dequantize(codes, tables, c.g), target, rtol=0, atol=0)


@both
def test_float32_is_near_float64_and_inputs_are_not_modified(per_group: bool) -> None:
    c = case(N=40, K=60, g=16, bits=3)
    kept = c.target.clone(), c.H.clone()
    options = {"per_group": per_group, "rounds": 2, "sweeps": 2, "dtype": torch.float16}
    double = codebook.solve(c.target, c.H, 3, 16, **options)
    single = codebook.solve(c.target.float(), c.H.float(), 3, 16, **options)
    losses = [loss(c, codes, tables.double()).sum() for codes, tables in (double, single)]
    assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert torch.equal(c.target, kept[0])
    assert torch.equal(c.H, kept[1])
