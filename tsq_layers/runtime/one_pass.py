"""One pass over the words of a packed layer, for few rows of input: an unrolled sum that Inductor turns into one loop.

A row of the weight is cut into T segments of R runs of h columns; segment t are fields t of the words
(see :mod:`tsq_layers.numerics.packing`), and the scale is constant in a run.

Shapes: N rows of the weight (outputs), K columns (inputs), G groups a row, W words a row, M rows of
input, L = 2^bits levels of a table.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.numerics import packing

_SHORTEST_RUN = 4
"""Shorter runs of one scale fill no vector; the weight is then dequantised first."""

_Parts = list[
    tuple[packing.Plane, tuple[Tensor, ...]]
]  # each plane, and its segments of words (N, R, h)


class Format(NamedTuple):
    """How codes and groups are laid out: numbers only, which are part of a compiled function."""

    bits: int
    group_size: int
    columns: int


def one_pass(bits: int, group_size: int, columns: int) -> bool:
    """Whether few rows of input are done in one pass over the words.

    The segments of all planes must fit into one another, and runs of one scale must not be too
    short: both hold when K is a multiple of 32 and K·bits/32 has a factor in common with the groups.
    """
    layout = packing.planes(columns, bits)
    base = layout[-1]
    nested = all(plane.words * base.bits == base.words * plane.bits for plane in layout)
    return nested and _run_length(bits, group_size, columns) >= _SHORTEST_RUN


def few_rows(
    x_MK: Tensor,
    words: Tensor,
    grids: Tensor,
    shifts: Tensor | None,
    bias: Tensor | None,
    form: Format,
) -> Tensor:
    """The sum over segments t of ``x[t] · weight[t]``, and then over runs; arguments as of ``kernels.linear``.

    float32 (float64 for float64 inputs), (M, N).
    """
    layout = packing.planes(form.columns, form.bits)
    base, h = layout[-1], _run_length(*form)
    T, R = base.fields, base.words // h
    working = torch.float64 if torch.float64 in (x_MK.dtype, grids.dtype) else torch.float32
    x_MTRh = F.pad(x_MK.to(working), (0, T * R * h - form.columns)).reshape(-1, T, R, h)
    # A wider plane has several of the base's segments in each of its own: (N, segments, R, h).
    rows = words.shape[0]
    parts = [
        (plane, words.narrow(1, plane.start, plane.words).view(rows, -1, R, h).unbind(1))
        for plane in layout
    ]
    grids = grids.to(working)
    if grids.dim() == 3:
        segments = _looked_up(parts, grids, form, (T, R))
    elif shifts is not None and shifts.is_floating_point():
        segments = _with_offsets(parts, grids, shifts.to(working), form, (T, R))
    else:
        segments = _with_zeros(parts, grids, shifts, form, (T, R))
    total = reduce(
        torch.add,
        [segment * x_MTRh.select(1, t).unsqueeze(1) for t, segment in enumerate(segments)],
    )
    y_MN = total.sum((-1, -2))
    return y_MN if bias is None else y_MN + bias


def _with_zeros(
    parts: _Parts, scales: Tensor, zero_words: Tensor | None, form: Format, shape: tuple[int, int]
) -> list[Tensor]:
    """``scales · (codes − zeros)`` of each segment, (N, R, h)."""
    scales_NTR = _per_run(scales, form, shape)
    zeros_NTR = None
    if zero_words is not None:
        zeros = packing.unpack(zero_words, form.bits, scales.shape[1])
        zeros_NTR = _per_run(zeros.to(torch.int32), form, shape)
    segments = []
    for t in range(shape[0]):
        # Subtracted as integers: the zero point's share of the sum would cancel, and cost digits.
        steps = _codes(parts, t) - (
            2 ** (form.bits - 1) if zeros_NTR is None else zeros_NTR.select(1, t)
        )
        segments.append(steps.to(scales.dtype) * scales_NTR.select(1, t))
    return segments


def _with_offsets(
    parts: _Parts, scales: Tensor, offsets: Tensor, form: Format, shape: tuple[int, int]
) -> list[Tensor]:
    """``scales · codes + offsets`` of each segment, (N, R, h): added to each weight, for the same reason."""
    scales_NTR, offsets_NTR = (_per_run(values, form, shape) for values in (scales, offsets))
    return [
        _codes(parts, t).to(scales.dtype) * scales_NTR.select(1, t) + offsets_NTR.select(1, t)
        for t in range(shape[0])
    ]


def _looked_up(parts: _Parts, tables: Tensor, form: Format, shape: tuple[int, int]) -> list[Tensor]:
    """``table[code]`` of each segment, (N, R, h): for each bit of the code, half of the levels are left.

    Inductor makes scalar loads of a gather, 30 times slower than these selections.
    """
    levels_LNTR = [_per_run(level, form, shape) for level in tables.unbind(-1)]
    segments = []
    for t in range(shape[0]):
        levels = [level.select(1, t) for level in levels_LNTR]
        for bit in _bits(parts, t):
            levels = [
                torch.where(bit, high, low)
                for low, high in zip(levels[::2], levels[1::2], strict=True)
            ]
        segments.append(levels[0])
    return segments


def _codes(parts: _Parts, t: int) -> Tensor:
    """Codes of segment t, int32 (N, R, h)."""
    return reduce(
        torch.add,
        [
            packing.field_of(segments[t % len(segments)], plane, t // len(segments))
            for plane, segments in parts
        ],
    )


def _bits(parts: _Parts, t: int) -> list[Tensor]:
    """The bits of the codes of segment t, the lowest first, bool (N, R, h): each shifted to where the sign is."""
    bits: list[Tensor] = []
    for plane, segments in parts:
        words, field = segments[t % len(segments)], t // len(segments)
        first = (
            packing.WORD_BITS - 1 - plane.bits * field
        )  # how far from the sign its lowest bit is
        bits += [(words << (first - place)) < 0 for place in range(plane.bits)]
    return bits


def _run_length(bits: int, group_size: int, columns: int) -> int:
    """h, the longest run that tiles every segment and crosses no group's border."""
    segment = packing.planes(columns, bits)[-1].words
    return segment if group_size >= columns else math.gcd(segment, group_size)


def _per_run(values_NG: Tensor, form: Format, shape: tuple[int, int]) -> Tensor:
    """Values per group as values per run, (N, T, R, 1); runs behind the last column get 0."""
    count = shape[0] * shape[1]
    h = _run_length(*form)
    values = values_NG.repeat_interleave(
        count if form.group_size >= form.columns else form.group_size // h, dim=1
    )
    return F.pad(values, (0, count - values.shape[1])).reshape(-1, *shape, 1)
