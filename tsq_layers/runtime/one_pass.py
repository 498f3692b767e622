"""One pass over the words of a packed layer, for few rows of input: an unrolled sum that Inductor turns into one loop.

A row of the weight is cut into T segments of R runs of h columns; segment t are fields t of the words
(see :mod:`tsq_layers.numerics.packing`), and the scale is constant in a run.

Shapes: N rows of the weight (outputs), K columns (inputs), G groups a row, W words a row, M rows of
input, L = 2^bits levels of a table.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.numerics import packing
from tsq_layers.numerics.weight import WeightFormat
from tsq_layers.runtime.parts import Parts

_SHORTEST_RUN = 4
"""Shorter runs of one scale fill no vector; the weight is then dequantised first."""

# Each plane, and its segments of words (N, R, h).
_Planes = list[tuple[packing.Plane, tuple[Tensor, ...]]]


def one_pass(format: WeightFormat, columns: int) -> bool:
    """Return whether few rows of input are done in one pass over the words.

    The segments of all planes must fit into one another, and runs of one scale must not be too
    short: both hold when K is a multiple of 32 and K·bits/32 has a factor in common with the groups.
    """
    if format.grid not in _SEGMENTS:
        return False
    layout = packing.planes(columns, format.bits)
    base = layout[-1]
    nested = all(plane.words * base.bits == base.words * plane.bits for plane in layout)
    return nested and _run_length(format, columns) >= _SHORTEST_RUN


def few_rows(
    x_MK: Tensor, parts: Parts, bias: Tensor | None, format: WeightFormat, columns: int
) -> Tensor:
    """The sum over segments t of ``x[t] · weight[t]``, and then over runs; arguments as of ``kernels.linear``.

    float32 (float64 for float64 inputs), (M, N).
    """
    layout = packing.planes(columns, format.bits)
    base = layout[-1]
    h = _run_length(format, columns)
    runs = _Runs(base.fields, base.words // h, h, format, columns)
    T, R = runs.segments, runs.per_segment
    working = torch.float64 if torch.float64 in (x_MK.dtype, parts.grids.dtype) else torch.float32
    x_MTRh = F.pad(x_MK.to(working), (0, T * R * h - columns)).reshape(-1, T, R, h)
    # A wider plane has several of the base's segments in each of its own: (N, segments, R, h).
    rows = parts.words.shape[0]
    planes = [
        (plane, parts.words.narrow(1, plane.start, plane.words).view(rows, -1, R, h).unbind(1))
        for plane in layout
    ]
    segments = _SEGMENTS[format.grid](planes, parts.grids.to(working), parts.shifts, runs)
    total = reduce(
        torch.add,
        [segment * x_MTRh.select(1, t).unsqueeze(1) for t, segment in enumerate(segments)],
    )
    y_MN = total.sum((-1, -2))
    return y_MN if bias is None else y_MN + bias


class _Runs(NamedTuple):
    """The cut of a row: T segments of R runs of h columns, with one scale in a run."""

    segments: int
    per_segment: int
    length: int
    format: WeightFormat
    columns: int


def _with_zeros(
    planes: _Planes, scales: Tensor, zero_words: Tensor | None, runs: _Runs
) -> list[Tensor]:
    """``scales · (codes − zeros)`` of each segment, (N, R, h)."""
    bits = runs.format.bits
    scales_NTR = _per_run(scales, runs)
    zeros_NTR = None
    if zero_words is not None:
        zeros = packing.unpack(zero_words, bits, scales.shape[1])
        zeros_NTR = _per_run(zeros.to(torch.int32), runs)
    segments = []
    for t in range(runs.segments):
        zero = 2 ** (bits - 1) if zeros_NTR is None else zeros_NTR.select(1, t)
        # Subtracted as integers: the zero point's share of the sum would cancel, and cost digits.
        levels = _codes(planes, t) - zero
        segments.append(levels.to(scales.dtype) * scales_NTR.select(1, t))
    return segments


def _with_offsets(
    planes: _Planes, scales: Tensor, offsets: Tensor | None, runs: _Runs
) -> list[Tensor]:
    """``scales · codes + offsets`` of each segment, (N, R, h): added to each weight, for the same reason."""
    assert offsets is not None
    scales_NTR = _per_run(scales, runs)
    offsets_NTR = _per_run(offsets.to(scales.dtype), runs)
    return [
        _codes(planes, t).to(scales.dtype) * scales_NTR.select(1, t) + offsets_NTR.select(1, t)
        for t in range(runs.segments)
    ]


def _looked_up(planes: _Planes, tables: Tensor, _: Tensor | None, runs: _Runs) -> list[Tensor]:
    """``table[code]`` of each segment, (N, R, h): each bit of the code halves the levels.

    Inductor makes scalar loads of a gather, 30 times slower than these selections.
    """
    levels_LNTR = [_per_run(level, runs) for level in tables.unbind(-1)]
    segments = []
    for t in range(runs.segments):
        levels = [level.select(1, t) for level in levels_LNTR]
        for bit in _bits(planes, t):
            levels = [
                torch.where(bit, high, low)
                for low, high in zip(levels[::2], levels[1::2], strict=True)
            ]
        segments.append(levels[0])
    return segments


_SEGMENTS: dict[str, Callable[[_Planes, Tensor, Tensor | None, _Runs], list[Tensor]]] = {
    "symmetric": _with_zeros,
    "zero_points": _with_zeros,
    "offsets": _with_offsets,
    "row_tables": _looked_up,
    "group_tables": _looked_up,
}
"""Kind of grid → the weight of each segment. Other kinds are dequantised first."""


def _codes(planes: _Planes, t: int) -> Tensor:
    """Codes of segment t, int32 (N, R, h)."""
    return reduce(
        torch.add,
        [
            packing.field_of(segments[t % len(segments)], plane, t // len(segments))
            for plane, segments in planes
        ],
    )


def _bits(planes: _Planes, t: int) -> list[Tensor]:
    """The bits of the codes of segment t, the lowest first, bool (N, R, h): each shifted to where the sign is."""
    bits: list[Tensor] = []
    for plane, segments in planes:
        words, field = segments[t % len(segments)], t // len(segments)
        # How far from the sign its lowest bit is.
        first = packing.WORD_BITS - 1 - plane.bits * field
        bits += [(words << (first - place)) < 0 for place in range(plane.bits)]
    return bits


def _run_length(format: WeightFormat, columns: int) -> int:
    """h, the longest run that tiles every segment and crosses no group's border."""
    segment = packing.planes(columns, format.bits)[-1].words
    if format.has_one_group(columns):
        return segment
    return math.gcd(segment, format.group_columns(columns))


def _per_run(values_NG: Tensor, runs: _Runs) -> Tensor:
    """Values per group as values per run, (N, T, R, 1); runs behind the last column get 0."""
    count = runs.segments * runs.per_segment
    repeats = count
    if not runs.format.has_one_group(runs.columns):
        repeats = runs.format.group_columns(runs.columns) // runs.length
    values = values_NG.repeat_interleave(repeats, dim=1)
    return F.pad(values, (0, count - values.shape[1])).reshape(
        -1, runs.segments, runs.per_segment, 1
    )
