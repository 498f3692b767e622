"""GPTQ on static grids: the same codes as explicit compensation, and what must hold for every layer."""

from typing import NamedTuple

import pytest
import torch
from oracles import gptq as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.numerics import grid
from tsq_layers.solver import gptq
from tsq_layers.solver import problem as objective
from tsq_layers.solver.blocks import in_original_order

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Case(NamedTuple):
    """A problem in float64; arguments of `gptq.assign` but for width and group size."""

    target: Tensor
    H: Tensor
    order: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    g: int


def case(
    N: int = 3,
    K: int = 21,
    g: int = 8,
    bits: int = 3,
    symmetric: bool = False,
    act_order: bool = True,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X = normal(2 * K, K) @ (torch.eye(K, dtype=torch.float64) + normal(K, K) / K**0.5)
    H = X.T @ X / len(X)
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(K)
    W = normal(N, K)
    return Case(W, H, order, *grid.minmax(0.8 * W, bits, g, symmetric), bits, g)


def assign(c: Case) -> Tensor:
    factor = objective.factorise(c.H, c.order, 0.01)[1]
    return gptq.assign(c.target, factor, c.order, c.scales, c.zeros, c.bits, c.g).codes


def expected(c: Case) -> Tensor:
    damped = c.H + 0.01 * c.H.diagonal().mean() * torch.eye(len(c.H), dtype=c.H.dtype)
    return oracle.gptq(c.target, damped, c.scales, c.zeros, c.bits, c.g, c.order)


def rounded(c: Case) -> Tensor:
    return grid.quantize(c.target, c.scales, c.zeros, c.bits, c.g)


# ---- against the oracle ----------------------------------------------------------------------------------------------

SIZES = [
    (1, 1, 1),
    (3, 5, 2),
    (2, 16, 4),
    (4, 17, 4),
    (3, 33, 8),
    (5, 40, 40),
    (2, 70, 64),
    (2, 31, 1),
]


@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "as-is"])
@pytest.mark.parametrize(("N", "K", "g"), SIZES, ids=[f"N={N}-K={K}-g={g}" for N, K, g in SIZES])
def test_codes_equal_the_oracle(N: int, K: int, g: int, act_order: bool) -> None:
    c = case(N, K, g, act_order=act_order)
    codes = assign(c)
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    assert torch.equal(codes.long(), expected(c))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_width_equal_the_oracle(bits: int, symmetric: bool) -> None:
    c = case(bits=bits, symmetric=symmetric)
    assert torch.equal(assign(c).long(), expected(c))


CORRUPTED = {
    "order reversed": lambda c: c._replace(order=c.order.flip(0)),
    "group borders shifted": lambda c: c._replace(
        scales=c.scales.roll(1, dims=1), zeros=c.zeros.roll(1, dims=1)
    ),
    "no correlations": lambda c: c._replace(H=c.H.diagonal().diag()),
    "columns of H shifted": lambda c: c._replace(H=c.H.roll((1, 1), dims=(0, 1))),
}


@pytest.mark.parametrize("corrupt", CORRUPTED.values(), ids=CORRUPTED)
def test_codes_differ_from_the_oracle_when_its_input_is_corrupted(corrupt) -> None:
    c = case()
    assert not torch.equal(assign(c).long(), expected(corrupt(c)))


# ---- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [1, 2, 5, 16, 1000])
def test_recursion_does_not_change_the_codes(leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(K=45)
    codes = assign(c)
    monkeypatch.setattr(gptq, "_LEAF", leaf)
    assert torch.equal(assign(c), codes)


@pytest.mark.parametrize("diagonal", ["identity", "diagonal"])
def test_uncorrelated_inputs_give_plain_rounding(diagonal: str) -> None:
    c = case(K=40)
    H = torch.eye(40, dtype=torch.float64) if diagonal == "identity" else c.H.diagonal().diag()
    assert torch.equal(assign(c._replace(H=H)), rounded(c))


def test_zero_hessian_gives_plain_rounding() -> None:
    c = case()
    assert torch.equal(assign(c._replace(H=torch.zeros_like(c.H))), rounded(c))


@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "as-is"])
def test_columns_never_seen_are_rounded(act_order: bool) -> None:
    dead = torch.tensor([0, 7, 20])
    c = case(act_order=act_order)
    c.H[dead], c.H[:, dead] = 0, 0
    codes = assign(c)
    assert torch.equal(codes[:, dead], rounded(c)[:, dead])
    assert not torch.equal(codes, rounded(c))


