"""Compute what pictures show: losses, bits and seconds of layers, and marks of the axes."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from tsq_layers.reports.layer import STEPS, LayerReport

TIMED_STEPS = ("factorise", *STEPS)

_NAMED = 16  # at most this many layers are named one by one on an axis
_LONGEST = 24  # characters of such a name
_BLOCK_LABELS = 18
_LABEL_SPACE = 150  # characters that fit side by side
_MANY = 400  # more layers than this are a cloud of points


@dataclass(frozen=True, kw_only=True)
class LayerAxis:
    """Marks of an axis along which layer i stands at i.

    Args:
        title: what the marks are.
        ticks: position and text of each.
        blocks: start and end of each run of layers that belong together; empty if there are none.
        slanted: whether the texts are names, too long to stand side by side.
    """

    title: str
    ticks: tuple[tuple[float, str], ...]
    blocks: tuple[tuple[int, int], ...] = ()
    slanted: bool = False


def positive(value: float | None) -> float | None:
    """The value, if it has a place on a logarithmic axis."""
    return value if value is not None and math.isfinite(value) and value > 0 else None


def final_loss(layer: LayerReport) -> float | None:
    """The loss after the last step; ``None`` if it is missing or not finite."""
    return _final(layer.losses)


def final_held_out(layer: LayerReport) -> float | None:
    """The same on tokens that the solver did not see."""
    return _final(layer.held_out_losses)


def _final(losses: Mapping[str, float]) -> float | None:
    value = losses[steps([losses], STEPS)[-1]] if losses else math.nan
    return value if math.isfinite(value) else None


def seconds(layer: LayerReport) -> float:
    """Finite seconds over all steps."""
    return sum(value for value in layer.seconds.values() if math.isfinite(value))


def bits(layers: Sequence[LayerReport]) -> tuple[list[float], list[float]]:
    """Bits of the codes of each layer, and bits per weight with everything that is stored; 0 where unknown."""
    codes = [float(layer.bits or 0) for layer in layers]
    totals = [layer.bits_per_weight or 0.0 for layer in layers]
    return codes, [max(code, whole) for code, whole in zip(codes, totals, strict=True)]


def stacked_seconds(layers: Sequence[LayerReport]) -> list[tuple[str, list[float], list[float]]]:
    """Every step, with the lower and the upper end of its part of each layer's bar."""
    stacked, base = [], [0.0] * len(layers)
    for step in steps((layer.seconds for layer in layers), TIMED_STEPS):
        heights = [layer.seconds.get(step, 0.0) for layer in layers]
        top = [
            low + value if math.isfinite(value) else low
            for low, value in zip(base, heights, strict=True)
        ]
        stacked.append((step, base, top))
        base = top
    return stacked


def steps(mappings: Iterable[Mapping[str, float]], known: Sequence[str]) -> list[str]:
    """All keys: those known in their order, then the others as they come.

    Example:
        >>> steps([{"polish": 1.0, "assign": 2.0}], STEPS)
        ['assign', 'polish']
    """
    names = list(dict.fromkeys(key for mapping in mappings for key in mapping))
    return [key for key in known if key in names] + [key for key in names if key not in known]


def short_names(names: Sequence[str]) -> list[str]:
    """The shortest dotted tail of each name that no other name ends with.

    Example:
        >>> short_names(["model.0.up", "model.1.up", "model.1.down"])
        ['0.up', '1.up', 'down']
    """
    parts = [name.split(".") for name in names]
    counts: dict[str, int] = {}
    for tail in (tail for name in parts for tail in _tails(name)):
        counts[tail] = counts.get(tail, 0) + 1
    return [
        next((tail for tail in _tails(name) if counts[tail] == 1), ".".join(name)) for name in parts
    ]


def _tails(parts: Sequence[str]) -> Iterator[str]:
    return (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))


