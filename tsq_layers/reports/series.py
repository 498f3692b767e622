"""Compute what pictures show: losses, bits and seconds of layers, and marks of the axes."""

import math
import statistics
from collections import Counter
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

Block = tuple[str, str, int, int]
"""A run of layers: the part of their names before the first number, that number, start, end."""


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
    """Return the value if it has a place on a logarithmic axis, else ``None``."""
    if value is None or not math.isfinite(value) or value <= 0:
        return None
    return value


def positives(values: Iterable[float | None]) -> list[float]:
    """Return those of the values that have a place on a logarithmic axis, in their order."""
    places = []
    for value in values:
        place = positive(value)
        if place is not None:
            places.append(place)
    return places


def final_loss(layer: LayerReport) -> float | None:
    """Return the loss after the last step; ``None`` if it is missing or not finite."""
    return _final(layer.losses)


def final_held_out(layer: LayerReport) -> float | None:
    """Return :func:`final_loss` on tokens that the solver did not see."""
    return _final(layer.held_out_losses)


def _final(losses: Mapping[str, float]) -> float | None:
    if not losses:
        return None
    last_step = steps([losses], STEPS)[-1]
    value = losses[last_step]
    return value if math.isfinite(value) else None


def seconds(layer: LayerReport) -> float:
    """Return the sum of the finite seconds over all steps."""
    return sum(value for value in layer.seconds.values() if math.isfinite(value))


def bits(layers: Sequence[LayerReport]) -> tuple[list[float], list[float]]:
    """Return bits of the codes of each layer, and stored bits per weight; 0 where unknown.

    The second number counts scales and zero points too, and is never below the first.
    """
    code_bits = []
    stored_bits = []
    for layer in layers:
        codes = float(layer.bits or 0)
        code_bits.append(codes)
        stored_bits.append(max(codes, layer.bits_per_weight or 0.0))
    return code_bits, stored_bits


def stacked_seconds(layers: Sequence[LayerReport]) -> list[tuple[str, list[float], list[float]]]:
    """Return every step, with the lower and the upper end of its part of each layer's bar."""
    stacked = []
    base = [0.0] * len(layers)
    for step in steps((layer.seconds for layer in layers), TIMED_STEPS):
        top = []
        for low, layer in zip(base, layers, strict=True):
            height = layer.seconds.get(step, 0.0)
            top.append(low + height if math.isfinite(height) else low)
        stacked.append((step, base, top))
        base = top
    return stacked


def steps(mappings: Iterable[Mapping[str, float]], known: Sequence[str]) -> list[str]:
    """Return all keys: those known in their order, then the others as they come.

    Example:
        >>> steps([{"polish": 1.0, "assign": 2.0}], STEPS)
        ['assign', 'polish']
    """
    # A dict keeps the order in which keys were first seen; a set would not.
    names: dict[str, None] = {}
    for mapping in mappings:
        names |= dict.fromkeys(mapping)
    ordered = dict.fromkeys(key for key in known if key in names)
    return list(ordered | names)


def short_names(names: Sequence[str]) -> list[str]:
    """Return the shortest dotted tail of each name that no other name ends with.

    Example:
        >>> short_names(["model.0.up", "model.1.up", "model.1.down"])
        ['0.up', '1.up', 'down']
    """
    counts: Counter[str] = Counter()
    for name in names:
        counts.update(_tails(name))
    short = []
    for name in names:
        unique_tails = (tail for tail in _tails(name) if counts[tail] == 1)
        short.append(next(unique_tails, name))
    return short


def _tails(name: str) -> Iterator[str]:
    """Yield the dotted tails of a name, shortest first."""
    parts = name.split(".")
    for start in range(len(parts) - 1, -1, -1):
        yield ".".join(parts[start:])


def layer_axis(names: Sequence[str]) -> LayerAxis:
    """Return marks for layers with these names.

    The marks are the names, if they are few; else their blocks; else their numbers.
    """
    blocks = _blocks(names)
    if len(names) <= _NAMED:
        return _axis_of_names(names, blocks)
    if blocks:
        return _axis_of_blocks(blocks)
    numbers = linear_ticks(len(names) - 1, 10)
    return LayerAxis(title="layer", ticks=tuple((number, f"{number:g}") for number in numbers))


