"""The one meaning of code, scale, zero point, offset, table, group and rounding; everyone imports it.

A weight is ``scale · (code − zero)``; two other kinds of grids are ``scale · code + offset``, with any
number for an offset, and ``table[code]``, with any levels at all. Codes and zero points are integers in 0 … 2^bits − 1; a
symmetric grid has the zero point 2^(bits−1) everywhere. A group is ``group_size`` consecutive
columns of one row and has one scale and one zero point; the last group of a row may be short.
Rounding is to the nearest integer, ties to even.

Shapes: N rows (output features), K columns (input features), G groups a row, g columns a group, T
tables a row (1 or G), L = 2^bits levels a table.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def code_max(bits: int) -> int:
    """The largest code of this width."""
    return (1 << bits) - 1


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row of ``columns`` entries, the short one included."""
    return -(-columns // group_size)


def to_groups(values_NK: Tensor, group_size: int) -> Tensor:
    """View rows as groups: (…, K) → (…, G, g); a short last group is filled up with zeros."""
    columns = values_NK.shape[-1]
    missing = group_count(columns, group_size) * group_size - columns
    padded = F.pad(values_NK, (0, missing)) if missing else values_NK
    return rearrange(padded, "... (G g) -> ... G g", g=group_size)


def steps(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Nearest integers ``code − zero`` to ``weight / scale``; all arguments broadcast, all float."""
    nearest = (
        weight / scales
    ).round_()  # maximum and minimum: clamp with bounds that broadcast is ten times slower
    torch.maximum(nearest, -zeros, out=nearest)
    return torch.minimum(nearest, code_max(bits) - zeros, out=nearest)


def quantize(
    weight_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor, bits: int, group_size: int
) -> Tensor:
    """Nearest codes of a weight matrix on given grids, uint8 (N, K)."""
    scales_NG1, zeros_NG1 = (
        values.unsqueeze(-1).to(weight_NK.dtype) for values in (scales_NG, zeros_NG)
    )
    codes_NGg = steps(to_groups(weight_NK, group_size), scales_NG1, zeros_NG1, bits) + zeros_NG1
    return _from_groups(codes_NGg.to(torch.uint8), weight_NK.shape[-1])


def centered(
    codes_NK: Tensor, zeros_NG: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The integers ``code − zero`` in a float dtype, (N, K)."""
    centered_NGg = to_groups(codes_NK, group_size).to(dtype) - zeros_NG.unsqueeze(-1).to(dtype)
    return _from_groups(centered_NGg, codes_NK.shape[-1])


def recoded(steps_NK: Tensor, zeros_NG: Tensor, group_size: int) -> Tensor:
    """Inverse of :func:`centered`: the codes of integers ``code − zero``, uint8 (N, K)."""
    codes_NGg = to_groups(steps_NK, group_size) + zeros_NG.unsqueeze(-1).to(steps_NK.dtype)
    return _from_groups(codes_NGg.to(torch.uint8), steps_NK.shape[-1]).contiguous()


def scaled(steps_NK: Tensor, scales_NG: Tensor, group_size: int) -> Tensor:
    """The products of integers ``code − zero`` with the scales of their groups, (N, K)."""
    return _from_groups(
        to_groups(steps_NK, group_size) * scales_NG.unsqueeze(-1), steps_NK.shape[-1]
    )


def dequantize(
    codes_NK: Tensor,
    scales_NG: Tensor,
    zeros_NG: Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight matrix that codes stand for, (N, K).

    The product is taken in float32 (float64 if the scales or ``dtype`` are float64) and rounded
    once to ``dtype``, so that every route from codes to weights gives the same bits.
    """
    working = torch.float64 if torch.float64 in (scales_NG.dtype, dtype) else torch.float32
    steps_NK = centered(codes_NK, zeros_NG, group_size, working)
    return scaled(steps_NK, scales_NG.to(working), group_size).to(dtype)


def with_offsets(
    codes_NK: Tensor,
    scales_NG: Tensor,
    offsets_NG: Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight matrix ``scales · codes + offsets``, (N, K); product and sum as in :func:`dequantize`.

    Example:
        >>> with_offsets(torch.tensor([[0, 1, 3]], dtype=torch.uint8), torch.tensor([[0.5, 2.0]]), torch.tensor([[-0.25, 1.0]]), 2)
        tensor([[-0.2500,  0.2500,  7.0000]])
    """
    working = torch.float64 if torch.float64 in (scales_NG.dtype, dtype) else torch.float32
    products_NGg = to_groups(codes_NK, group_size).to(working) * scales_NG.unsqueeze(-1).to(working)
    return _from_groups(products_NGg + offsets_NG.unsqueeze(-1).to(working), codes_NK.shape[-1]).to(
        dtype
    )


def look_up(
    codes_NK: Tensor, tables_NTL: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight matrix ``table[code]``, (N, K), rounded once to ``dtype``.

    Args:
        codes_NK: uint8, each less than L.
        tables_NTL: levels, one table for each row (T = 1) or each group (T = G).
        group_size: columns that share a table, if T is not 1.
        dtype: of the result.

    Example:
        >>> look_up(torch.tensor([[0, 1, 1]], dtype=torch.uint8), torch.tensor([[[-2.0, 5.0]]]), 2)
        tensor([[-2.,  5.,  5.]])
    """
    one_a_row = tables_NTL.shape[-2] == 1
    codes_NTg = codes_NK.unsqueeze(-2) if one_a_row else to_groups(codes_NK, group_size)
    levels_NTg = tables_NTL.to(dtype).gather(-1, codes_NTg.to(torch.int64))
    return _from_groups(levels_NTg, codes_NK.shape[-1])


def _from_groups(values_NGg: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`to_groups`."""
    return values_NGg.flatten(-2).narrow(-1, 0, columns)


def minmax(weight_NK: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The finest grids that clip nothing: scales and zero points, both float (N, G).

    Zero always is a level. A group of zeros gets scale 1. A symmetric one-bit grid has the levels
    −scale and 0, so it cannot cover positive weights and only its negative side is fitted.
    """
    groups_NGg = to_groups(weight_NK, group_size)
    low_NG = groups_NGg.amin(-1).clamp_(max=0)
    high_NG = groups_NGg.amax(-1).clamp_(min=0)
    if symmetric:
        half = 2 ** (bits - 1)
        scales_NG = torch.maximum(-low_NG / half, high_NG / (half - 1)) if bits > 1 else -low_NG
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
    """Scales as they will be once stored in ``dtype``, in their present dtype.

    A positive scale stays positive and finite: what would become 0 or inf is held at the ends of
    the positive range of ``dtype``.
    """
    return scales.clamp(smallest(dtype), torch.finfo(dtype).max).to(dtype).to(scales.dtype)


def smallest(dtype: torch.dtype) -> float:
    """The smallest scale that ``dtype`` holds; subnormal numbers of float16 count, those of float32 do not.

    Example:
        >>> smallest(torch.float16) == 2.0**-24
        True
    """
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)