def test_weights_on_the_grid_keep_their_codes() -> None:
    c = case()
    on_grid = grid.dequantize(rounded(c), c.scales, c.zeros, c.g, torch.float64)
    assert torch.equal(assign(c._replace(target=on_grid)), rounded(c))


def test_one_group_for_the_row_equals_a_group_wider_than_it() -> None:
    c = case(K=21, g=21)
    assert torch.equal(assign(c._replace(g=64)), assign(c))


@pytest.mark.parametrize("factor", [2.0**-20, 4.0, 2.0**20], ids=["2^-20", "4", "2^20"])
def test_scaling_the_inputs_leaves_the_codes_unchanged(factor: float) -> None:
    c = case(K=40)
    assert torch.equal(assign(c._replace(H=factor**2 * c.H)), assign(c))


def test_scaling_weights_and_scales_leaves_the_codes_unchanged() -> None:
    c = case(K=40)
    assert torch.equal(assign(c._replace(target=8 * c.target, scales=8 * c.scales)), assign(c))


def test_permuting_rows_permutes_the_codes() -> None:
    c = case(N=6)
    p = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        assign(c._replace(target=c.target[p], scales=c.scales[p], zeros=c.zeros[p])), assign(c)[p]
    )


def test_permuting_columns_with_their_processing_order_permutes_the_codes() -> None:
    c = case(K=21, g=21)
    p = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    inverse = p.argsort()
    permuted = c._replace(target=c.target[:, p], H=c.H[p][:, p], order=inverse[c.order])
    assert torch.equal(assign(permuted), assign(c)[:, p])


def test_stacked_layers_get_the_codes_that_they_get_alone() -> None:
    c = case(N=6, K=40)
    parts = [
        c._replace(target=c.target[rows], scales=c.scales[rows], zeros=c.zeros[rows])
        for rows in (slice(2), slice(2, 6))
    ]
    assert torch.equal(torch.cat([assign(part) for part in parts]), assign(c))


def test_correlated_inputs_lose_less_than_by_rounding() -> None:
    c = case(N=8, K=64, g=16, bits=2)

    def loss(codes: Tensor) -> float:
        values = grid.dequantize(codes, c.scales, c.zeros, c.g, torch.float64)
        return float(objective.squared_error(values - c.target, c.H).sum())

    assert loss(assign(c)) < loss(rounded(c))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_stay_in_range_when_weights_are_far_outside_of_their_grid(bits: int) -> None:
    c = case(bits=bits)
    codes = assign(c._replace(target=1000 * c.target))
    assert int(codes.max()) <= grid.code_max(bits)


def test_inputs_are_not_modified() -> None:
    c = case(K=40)
    factor = objective.factorise(c.H, c.order, 0.01)[1]
    tensors = (c.target, factor, c.order, c.scales, c.zeros)
    kept = [tensor.clone() for tensor in tensors]
    gptq.assign(*tensors, c.bits, c.g)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


# ---- blocks ----------------------------------------------------------------------------------------------------------


def block_cases(B: int, n: int, K: int, g: int, act_order: bool = True) -> list[Case]:
    return [case(n, K, g, act_order=act_order, seed=seed) for seed in range(B)]


def assign_together(cases: list[Case]) -> Tensor:
    H, order = torch.stack([c.H for c in cases]), torch.stack([c.order for c in cases])
    factor = objective.factorise(H, order, 0.01)[1]
    target, scales, zeros = (
        torch.cat([getattr(c, name) for c in cases]) for name in ("target", "scales", "zeros")
    )
    return gptq.assign(target, factor, order, scales, zeros, cases[0].bits, cases[0].g).codes


BLOCK_SIZES = [
    (3, 2, 21, 8),
    (20, 1, 9, 16),
    (2, 3, 40, 40),
    (4, 1, 1, 1),
    (9, 1, 9, 3),
    (2, 2, 70, 32),
    (1, 3, 33, 8),
]


