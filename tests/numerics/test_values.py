"""The frozen values: every check, and what their methods return."""

import dataclasses
from typing import Any

import pytest
import torch
from grid_kinds import KINDS, made, parts_of
from oracles import grid as oracle
from torch import Tensor
from torch.testing import assert_close

from tsq_layers.errors import LayerError
from tsq_layers.numerics.basis import Basis
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.weight import Outliers, QuantizedWeight


def statistics(columns: int = 3, deviation: bool = True, fill: float = 1.0) -> LayerStatistics:
    square = torch.full((columns, columns), fill)
    return LayerStatistics(square, torch.tensor(5), 2 * square if deviation else None)


def fields(**changes: Any) -> dict[str, Any]:
    """Arguments of a weight of 4 rows and 7 columns, 3 bits, groups of 3, 3 and 1."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(0, 8, shape, generator=generator, dtype=torch.uint8)

    values = {
        "codes": integers(4, 7),
        "scales": torch.rand(4, 3, generator=generator) + 0.1,
        "zeros": integers(4, 3),
        "bits": 3,
        "group_size": 3,
        "symmetric": False,
    }
    return {**values, **changes}


# ---- LayerStatistics -------------------------------------------------------------------------------------------------


def test_statistics_columns_is_the_width() -> None:
    assert statistics(3).columns == 3


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((3, 3), 1), ((1, 3, 3), 1), ((5, 3, 3), 5), ((3, 3, 3), 3), ((4, 1, 1), 4)],
    ids=str,
)
def test_statistics_may_have_blocks(shape: tuple[int, ...], blocks: int) -> None:
    square = torch.rand(shape)
    found = LayerStatistics(square, torch.tensor(5), 2 * square)
    assert (found.columns, found.blocks) == (shape[-1], blocks)
    total = found + found
    assert torch.equal(total.hessian, 2 * square)
    assert torch.equal(total.deviation, 4 * square)
    assert (int(total.count), total.blocks) == (10, blocks)


@pytest.mark.parametrize("other", [(3, 3), (1, 3, 3), (5, 4, 4)], ids=str)
def test_statistics_of_different_layers_do_not_add(other: tuple[int, ...]) -> None:
    first, second = (
        LayerStatistics(torch.ones(shape), torch.tensor(5)) for shape in ((5, 3, 3), other)
    )
    for one, two in ((first, second), (second, first)):
        with pytest.raises(LayerError, match=r"statistics of shapes \(.*\) and \(.*\) do not add"):
            one + two


@pytest.mark.parametrize("deviation", [True, False], ids=["with-deviation", "without-deviation"])
def test_statistics_add(deviation: bool) -> None:
    total = statistics(deviation=deviation) + statistics(deviation=deviation, fill=4.0)
    assert torch.equal(total.hessian, torch.full((3, 3), 5.0))
    assert int(total.count) == 10
    if deviation:
        assert total.deviation is not None
        assert torch.equal(total.deviation, torch.full((3, 3), 10.0))
    else:
        assert total.deviation is None


def test_statistics_with_and_without_deviation_do_not_add() -> None:
    with pytest.raises(LayerError, match="with and without deviation do not add"):
        statistics() + statistics(deviation=False)
    with pytest.raises(LayerError, match="with and without deviation do not add"):
        statistics(deviation=False) + statistics()


BAD_STATISTICS = [
    pytest.param(
        {"hessian": torch.ones(3)}, r"hessian has shape \(3,\); give a square matrix", id="vector"
    ),
    pytest.param(
        {"hessian": torch.ones(3, 4)},
        r"hessian has shape \(3, 4\); give a square matrix",
        id="not-square",
    ),
    pytest.param(
        {"hessian": torch.ones(2, 3, 4)},
        r"shape \(2, 3, 4\); .* one a block \(B, K, K\)",
        id="oblong-blocks",
    ),
    pytest.param(
        {"hessian": torch.ones(0, 3, 3)}, r"hessian has shape \(0, 3, 3\)", id="no-blocks"
    ),
    pytest.param(
        {"hessian": torch.ones(2, 2, 3, 3)},
        r"hessian has shape \(2, 2, 3, 3\)",
        id="four-dimensions",
    ),
    pytest.param(
        {"hessian": torch.ones(3, 3).half()},
        "hessian is torch.float16; give float32 or float64",
        id="half",
    ),
    pytest.param(
        {"hessian": torch.ones(3, 3).int()},
        "hessian is torch.int32; give float32 or float64",
        id="integer",
    ),
    pytest.param(
        {"deviation": torch.ones(4, 4)},
        r"deviation has shape \(4, 4\); the hessian's is \(3, 3\)",
        id="deviation",
    ),
    pytest.param(
        {"deviation": torch.ones(2, 3, 3)},
        r"deviation has shape \(2, 3, 3\)",
        id="deviation-with-blocks-alone",
    ),
    pytest.param(
        {"hessian": torch.ones(2, 3, 3), "deviation": torch.ones(3, 3)},
        r"deviation has shape \(3, 3\); the hessian's is \(2, 3, 3\)",
        id="hessian-with-blocks-alone",
    ),
    pytest.param(
        {"count": torch.ones(3)}, r"count has shape \(3,\); give a scalar tensor", id="count"
    ),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_STATISTICS)
def test_statistics_refuse(wrong: dict[str, Tensor], message: str) -> None:
    good = {"hessian": torch.ones(3, 3), "count": torch.tensor(5), "deviation": None}
    with pytest.raises(LayerError, match=message):
        LayerStatistics(**{**good, **wrong})


def test_statistics_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics().count = torch.tensor(1)  # type: ignore[misc]


# ---- QuantizedWeight -------------------------------------------------------------------------------------------------

BAD_WEIGHTS = [
    pytest.param({"bits": 0}, "bits=0: give 1 to 8", id="no-bits"),
    pytest.param({"bits": 9}, "bits=9: give 1 to 8", id="nine-bits"),
    pytest.param(
        {"codes": torch.ones(4, 7)},
        r"codes are torch.float32 .* give uint8 \(N, K\)",
        id="float-codes",
    ),
    pytest.param(
        {"codes": torch.ones(7).byte()},
        r"codes are .* shape \(7,\); give uint8 \(N, K\)",
        id="codes-vector",
    ),
    pytest.param({"group_size": 0}, "group_size=0: give a positive integer", id="no-group"),
    pytest.param(
        {"scales": torch.ones(4, 2)},
        r"scales have shape \(4, 2\); 4×7 .* groups of 3 need \(4, 3\)",
        id="scales-shape",
    ),
    pytest.param(
        {"zeros": torch.ones(3, 3).byte()},
        r"zeros have shape \(3, 3\); .* need \(4, 3\)",
        id="zeros-shape",
    ),
    pytest.param({"group_size": 4}, r"groups of 4 need \(4, 2\)", id="group-size-of-other-scales"),
    pytest.param(
        {"scales": torch.ones(4, 3).double()},
        "scales are torch.float64; give float16, bfloat16 or float32",
        id="scales-dtype",
    ),
    pytest.param(
        {"zeros": torch.ones(4, 3)}, "zeros are torch.float32; give uint8", id="zeros-dtype"
    ),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_WEIGHTS)
def test_weight_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerError, match=message):
        QuantizedWeight(**fields(**wrong))


BAD_KINDS = [
    pytest.param(
        "offsets",
        {"offsets": torch.ones(4, 2)},
        r"offsets have shape \(4, 2\); .* need \(4, 3\)",
        id="shape",
    ),
    pytest.param(
        "offsets",
        {"offsets": torch.ones(4, 3)},
        "offsets are torch.float32 and scales torch.float16; give both in one dtype",
        id="dtype",
    ),
    pytest.param(
        "offsets", {"symmetric": True}, "float offsets has no zero points", id="symmetric-offsets"
    ),
    pytest.param("offsets", {"tables": torch.ones(4, 1, 8).half()}, "not both", id="both"),
    pytest.param(
        "row tables",
        {"tables": torch.ones(4, 2, 8).half()},
        r"tables have shape \(4, 2, 8\); 4×7 codes of 3 bits in groups of 3 need \(4, 1, 8\) or \(4, 3, 8\)",
        id="number-of-tables",
    ),
    pytest.param(
        "row tables",
        {"tables": torch.ones(4, 1, 4).half()},
        r"shape \(4, 1, 4\)",
        id="number-of-levels",
    ),
    pytest.param(
        "row tables",
        {"tables": torch.ones(4, 1, 8)},
        "tables are torch.float32 and scales",
        id="tables-dtype",
    ),
    pytest.param(
        "group tables",
        {"scales": torch.ones(4, 3).half()},
        r"scales have shape .* need \(4, 0\) beside",
        id="scales",
    ),
    pytest.param(
        "group tables",
        {"zeros": torch.ones(4, 3).byte()},
        r"zeros have shape .* need \(4, 0\) beside",
        id="zeros",
    ),
    pytest.param(
        "group tables",
        {"symmetric": True},
        "look-up tables has no zero points",
        id="symmetric-tables",
    ),
    pytest.param(
        "group tables",
        {"bits": 5},
        "bits=5: look-up tables are of codes of 1 to 4 bits",
        id="five-bits",
    ),
]


@pytest.mark.parametrize(("kind", "wrong", "message"), BAD_KINDS)
def test_weight_with_offsets_or_tables_refuses(
    kind: str, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayerError, match=message):
        dataclasses.replace(made(kind, 4, 7, 3, 3), **wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_with_offsets_or_tables_dequantizes_as_the_oracle(kind: str) -> None:
    weight = made(kind, 4, 7, 3, 3)
    if kind == "offsets":
        expected = oracle.with_offsets(weight.codes, weight.scales, weight.offsets, 3)
    else:
        expected = oracle.look_up(weight.codes, weight.tables, 3)
    assert_close(weight.dequantize(torch.float64), expected, rtol=1e-10, atol=0)
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("offsets", 3 + 2 * 16 * 12 / 28),
        ("row tables", 3 + 16 * 8 * 4 / 28),
        ("group tables", 3 + 16 * 8 * 12 / 28),
    ],
)
def test_weight_counts_the_bits_of_offsets_and_tables(kind: str, expected: float) -> None:
    assert made(kind, 4, 7, 3, 3).bits_per_weight == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_with_offsets_or_tables_is_split(kind: str) -> None:
    weight = made(kind, 4, 7, 3, 3)
    first, second = weight.split([1, 3])
    assert torch.equal(torch.cat([first.dequantize(), second.dequantize()]), weight.dequantize())
    assert parts_of(first).keys() == parts_of(weight).keys()


@pytest.mark.parametrize("bits", range(1, 9))
def test_weight_allows_every_width(bits: int) -> None:
    assert QuantizedWeight(**fields(bits=bits)).bits == bits


def test_weight_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizedWeight(**fields()).bits = 4  # type: ignore[misc]


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weight_dequantizes_as_the_oracle(scale_dtype: torch.dtype) -> None:
    values = fields()
    weight = QuantizedWeight(**{**values, "scales": values["scales"].to(scale_dtype)})
    expected = oracle.dequantize(weight.codes, weight.scales, weight.zeros, 3)
    assert_close(weight.dequantize(torch.float64), expected, rtol=1e-10, atol=0)
    # One product of two float32 values: half a unit in the last place, 2^-24.
    assert_close(weight.dequantize(), expected.float(), rtol=2**-24, atol=0)
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_weight_dequantized_differs_from_the_oracle_when_zero_points_are_shifted() -> None:
    weight = QuantizedWeight(**fields())
    wrong = oracle.dequantize(weight.codes, weight.scales, weight.zeros.roll(1, dims=1), 3)
    with pytest.raises(AssertionError):
        assert_close(weight.dequantize(torch.float64), wrong, rtol=1e-10, atol=0)


def test_weight_moves_with_its_sparse_part_and_its_basis() -> None:
    place = torch.zeros(1, dtype=torch.int32)
    for where in ({"indices": place}, {"columns": place}):
        values = fields()["scales"].new_ones((1,) if "indices" in where else (4, 1))
        weight = QuantizedWeight(
            **fields(outliers=Outliers(values, **where), basis=Basis.rotated(7, 4))
        ).to("meta")
        parts = [weight.codes, weight.outliers.values, weight.outliers.places, weight.basis.signs]
        assert all(part.is_meta for part in parts)
        assert weight.outliers.columns is None or "columns" in where


@pytest.mark.parametrize(
    ("scale_dtype", "symmetric", "expected"),
    [
        pytest.param(torch.float16, True, 3 + 16 * 12 / 28, id="float16-symmetric"),
        pytest.param(torch.float16, False, 3 + 19 * 12 / 28, id="float16-asymmetric"),
        pytest.param(torch.float32, False, 3 + 35 * 12 / 28, id="float32-asymmetric"),
    ],
)
def test_weight_counts_its_stored_bits(
    scale_dtype: torch.dtype, symmetric: bool, expected: float
) -> None:
    values = fields(symmetric=symmetric)
    weight = QuantizedWeight(**{**values, "scales": values["scales"].to(scale_dtype)})
    assert weight.bits_per_weight == pytest.approx(expected, rel=1e-12)


def test_weight_split_cuts_a_stack_into_its_layers() -> None:
    weight = QuantizedWeight(**fields())
    first, second = weight.split([1, 3])
    assert torch.equal(torch.cat([first.dequantize(), second.dequantize()]), weight.dequantize())
    assert [part.codes.shape[0] for part in (first, second)] == [1, 3]
    assert (second.bits, second.group_size, second.symmetric) == (
        weight.bits,
        weight.group_size,
        weight.symmetric,
    )