def layer_axis(names: Sequence[str]) -> LayerAxis:
    """Marks for layers with these names: the names, if they are few; else their blocks; else their numbers."""
    blocks = _blocks(names)
    if len(names) <= _NAMED:
        texts = [
            text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"
            for text in short_names(names)
        ]
        ticks = tuple((float(index), text or "(model)") for index, text in enumerate(texts))
        spans = tuple((start, end) for _, _, start, end in blocks)
        return LayerAxis(title="layer", ticks=ticks, blocks=spans, slanted=True)
    if not blocks:
        numbers = linear_ticks(len(names) - 1, 10)
        return LayerAxis(title="layer", ticks=tuple((number, f"{number:g}") for number in numbers))
    families = list(dict.fromkeys(family for family, _, _, _ in blocks))
    labels = (
        dict(zip(families, short_names(families), strict=True))
        if len(families) > 1
        else {families[0]: ""}
    )
    texts = [f"{labels[family]}.{number}".lstrip(".") for family, number, _, _ in blocks]
    most = min(_BLOCK_LABELS, _LABEL_SPACE // (max(map(len, texts)) + 2))
    every = math.ceil(len(blocks) / max(most, 1))
    marks = zip(texts[::every], blocks[::every], strict=True)
    ticks = tuple(((start + end - 1) / 2, text) for text, (_, _, start, end) in marks)
    title = f"{families[0]}.*" if len(families) == 1 and families[0] else "block"
    return LayerAxis(
        title=title, ticks=ticks, blocks=tuple((start, end) for _, _, start, end in blocks)
    )


def _blocks(names: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """Runs of layers whose names agree up to their first number: what stands before it, the number, start, end.

    None where hardly any layer shares its block with another.
    """
    heads = [_head(name) for name in names]
    blocks, start = [], 0
    for (family, number), run in groupby(heads):
        end = start + len(list(run))
        if number:
            blocks.append((family, number, start, end))
        start = end
    covered = sum(end - start for _, _, start, end in blocks)
    return blocks if len(blocks) > 1 and covered >= 2 * len(blocks) else []


def _head(name: str) -> tuple[str, str]:
    """Return the part of a dotted name before its first number, and the number."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:index]), part
    return "", ""


def block_medians(values: Sequence[float | None], axis: LayerAxis) -> list[tuple[int, int, float]]:
    """Start, end and median of each block that has values; nothing where every layer can be told from the next.

    Example:
        >>> axis = LayerAxis(title="block", ticks=(), blocks=((0, 300), (300, 600)))
        >>> block_medians([1.0] * 300 + [2.0] * 299 + [None], axis)
        [(0, 300, 1.0), (300, 600, 2.0)]
    """
    if len(values) <= _MANY:
        return []
    medians = [
        (start, end, [value for value in values[start:end] if value is not None])
        for start, end in axis.blocks
    ]
    return [(start, end, statistics.median(inside)) for start, end, inside in medians if inside]


def linear_ticks(high: float, count: int = 4) -> list[float]:
    """Round values from 0 up to ``high``, about ``count`` of them.

    Example:
        >>> linear_ticks(0.9), linear_ticks(0.0)
        ([0.0, 0.2, 0.4, 0.6, 0.8], [0.0])
    """
    if high <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(high / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * (count + 1) > high)
    return [round(index * step, 12) for index in range(math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Values and texts for a logarithmic axis: powers of ten, and between them if there are few.

    Example:
        >>> log_ticks(0.0005, 0.2), log_ticks(0.04, 0.2)
        ([(0.001, '10⁻³'), (0.01, '10⁻²'), (0.1, '10⁻¹')], [(0.05, '0.05'), (0.1, '0.1'), (0.2, '0.2')])
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        every = math.ceil((last - first) / 8)
        return [(10.0**power, power_of_ten(power)) for power in range(first, last + 1, every)]
    values = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
    inside = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    return [(value, f"{value:.3g}") for value in inside]


def power_of_ten(power: int) -> str:
    """For example ``"10⁻³"``."""
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
