"""Scales over clipping factors, and zero points by steps of one: the same as plain loops, and a
loss that never rises.
"""

import pytest
import torch
from descents import Case, case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import clipping as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.numerics import grid
from tsq_layers.solver import zeros
from tsq_layers.solver.descent import clipping

STORED = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [(1, 1, 1), (3, 5, 2), (4, 14, 4), (3, 16, 16), (2, 20, 1)]


def stored(c: Case, dtype: torch.dtype) -> Case:
    return c._replace(scales=grid.storable(c.scales, dtype))


def clip(
    c: Case, dtype: torch.dtype = torch.float32, nearest: bool = False, passes: int = 2
) -> tuple[Tensor, Tensor]:
    return clipping.descend(stored(c, dtype), dtype=dtype, nearest=nearest, passes=passes)


def shift(c: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return zeros.descend(stored(c, dtype), dtype=dtype)


def loss(c: Case, codes: Tensor, scales: Tensor, zero: Tensor | None = None) -> Tensor:
    return c._replace(zeros=c.zeros if zero is None else zero).loss(codes, scales)


# ---- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nearest", [True, False], ids=["nearest", "best"])
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize(("N", "K", "g"), SIZES, ids=str)
def test_clipped_codes_and_scales_equal_the_oracle(
    N: int, K: int, g: int, dtype: torch.dtype, nearest: bool
) -> None:
    c = case(N, K, g)
    codes, scales = clip(c, dtype, nearest)
    wanted, wanted_scales = oracle.factors(
        *stored(c, dtype)[:-1], clipping.FACTORS, dtype, nearest, 2
    )
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    assert torch.equal(codes.long(), wanted)
    assert_close(scales, wanted_scales, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
# Not with groups of one column: there every zero point is exact, and rounding decides.
@pytest.mark.parametrize(("N", "K", "g"), [*SIZES[1:-1], (2, 20, 3)], ids=str)
def test_zero_points_codes_and_scales_equal_the_oracle(
    N: int, K: int, g: int, bits: int, dtype: torch.dtype
) -> None:
    c = case(N, K, g, bits=bits, start="random")
    codes, scales, zero = shift(c, dtype)
    wanted, wanted_scales, wanted_zeros = oracle.zero_steps(*stored(c, dtype)[:-1], dtype)
    assert torch.equal(zero.long(), wanted_zeros)
    assert torch.equal(codes.long(), wanted)
    assert_close(scales, wanted_scales, rtol=torch.finfo(dtype).eps, atol=0)


CORRUPTED = {
    "no correlations": lambda c: c._replace(hessian=c.H.diagonal().diag()),
    "another target": lambda c: c._replace(target=c.target.flip(1)),
}


@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_results_differ_from_the_oracle_when_it_is_given_something_else(corrupt) -> None:
    c = case(N=6)
    wanted = oracle.factors(*corrupt(c)[:-1], clipping.FACTORS, torch.float32, False, 2)[1]
    assert not torch.allclose(clip(c)[1], wanted, rtol=1e-6)
    assert not torch.equal(
        shift(c)[0].long(), oracle.zero_steps(*corrupt(c)[:-1], torch.float32)[0]
    )


# ---- what must hold --------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(STORED), st.booleans())
def test_loss_never_rises(c: Case, dtype: torch.dtype, nearest: bool) -> None:
    start = stored(c, dtype)
    states = [clip(c, dtype, nearest)]
    if not torch.equal(c.zeros, torch.full_like(c.zeros, 2 ** (c.bits - 1))):
        states.append(shift(c, dtype))
    for codes, scales, *zero in states:
        assert int(codes.max()) <= grid.code_max(c.bits)
        assert (scales > 0).all()
        assert torch.equal(scales, grid.storable(scales, dtype))
        assert (
            loss(c, codes, scales, *zero) <= loss(c, c.codes, start.scales) + 10 * c.slack()
        ).all()
        for values in zero:
            assert (
                (values >= 0) & (values <= grid.code_max(c.bits)) & (values == values.round())
            ).all()


def test_loss_rises_when_the_metric_is_wrong() -> None:
    # What the property above is there to see.
    c = case(N=20, K=30)
    wrong = c._replace(hessian=c.H - 0.7 * c.H.diagonal().diag())
    assert (loss(c, *clip(wrong)) > loss(c, c.codes, c.scales) + c.slack()).any()
    assert (loss(c, *shift(wrong)) > loss(c, c.codes, c.scales) + c.slack()).any()


@pytest.mark.parametrize(("B", "n", "K"), [(3, 5, 14), (7, 1, 9), (4, 2, 1)], ids=str)
def test_blocks_are_descended_as_if_one_at_a_time(B: int, n: int, K: int) -> None:
    c = case(B * n, K, B=B)
    for way in (clip, shift):
        codes, scales, *zero = way(c)
        parts = [way(c.block(b)) for b in range(B)]
        assert torch.equal(codes, torch.cat([part[0] for part in parts]))
        assert_close(
            scales,
            torch.cat([part[1] for part in parts]),
            rtol=torch.finfo(torch.float32).eps,
            atol=0,
        )
        assert all(torch.equal(zero[0], torch.cat([part[2] for part in parts])) for _ in zero)


def test_both_gain() -> None:
    c = case(N=40, K=40, g=8)
    assert loss(c, *clip(c)).sum() < 0.9 * c.loss(c.codes).sum()
    assert loss(c, *shift(c)).sum() < 0.9 * c.loss(c.codes).sum()
    assert (shift(c)[2] != c.zeros).any()


def test_inputs_are_not_modified() -> None:
    for c in (case(), case(6, B=2)):
        kept = [tensor.clone() for tensor in c[:5]]
        clip(c)
        shift(c)
        assert all(torch.equal(a, b) for a, b in zip(c[:5], kept, strict=True))
