"""Grids: codes, scales and zero points against the float64 loops, and what must hold for every grid."""

import math

import pytest
import torch
from oracles import grid as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.numerics import grid

WIDTHS = range(1, 9)
KINDS = [pytest.param(True, id="symmetric"), pytest.param(False, id="asymmetric")]
SHAPES = [
    pytest.param(12, 4, id="whole-groups"),
    pytest.param(11, 4, id="ragged"),
    pytest.param(5, 5, id="one-group"),
    pytest.param(5, 8, id="group-wider-than-row"),
    pytest.param(6, 1, id="groups-of-one"),
]
CLOSE = {"rtol": 1e-10, "atol": 0.0}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


# ---- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_minmax_equals_the_oracle(
    bits: int, symmetric: bool, columns: int, group_size: int
) -> None:
    weight = normal(5, columns, seed=bits)
    scales, zeros = grid.minmax(weight, bits, group_size, symmetric)
    expected_scales, expected_zeros = oracle.minmax_grid(weight, bits, group_size, symmetric)
    assert_close(scales, expected_scales, **CLOSE)
    assert torch.equal(zeros.long(), expected_zeros)


@pytest.mark.parametrize("symmetric", KINDS)
def test_minmax_differs_from_the_oracle_when_group_borders_are_shifted(symmetric: bool) -> None:
    weight = normal(5, 11)
    scales, _ = grid.minmax(weight, 3, 4, symmetric)
    expected, _ = oracle.minmax_grid(weight.roll(1, dims=1), 3, 4, symmetric)
    with pytest.raises(AssertionError):
        assert_close(scales, expected, **CLOSE)


@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_and_dequantize_equal_the_oracle(
    bits: int, symmetric: bool, columns: int, group_size: int
) -> None:
    weight = normal(5, columns, seed=bits)
    scales, zeros = grid.minmax(
        0.6 * weight, bits, group_size, symmetric
    )  # some weights are clipped
    codes = grid.quantize(weight, scales, zeros, bits, group_size)
    expected = oracle.quantize(weight, scales, zeros, bits, group_size)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.long(), expected)
    values = grid.dequantize(codes, scales, zeros, group_size, torch.float64)
    assert_close(values, oracle.dequantize(expected, scales, zeros, group_size), **CLOSE)


def test_quantize_differs_from_the_oracle_when_zero_points_are_shifted() -> None:
    weight = normal(5, 11)
    scales, zeros = grid.minmax(weight, 3, 4, symmetric=False)
    codes = grid.quantize(weight, scales, zeros, 3, 4)
    assert not torch.equal(
        codes.long(), oracle.quantize(weight, scales, zeros.roll(1, dims=1), 3, 4)
    )


def test_dequantize_differs_from_the_oracle_when_group_borders_are_shifted() -> None:
    weight = normal(5, 11)
    scales, zeros = grid.minmax(weight, 3, 4, symmetric=False)
    codes = grid.quantize(weight, scales, zeros, 3, 4)
    shifted = oracle.dequantize(codes.roll(1, dims=1), scales, zeros, 4).roll(-1, dims=1)
    with pytest.raises(AssertionError):
        assert_close(grid.dequantize(codes, scales, zeros, 4, torch.float64), shifted, **CLOSE)


@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_offsets_equal_the_oracle(bits: int, columns: int, group_size: int) -> None:
    codes, groups = some_codes(5, columns, bits), grid.group_count(columns, group_size)
    scales, offsets = normal(5, groups), normal(5, groups, seed=1)
    values = grid.with_offsets(codes, scales, offsets, group_size, torch.float64)
    expected = oracle.with_offsets(codes, scales, offsets, group_size)
    assert_close(values, expected, **CLOSE)
    if groups > 1:
        with pytest.raises(AssertionError):
            assert_close(
                values,
                oracle.with_offsets(codes, scales, offsets.roll(1, dims=1), group_size),
                **CLOSE,
            )


