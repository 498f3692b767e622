"""Weights of the kinds that are no integer grids, made by hand: float offsets, and look-up tables
for rows or groups.
"""

import torch
from torch import Tensor

from tsq_layers.numerics import grid
from tsq_layers.numerics.weight import QuantizedWeight

KINDS = ("offsets", "row tables", "group tables")


def made(
    kind: str,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
    values: Tensor | None = None,
) -> QuantizedWeight:
    """Normal values, or those that are given, each at the nearest level of a random grid."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) if values is None else values.float()
    groups = grid.group_count(columns, group_size)
    levels = torch.arange(1 << bits)
    if kind == "offsets":
        scales = (0.1 + torch.rand(rows, groups, generator=generator)).to(scale_dtype)
        offsets = torch.randn(rows, groups, generator=generator).to(scale_dtype)
        tables = scales.float().unsqueeze(-1) * levels + offsets.float().unsqueeze(-1)
        codes = nearest(values, tables, group_size)
        return QuantizedWeight(
            codes,
            scales,
            torch.zeros_like(scales, dtype=torch.uint8),
            bits,
            group_size,
            False,
            offsets,
        )
    count = 1 if kind == "row tables" else groups
    tables = torch.randn(rows, count, 1 << bits, generator=generator).to(scale_dtype)
    empty = torch.empty(rows, 0, dtype=scale_dtype)
    codes = nearest(values, tables.float(), columns if count == 1 else group_size)
    return QuantizedWeight(
        codes, empty, empty.to(torch.uint8), bits, group_size, False, tables=tables
    )


def nearest(values: Tensor, tables: Tensor, group_size: int) -> Tensor:
    """The codes of the nearest levels, uint8 (N, K)."""
    distances = (grid.to_groups(values, group_size).unsqueeze(-1) - tables.unsqueeze(-2)).abs()
    return distances.argmin(-1).flatten(1)[:, : values.shape[1]].to(torch.uint8)


def parts_of(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Every tensor, floats as their raw bits."""
    found = {name: value for name, value in vars(weight).items() if isinstance(value, Tensor)}
    return {
        name: value if value.dtype == torch.uint8 else raw_bits(value)
        for name, value in found.items()
    }


def raw_bits(values: Tensor) -> Tensor:
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def assert_same(weight: QuantizedWeight, other: QuantizedWeight) -> None:
    """Equal in every bit."""
    ours, theirs = parts_of(weight), parts_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    plain = ("bits", "group_size", "symmetric")
    assert [getattr(weight, name) for name in plain] == [getattr(other, name) for name in plain]