def _axis_of_names(names: Sequence[str], blocks: Sequence[Block]) -> LayerAxis:
    ticks = []
    for index, text in enumerate(short_names(names)):
        label = text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"
        ticks.append((float(index), label or "(model)"))
    return LayerAxis(title="layer", ticks=tuple(ticks), blocks=_spans(blocks), slanted=True)


def _axis_of_blocks(blocks: Sequence[Block]) -> LayerAxis:
    families = list(dict.fromkeys(family for family, _, _, _ in blocks))
    if len(families) > 1:
        labels = dict(zip(families, short_names(families), strict=True))
        title = "block"
    else:
        # The title names the only family, so that the numbers alone tell its blocks apart.
        labels = {families[0]: ""}
        title = f"{families[0]}.*" if families[0] else "block"
    texts = [f"{labels[family]}.{number}".lstrip(".") for family, number, _, _ in blocks]
    longest = max(map(len, texts))
    most = min(_BLOCK_LABELS, _LABEL_SPACE // (longest + 2))
    every = math.ceil(len(blocks) / max(most, 1))
    ticks = []
    for text, (_, _, start, end) in zip(texts[::every], blocks[::every], strict=True):
        middle = (start + end - 1) / 2
        ticks.append((middle, text))
    return LayerAxis(title=title, ticks=tuple(ticks), blocks=_spans(blocks))


def _spans(blocks: Sequence[Block]) -> tuple[tuple[int, int], ...]:
    return tuple((start, end) for _, _, start, end in blocks)


def _blocks(names: Sequence[str]) -> list[Block]:
    """Return runs of layers whose names agree up to their first number.

    The list is empty where hardly any layer shares its block with another.
    """
    blocks = []
    start = 0
    for (family, number), run in groupby(map(_head, names)):
        end = start + len(list(run))
        if number:
            blocks.append((family, number, start, end))
        start = end
    layers_in_blocks = sum(end - start for _, _, start, end in blocks)
    if len(blocks) < 2 or layers_in_blocks < 2 * len(blocks):
        return []
    return blocks


def _head(name: str) -> tuple[str, str]:
    """Return the part of a dotted name before its first number, and the number."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:index]), part
    return "", ""


def block_medians(values: Sequence[float | None], axis: LayerAxis) -> list[tuple[int, int, float]]:
    """Return start, end and median of each block that has values.

    The list is empty for a picture of few layers, in which each can be told from the next.

    Example:
        >>> axis = LayerAxis(title="block", ticks=(), blocks=((0, 300), (300, 600)))
        >>> block_medians([1.0] * 300 + [2.0] * 299 + [None], axis)
        [(0, 300, 1.0), (300, 600, 2.0)]
    """
    if len(values) <= _MANY:
        return []
    medians = []
    for start, end in axis.blocks:
        numbers = [value for value in values[start:end] if value is not None]
        if numbers:
            medians.append((start, end, statistics.median(numbers)))
    return medians


def linear_ticks(high: float, count: int = 4) -> list[float]:
    """Return round values from 0 up to ``high``, about ``count`` of them.

    Example:
        >>> linear_ticks(0.9), linear_ticks(0.0)
        ([0.0, 0.2, 0.4, 0.6, 0.8], [0.0])
    """
    if high <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(high / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * (count + 1) > high)
    # The margin takes in a last tick that rounding has put just above `high`.
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(last + 1)]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return values and texts for a logarithmic axis: powers of ten, and between them if there are few.

    Example:
        >>> log_ticks(0.0005, 0.2), log_ticks(0.04, 0.2)
        ([(0.001, '10⁻³'), (0.01, '10⁻²'), (0.1, '10⁻¹')], [(0.05, '0.05'), (0.1, '0.1'), (0.2, '0.2')])
    """
    first = math.ceil(math.log10(low) - 1e-9)
    last = math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        every = math.ceil((last - first) / 8)
        return [(10.0**power, power_of_ten(power)) for power in range(first, last + 1, every)]
    ticks = []
    for power in range(first - 1, last + 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**power
            if low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                ticks.append((value, f"{value:.3g}"))
    return ticks


def power_of_ten(power: int) -> str:
    """Return the text of a power of ten, for example ``"10⁻³"``."""
    superscripts = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return "10" + str(power).translate(superscripts)