@pytest.mark.parametrize("one_a_row", [True, False], ids=["one a row", "one a group"])
@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
@pytest.mark.parametrize("bits", range(1, 5))
def test_tables_equal_the_oracle(bits: int, columns: int, group_size: int, one_a_row: bool) -> None:
    codes = some_codes(5, columns, bits)
    tables = normal(5, 1 if one_a_row else grid.group_count(columns, group_size), 2**bits)
    values = grid.look_up(codes, tables, group_size, torch.float64)
    assert torch.equal(values, oracle.look_up(codes, tables, group_size))
    assert not torch.equal(values, oracle.look_up(codes, tables.roll(1, dims=2), group_size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_and_sums_are_rounded_once(dtype: torch.dtype) -> None:
    codes, scales, offsets = (
        some_codes(50, 64, 4),
        normal(50, 4).to(dtype),
        normal(50, 4, seed=1).to(dtype),
    )
    exact = grid.with_offsets(codes, scales, offsets, 16)
    assert torch.equal(grid.with_offsets(codes, scales, offsets, 16, dtype), exact.to(dtype))
    twice = (codes * scales.repeat_interleave(16, 1)) + offsets.repeat_interleave(16, 1)
    assert not torch.equal(twice, exact.to(dtype))


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "group_size"), SHAPES)
def test_flattening_inverts_to_groups(columns: int, group_size: int) -> None:
    values = normal(2, 3, columns)
    groups = grid.to_groups(values, group_size)
    assert groups.shape == (2, 3, grid.group_count(columns, group_size), group_size)
    assert torch.equal(groups.flatten(-2)[..., :columns], values)


