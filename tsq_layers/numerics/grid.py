"""Define code, scale, zero point, offset, table, group and rounding; every other file imports them from here.

A grid is the set of values that a weight may take. There are three kinds:

* ``weight = scale · (code − zero)``, with a zero point that is an integer in 0 … 2^bits − 1. It is
  2^(bits−1) everywhere in a symmetric grid. The integer ``code − zero`` is called a *level*;
* ``weight = scale · code + offset``, with any number as offset;
* ``weight = table[code]``, with any numbers as entries of the table.

A code is an integer in 0 … 2^bits − 1. A group is ``group_size`` consecutive columns of one row, and
has one scale and one zero point or offset; the last group of a row may be short. Rounding is to
the nearest integer, ties to even.

Shapes: N rows (output features), K columns (input features), G groups of a row, g columns of a group,
T tables of a row (1 or G), L = 2^bits entries of a table.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def code_max(bits: int) -> int:
    """Return the largest code, 2^bits − 1."""
    return (1 << bits) - 1


def group_count(columns: int, group_size: int) -> int:
    """Return the number of groups of a row of ``columns`` entries, a short last one included."""
    return -(-columns // group_size)


def to_groups(values_NK: Tensor, group_size: int) -> Tensor:
    """Split rows into groups, (…, K) → (…, G, g); a short last group is filled up with zeros.

    The result is a view if no group is short.
    """
    columns = values_NK.shape[-1]
    padding = group_count(columns, group_size) * group_size - columns
    rows = F.pad(values_NK, (0, padding)) if padding else values_NK
    return rearrange(rows, "... (G g) -> ... G g", g=group_size)


def nearest_levels(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Round ``weight / scale`` to the nearest level ``code − zero`` of the grid.

    Args:
        weight: floating point.
        scales: broadcastable to ``weight``, same dtype.
        zeros: zero points in the same dtype, broadcastable to ``weight``.
        bits: width of a code.

    Returns:
        integers −zero … 2^bits − 1 − zero, in the dtype of ``weight``.
    """
    levels = (weight / scales).round_()
    # clamp with bounds that broadcast is ten times slower than maximum and minimum.
    torch.maximum(levels, -zeros, out=levels)
    return torch.minimum(levels, code_max(bits) - zeros, out=levels)


def quantize(
    weight_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor, bits: int, group_size: int
) -> Tensor:
    """Return the nearest codes of a weight matrix on given grids.

    Args:
        weight_NK: floating point.
        scales_NG: positive, floating point.
        zeros_NG: zero points, integers of any dtype.
        bits: width of a code, 1 to 8.
        group_size: g, columns of a group.

    Returns:
        uint8 (N, K).
    """
    scales_NG1 = scales_NG.unsqueeze(-1).to(weight_NK.dtype)
    zeros_NG1 = zeros_NG.unsqueeze(-1).to(weight_NK.dtype)
    values_NGg = nearest_levels(to_groups(weight_NK, group_size), scales_NG1, zeros_NG1, bits)
    values_NGg = values_NGg + zeros_NG1
    return _from_groups(values_NGg.to(torch.uint8), weight_NK.shape[-1])