@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "as-is"])
@pytest.mark.parametrize(
    ("B", "n", "K", "g"),
    BLOCK_SIZES,
    ids=[f"B={B}-n={n}-K={K}-g={g}" for B, n, K, g in BLOCK_SIZES],
)
def test_codes_of_blocks_equal_the_oracle_of_each(
    B: int, n: int, K: int, g: int, act_order: bool
) -> None:
    cases = block_cases(B, n, K, g, act_order)
    codes = assign_together(cases)
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    assert torch.equal(codes.long(), torch.cat([expected(c) for c in cases]))


CORRUPTED_BLOCKS = {
    "H of other blocks": lambda cases: [
        a._replace(H=b.H) for a, b in zip(cases, cases[1:] + cases[:1], strict=True)
    ],
    "orders of other blocks": lambda cases: [
        a._replace(order=b.order) for a, b in zip(cases, cases[1:] + cases[:1], strict=True)
    ],
    "H of one block": lambda cases: [c._replace(H=cases[0].H) for c in cases],
    "blocks exchanged": lambda cases: cases[::-1],
}


@pytest.mark.parametrize("corrupt", CORRUPTED_BLOCKS.values(), ids=CORRUPTED_BLOCKS)
def test_codes_of_blocks_differ_from_the_oracle_when_its_input_is_corrupted(corrupt) -> None:
    cases = block_cases(3, 3, 33, 8)
    wrong = torch.cat([expected(c) for c in corrupt(cases)])
    assert not torch.equal(assign_together(cases).long(), wrong)


@pytest.mark.parametrize("leaf", [1, 5, 1000])
@pytest.mark.parametrize("elements", [1, 2 * 45, 5 * 45, 10**6], ids=lambda e: f"chunk={e}")
def test_recursion_and_chunks_do_not_change_the_codes_of_blocks(
    elements: int, leaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = block_cases(5, 2, 45, 8)
    codes = assign_together(cases)
    monkeypatch.setattr(gptq, "_LEAF", leaf)
    monkeypatch.setattr(gptq, "CHUNK_WEIGHTS", elements)
    assert torch.equal(assign_together(cases), codes)


def test_block_never_seen_is_rounded_and_leaves_the_others_alone() -> None:
    cases = block_cases(3, 2, 21, 8)
    dead = cases[1]._replace(H=torch.zeros_like(cases[1].H))
    found = assign_together([cases[0], dead, cases[2]])
    assert torch.equal(found[2:4], rounded(dead))
    assert torch.equal(found[[0, 1, 4, 5]], torch.cat([assign(cases[0]), assign(cases[2])]))
    assert not torch.equal(assign(cases[1]), rounded(dead))


def test_inputs_with_blocks_are_not_modified() -> None:
    cases = block_cases(3, 2, 40, 8)
    H, order = torch.stack([c.H for c in cases]), torch.stack([c.order for c in cases])
    factor = objective.factorise(H, order, 0.01)[1]
    tensors = (
        torch.cat([c.target for c in cases]),
        factor,
        order,
        *(torch.cat(part) for part in zip(*((c.scales, c.zeros) for c in cases), strict=True)),
    )
    kept = [tensor.clone() for tensor in tensors]
    gptq.assign(*tensors, cases[0].bits, cases[0].g)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


# ---- what the columns leave ------------------------------------------------------------------------------------------


def pattern(cases: list[Case]) -> Tensor:
    """A third of the weights is to stay zero."""
    shape = (sum(len(c.target) for c in cases), cases[0].target.shape[1])
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) > 1 / 3