def test_to_groups_fills_the_short_group_with_zeros() -> None:
    groups = grid.to_groups(torch.arange(1.0, 6.0), 3)
    assert groups.tolist() == [[1, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_code_max_is_the_largest_code(bits: int) -> None:
    assert grid.code_max(bits) == int("1" * bits, 2)


# ---- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_of_dequantize_is_identity(bits: int, symmetric: bool) -> None:
    codes = some_codes(4, 13, bits)
    scales = normal(4, 4, seed=1, dtype=torch.float32).abs() + 0.1
    zeros = torch.full((4, 4), 2 ** (bits - 1)) if symmetric else some_codes(4, 4, bits, seed=2)
    weight = grid.dequantize(codes, scales, zeros, 4)
    assert torch.equal(grid.quantize(weight, scales, zeros, bits, 4), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_minmax_asymmetric_is_off_by_at_most_half_a_step_but_at_the_ends(bits: int) -> None:
    # z = round(−low / s) moves the grid by up to half a step, so an end may be clipped by another half.
    weight = normal(6, 20)
    scales, zeros = grid.minmax(weight, bits, 8, symmetric=False)
    error = (
        grid.dequantize(
            grid.quantize(weight, scales, zeros, bits, 8), scales, zeros, 8, torch.float64
        )
        - weight
    )
    assert (error.abs() <= scales.repeat_interleave(8, 1)[:, :20] * (1 + 1e-12)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_minmax_symmetric_is_off_by_at_most_half_a_step(bits: int) -> None:
    weight = normal(6, 20)
    scales, zeros = grid.minmax(weight, bits, 8, symmetric=True)
    error = (
        grid.dequantize(
            grid.quantize(weight, scales, zeros, bits, 8), scales, zeros, 8, torch.float64
        )
        - weight
    )
    assert (error.abs() <= scales.repeat_interleave(8, 1)[:, :20] * (0.5 + 1e-12)).all()


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("value", [0.0, 0.75, -0.75], ids=["zeros", "positive", "negative"])
def test_minmax_of_a_constant_group_has_a_positive_finite_scale(
    value: float, bits: int, symmetric: bool
) -> None:
    scales, zeros = grid.minmax(torch.full((2, 6), value), bits, 3, symmetric)
    assert (torch.isfinite(scales) & (scales > 0)).all()
    assert ((zeros >= 0) & (zeros <= grid.code_max(bits))).all()
    if value == 0:
        codes = grid.quantize(torch.zeros(2, 6), scales, zeros, bits, 3)
        assert torch.equal(grid.dequantize(codes, scales, zeros, 3), torch.zeros(2, 6))
        assert torch.equal(scales, torch.ones(2, 2))


def test_minmax_symmetric_at_one_bit_fits_the_negative_side() -> None:
    scales, zeros = grid.minmax(torch.tensor([[-0.5, 2.0], [0.25, 2.0]]), 1, 2, symmetric=True)
    assert scales.tolist() == [[0.5], [2.0]]
    assert zeros.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_scaling_the_weight_by_a_power_of_two_leaves_the_codes_unchanged(
    bits: int, symmetric: bool
) -> None:
    weight = normal(4, 10, dtype=torch.float32)
    scales, zeros = grid.minmax(weight, bits, 4, symmetric)
    scales_8, zeros_8 = grid.minmax(8 * weight, bits, 4, symmetric)
    assert torch.equal(scales_8, 8 * scales)
    assert torch.equal(zeros_8, zeros)
    codes = grid.quantize(weight, scales, zeros, bits, 4)
    assert torch.equal(grid.quantize(8 * weight, scales_8, zeros_8, bits, 4), codes)


def test_rounding_is_half_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    assert grid.quantize(weight, torch.ones(1, 1), torch.full((1, 1), 4), 3, 5).tolist() == [
        [4, 6, 6, 4, 2]
    ]


def test_values_beyond_the_grid_are_clipped() -> None:
    weight = torch.tensor([[1e6, -1e6]])
    assert grid.quantize(weight, torch.ones(1, 1), torch.full((1, 1), 2), 3, 2).tolist() == [[7, 0]]


def test_centered_subtracts_the_zero_point_of_the_group() -> None:
    codes, zeros = some_codes(3, 7, 8), some_codes(3, 3, 8, seed=1)
    expected = oracle.dequantize(codes, torch.ones(3, 3, dtype=torch.float64), zeros, 3)
    assert torch.equal(grid.centered(codes, zeros, 3, torch.float64), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_dequantize_rounds_once(dtype: torch.dtype) -> None:
    codes, zeros = some_codes(16, 32, 8), some_codes(16, 4, 8, seed=1)
    scales = (normal(16, 4, seed=2).abs() + 0.01).to(torch.float16)
    exact = oracle.dequantize(
        codes, scales, zeros, 8
    )  # 9 bits times 11 bits: float32 holds the product exactly
    values = grid.dequantize(codes, scales, zeros, 8, dtype)
    assert values.dtype == dtype
    assert torch.equal(values, exact.to(dtype))


def test_functions_leave_their_arguments_as_they_are() -> None:
    weight = normal(3, 7)
    kept = weight.clone()
    for group_size in (1, 3, 7):
        for symmetric in (True, False):
            scales, zeros = grid.minmax(weight, 2, group_size, symmetric)
            grids = scales.clone(), zeros.clone()
            codes = grid.quantize(weight, scales, zeros, 2, group_size)
            kept_codes = codes.clone()
            grid.dequantize(codes, scales, zeros, group_size)
            grid.nearest_levels(weight, scales[:, :1], zeros[:, :1], 2)
            grid.storable(scales, torch.float16)
            assert torch.equal(scales, grids[0])
            assert torch.equal(zeros, grids[1])
            assert torch.equal(codes, kept_codes)
    assert torch.equal(weight, kept)


# ---- scales as they are stored ---------------------------------------------------------------------------------------

STORED = [
    pytest.param(torch.float16, id="float16"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float32, id="float32"),
]


@pytest.mark.parametrize("dtype", STORED)
def test_storable_scales_survive_storage_exactly(dtype: torch.dtype) -> None:
    scales = normal(50, dtype=torch.float32).exp()
    stored = grid.storable(scales, dtype)
    assert stored.dtype == scales.dtype
    assert torch.equal(stored, stored.to(dtype).to(torch.float32))
    assert torch.equal(stored, scales.to(dtype).to(torch.float32))


@pytest.mark.parametrize("dtype", STORED)
def test_storable_scales_stay_positive_and_finite(dtype: torch.dtype) -> None:
    stored = grid.storable(torch.tensor([1e-300, 1e-30, 1e30, 1e300], dtype=torch.float64), dtype)
    assert (torch.isfinite(stored) & (stored > 0)).all()
    assert torch.equal(stored, stored.to(dtype).to(torch.float64))


def test_storable_scales_use_the_subnormal_range_of_float16() -> None:
    # float16 holds 1e-5 to within half of its spacing there, 2^-24; it must not become 6.1e-5.
    scale = torch.tensor([1e-5])
    assert math.isclose(float(grid.storable(scale, torch.float16)), 1e-5, abs_tol=2**-25, rel_tol=0)