def centered(
    codes_NK: Tensor, zeros_NG: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the levels ``code − zero`` of codes (N, K) in a floating-point dtype, (N, K)."""
    centered_NGg = to_groups(codes_NK, group_size).to(dtype) - zeros_NG.unsqueeze(-1).to(dtype)
    return _from_groups(centered_NGg, codes_NK.shape[-1])


def recoded(levels_NK: Tensor, zeros_NG: Tensor, group_size: int) -> Tensor:
    """Return the codes of levels ``code − zero``, uint8 (N, K); the inverse of :func:`centered`."""
    codes_NGg = to_groups(levels_NK, group_size) + zeros_NG.unsqueeze(-1).to(levels_NK.dtype)
    return _from_groups(codes_NGg.to(torch.uint8), levels_NK.shape[-1]).contiguous()


def scaled(levels_NK: Tensor, scales_NG: Tensor, group_size: int) -> Tensor:
    """Multiply levels ``code − zero`` by the scales of their groups, (N, K)."""
    products_NGg = to_groups(levels_NK, group_size) * scales_NG.unsqueeze(-1)
    return _from_groups(products_NGg, levels_NK.shape[-1])


def dequantize(
    codes_NK: Tensor,
    scales_NG: Tensor,
    zeros_NG: Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight matrix ``scale · (code − zero)``, (N, K).

    The product is taken in float32 (float64 if the scales or ``dtype`` are float64) and rounded
    once to ``dtype``, so that every route from codes to weights gives the same bits.

    Args:
        codes_NK: uint8, each in 0 … 2^bits − 1.
        scales_NG: floating point.
        zeros_NG: zero points, of any dtype.
        group_size: g, columns of a group.
        dtype: of the result.
    """
    working_dtype = _working_dtype(scales_NG, dtype)
    levels_NK = centered(codes_NK, zeros_NG, group_size, working_dtype)
    return scaled(levels_NK, scales_NG.to(working_dtype), group_size).to(dtype)


def with_offsets(
    codes_NK: Tensor,
    scales_NG: Tensor,
    offsets_NG: Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight matrix ``scale · code + offset``, (N, K); dtypes and rounding as in :func:`dequantize`.

    Example:
        >>> codes = torch.tensor([[0, 1, 3]], dtype=torch.uint8)
        >>> scales, offsets = torch.tensor([[0.5, 2.0]]), torch.tensor([[-0.25, 1.0]])
        >>> with_offsets(codes, scales, offsets, 2)
        tensor([[-0.2500,  0.2500,  7.0000]])
    """
    working_dtype = _working_dtype(scales_NG, dtype)
    # One expression: a name for the codes would hold a second matrix while the offsets are added.
    scales_NG1 = scales_NG.unsqueeze(-1)
    products_NGg = to_groups(codes_NK, group_size).to(working_dtype) * scales_NG1.to(working_dtype)
    weight_NGg = products_NGg + offsets_NG.unsqueeze(-1).to(working_dtype)
    return _from_groups(weight_NGg, codes_NK.shape[-1]).to(dtype)


def look_up(
    codes_NK: Tensor, tables_NTL: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the weight matrix ``table[code]``, (N, K), rounded once to ``dtype``.

    Args:
        codes_NK: uint8, each less than L.
        tables_NTL: floating point, one table for each row (T = 1) or each group (T = G).
        group_size: g, columns that share a table, if T is not 1.
        dtype: of the result.

    Example:
        >>> look_up(torch.tensor([[0, 1, 1]], dtype=torch.uint8), torch.tensor([[[-2.0, 5.0]]]), 2)
        tensor([[-2.,  5.,  5.]])
    """
    one_table_a_row = tables_NTL.shape[-2] == 1
    codes_NTg = codes_NK.unsqueeze(-2) if one_table_a_row else to_groups(codes_NK, group_size)
    entries_NTg = tables_NTL.to(dtype).gather(-1, codes_NTg.to(torch.int64))
    return _from_groups(entries_NTg, codes_NK.shape[-1])


def _from_groups(values_NGg: Tensor, columns: int) -> Tensor:
    """Join groups to rows, (…, G, g) → (…, K); the inverse of :func:`to_groups`."""
    return values_NGg.flatten(-2).narrow(-1, 0, columns)


def _working_dtype(scales: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights in ``dtype`` are computed before they are rounded to it."""
    return torch.float64 if torch.float64 in (scales.dtype, dtype) else torch.float32


def minmax(weight_NK: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the finest grids that clip no weight.

    Zero is always a value of the grid. The scale of a group of zeros is 1. A symmetric one-bit grid
    has the values −scale and 0, so it cannot hold positive weights; it is fitted to the negative ones.

    Args:
        weight_NK: floating point.
        bits: width of a code.
        group_size: g, columns of a group.
        symmetric: whether the zero point is 2^(bits−1) everywhere.

    Returns:
        scales and zero points, both (N, G) in the dtype of the weight.
    """
    groups_NGg = to_groups(weight_NK, group_size)
    low_NG = groups_NGg.amin(-1).clamp_(max=0)
    high_NG = groups_NGg.amax(-1).clamp_(min=0)
    if symmetric:
        half = 2 ** (bits - 1)
        scales_NG = -low_NG / half  # half is 1 if there is one bit
        if bits > 1:
            scales_NG = torch.maximum(scales_NG, high_NG / (half - 1))
        zeros_NG = torch.full_like(scales_NG, half)
    else:
        scales_NG = (high_NG - low_NG) / code_max(bits)
        zeros_NG = torch.zeros_like(scales_NG)
    fallback_NG = torch.where(high_NG > 0, high_NG, torch.ones_like(high_NG))
    scales_NG = torch.where(scales_NG > 0, scales_NG, fallback_NG)
    if not symmetric:
        zeros_NG = (-low_NG / scales_NG).round_().clamp_(0, code_max(bits))
    return scales_NG, zeros_NG


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive scales to values of ``dtype``, and return them in the dtype that they have.

    A scale stays positive and finite: one that would become 0 or inf is set to the smallest or the
    largest positive value of ``dtype``.
    """
    return scales.clamp(smallest(dtype), torch.finfo(dtype).max).to(dtype).to(scales.dtype)


def smallest(dtype: torch.dtype) -> float:
    """Return the smallest scale that ``dtype`` holds.

    Subnormal numbers count, those of float32 excepted: some devices flush these to zero.

    Example:
        >>> smallest(torch.float16) == 2.0**-24
        True
    """
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