def left(cases: list[Case], free: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(Q − W') V in processing order and (Q − W') H in the original one, (N, K), and the loss of each row."""
    H, order = torch.stack([c.H for c in cases]), torch.stack([c.order for c in cases])
    factor = objective.factorise(H, order, 0.01)[1]
    target, scales, zeros = (
        torch.cat([getattr(c, name) for c in cases]) for name in ("target", "scales", "zeros")
    )
    found = gptq.assign(target, factor, order, scales, zeros, cases[0].bits, cases[0].g, free)
    pulled = in_original_order(gptq.error_times_hessian(found.whitened, factor), order)
    return found.whitened.mT.flatten(0, 1), pulled, found.loss


def expected_left(cases: list[Case], free: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same by full products with V and H, a block after the other."""
    kept = [None] * len(cases) if free is None else free.split([len(c.target) for c in cases])
    found = []
    for c, own in zip(cases, kept, strict=True):
        damped, factor, *_ = objective.factorise(c.H, c.order, 0.01)
        codes = gptq.assign(c.target, factor, c.order, c.scales, c.zeros, c.bits, c.g, own).codes
        error = grid.dequantize(codes, c.scales, c.zeros, c.g, torch.float64) - c.target
        assert own is None or torch.equal(error[~own], -c.target[~own])
        found.append((error[:, c.order] @ factor, error @ damped, (error @ damped * error).sum(1)))
    whitened, pulled, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
    return whitened, pulled, loss


LEFT = pytest.mark.parametrize(
    ("B", "n", "K", "g"),
    BLOCK_SIZES,
    ids=[f"B={B}-n={n}-K={K}-g={g}" for B, n, K, g in BLOCK_SIZES],
)


@pytest.mark.parametrize("some_zero", [False, True], ids=["all-free", "some-zero"])
@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "as-is"])
@LEFT
def test_errors_that_the_columns_leave_equal_full_products(
    B: int, n: int, K: int, g: int, act_order: bool, some_zero: bool
) -> None:
    cases = block_cases(B, n, K, g, act_order)
    free = pattern(cases) if some_zero else None
    assert_close(left(cases, free), expected_left(cases, free), **CLOSE)


@pytest.mark.parametrize("panel", [1, 7, 16, 33, 1000])
@pytest.mark.parametrize("elements", [1, 2 * 3 * 33, 10**6], ids=lambda e: f"chunk={e}")
def test_panels_and_chunks_do_not_change_what_is_left(
    panel: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "PANEL_COLUMNS", panel)
    monkeypatch.setattr(gptq, "CHUNK_WEIGHTS", elements)
    cases = block_cases(3, 3, 33, 8)
    assert_close(left(cases), expected_left(cases), **CLOSE)
    assert_close(left(cases[:1]), expected_left(cases[:1]), **CLOSE)


def test_columns_never_seen_leave_nothing_but_their_damping() -> None:
    c = case(K=40)
    c.H[:, 3:9] = c.H[3:9] = 0
    assert_close(left([c]), expected_left([c]), **CLOSE)


@pytest.mark.parametrize("corrupt", [*CORRUPTED.values()], ids=[*CORRUPTED])
def test_what_is_left_differs_from_full_products_when_their_input_is_corrupted(corrupt) -> None:
    c = case(K=40)
    for found, wrong in zip(left([c]), expected_left([corrupt(c)]), strict=True):
        with pytest.raises(AssertionError):
            assert_close(found, wrong, **CLOSE)


@pytest.mark.parametrize("corrupt", CORRUPTED_BLOCKS.values(), ids=CORRUPTED_BLOCKS)
def test_what_is_left_of_blocks_differs_from_full_products_when_their_input_is_corrupted(
    corrupt,
) -> None:
    cases = block_cases(3, 3, 33, 8)
    for found, wrong in zip(left(cases), expected_left(corrupt(cases)), strict=True):
        with pytest.raises(AssertionError):
            assert_close(found, wrong, **CLOSE)


@pytest.mark.parametrize("K", [40, 300])
def test_errors_in_float32_are_within_rounding_of_full_products_in_float64(K: int) -> None:
    c = case(N=6, K=K, g=16, bits=2)
    damped, factor, *_ = objective.factorise(c.H, c.order, 0.01)
    target, factor, scales, zeros = (
        values.float() for values in (c.target, factor, c.scales, c.zeros)
    )
    found = gptq.assign(target, factor, c.order, scales, zeros, 2, 16)
    error = grid.dequantize(found.codes, scales, zeros, 16, torch.float64) - target.double()
    # K roundings of each sum, and one of the weight, twice: in E = (Q − W') V, and in E Vᵀ; |V| |Vᵀ| bounds H and both.
    sizes = (error.abs() + target.abs().double())[:, c.order] @ factor.double().abs()
    bound = in_original_order(2 * K * 2**-24 * sizes @ factor.double().abs().mT, c.order)
    pulled = in_original_order(gptq.error_times_hessian(found.whitened, factor), c.order).double()
    assert ((pulled - error @ damped).abs() <= bound).all()
    assert ((pulled.roll(1, 1) - error @ damped).abs() > bound).any()
    assert bound.max() < 0.05 * pulled.abs().max()
    assert_close(found.loss.double(), (error @ damped * error).sum(1), rtol=2 * K * 2**-24, atol=0)
