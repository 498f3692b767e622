"""Pictures of the page that have a column for every quantised layer: coordinates, and no colours."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tsq_layers.reports import series
from tsq_layers.reports.html.frame import LEFT, RIGHT, Frame, Height
from tsq_layers.reports.layer import STEPS, LayerReport

# Scales of large dots, step by step: a later one leaves a ring of an equal earlier one.
_DOTS = (1.0, 1.25, 0.75)
_LARGE = 6.0

Losses = Mapping[str, Sequence[float | None]]
"""Step → the loss of every layer after it."""

Ticks = tuple[tuple[float, str], ...]
"""Height and text of each mark of a vertical axis."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Marks of one kind: text of the legend, CSS class, the path, and the width of its stroke."""

    label: str
    style: str
    path: str
    stroke: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture with one column for every quantised layer.

    Args:
        title: what it shows.
        unit: of the vertical axis.
        height: of the whole drawing.
        top: y of the upper edge of the plot.
        bottom: y of the lower edge.
        left: x of the first column's left edge.
        right: x of the last column's right edge.
        step: width of a column.
        y_ticks: y and text.
        x_ticks: x and text.
        bands: x and width of every second block, for a shade behind it.
        series: what is drawn, in order.
        slanted: whether the texts below are names that stand slanted.
        x_title: what these texts are.
    """

    title: str
    unit: str
    height: int
    top: int
    bottom: int
    left: int
    right: int
    step: float
    y_ticks: Ticks
    x_ticks: tuple[tuple[float, str], ...]
    bands: tuple[tuple[float, float], ...]
    series: tuple[Series, ...]
    slanted: bool
    x_title: str


def loss_chart(layers: Sequence[LayerReport]) -> Chart | None:
    """Return the losses of quantised layers after each step, on a logarithmic scale.

    ``None`` where no layer has a loss that is positive and finite.
    """
    held_out = [series.positive(series.final_held_out(layer)) for layer in layers]
    by_step = {}
    for step in series.steps((layer.losses for layer in layers), STEPS):
        by_step[step] = [series.positive(layer.losses.get(step)) for layer in layers]
    numbers = series.positives(held_out)
    for values in by_step.values():
        numbers += series.positives(values)
    if not numbers:
        return None
    frame = Frame(count=len(layers), plot=300)
    y, ticks = _logarithmic(frame, min(numbers), max(numbers))
    axis = series.layer_axis([layer.name for layer in layers])
    marks = [_stems(frame, y, by_step), *_dots(frame, y, by_step)]
    rings = frame.rings(y, held_out)
    marks.append(Series(label="held out, last step", style="ring", path=rings, stroke=1.4))
    final_losses = [series.positive(series.final_loss(layer)) for layer in layers]
    medians = frame.levels(y, series.block_medians(final_losses, axis))
    label = "median of a block, last step"
    marks.append(Series(label=label, style="median", path=medians, stroke=2.5))
    title = "Output error of every layer, after each step"
    return _chart(frame, title, "relative error", ticks, marks, axis)


def _stems(frame: Frame, y: Height, by_step: Losses) -> Series:
    """Return lines from the lowest to the highest loss of each layer."""
    ranges = [series.positives(values) for values in zip(*by_step.values(), strict=True)]
    stroke = max(frame.dot / 5, 0.6)
    return Series(label="", style="stem", path=frame.stems(y, ranges), stroke=stroke)


def _dots(frame: Frame, y: Height, by_step: Losses) -> list[Series]:
    dots = []
    for order, (step, values) in enumerate(by_step.items()):
        scale = _DOTS[min(order, 2)] if frame.dot > _LARGE else 1.0
        style = f"dot {_style(step, order)}"
        path = frame.dots(y, values)
        dots.append(Series(label=step, style=style, path=path, stroke=frame.dot * scale))
    return dots


def bar_charts(layers: Sequence[LayerReport]) -> list[Chart]:
    """Return bits and seconds of quantised layers, where there are any."""
    if not layers:
        return []
    axis = series.layer_axis([layer.name for layer in layers])
    charts = (_bits(layers, axis), _seconds(layers, axis))
    return [chart for chart in charts if chart is not None]


def _bits(layers: Sequence[LayerReport], axis: series.LayerAxis) -> Chart | None:
    codes, totals = series.bits(layers)
    if not any(totals):
        return None
    frame = Frame(count=len(layers), plot=90)
    y, ticks = _linear(frame, max(totals))
    base = [0.0] * len(layers)
    code_bars = frame.bars(y, base, codes)
    overhead_bars = frame.bars(y, codes, totals)
    bars = [
        Series(label="codes", style=f"{frame.bar} codes", path=code_bars),
        Series(label="scales and zero points", style=f"{frame.bar} overhead", path=overhead_bars),
    ]
    return _chart(frame, "Stored bits per weight", "bits", ticks, bars, axis)


def _seconds(layers: Sequence[LayerReport], axis: series.LayerAxis) -> Chart | None:
    stacked = series.stacked_seconds(layers)
    highest = max((value for _, _, top in stacked for value in top), default=0.0)
    if highest <= 0:
        return None
    frame = Frame(count=len(layers), plot=120)
    y, ticks = _linear(frame, highest)
    bars = []
    for order, (step, bottom, top) in enumerate(stacked):
        style = f"{frame.bar} {_style(step, order)}"
        bars.append(Series(label=step, style=style, path=frame.bars(y, bottom, top)))
    return _chart(frame, "Seconds in the solver", "seconds", ticks, bars, axis)


def _chart(
    frame: Frame,
    title: str,
    unit: str,
    y_ticks: Ticks,
    drawn: Iterable[Series],
    axis: series.LayerAxis,
) -> Chart:
    bands = []
    for start, end in axis.blocks[1::2]:
        bands.append((frame.x(start - 0.5), (end - start) * frame.step))
    return Chart(
        title=title,
        unit=unit,
        height=frame.bottom + (70 if axis.slanted else 38),
        top=frame.top,
        bottom=frame.bottom,
        left=LEFT,
        right=RIGHT,
        step=frame.step,
        y_ticks=y_ticks,
        x_ticks=tuple((frame.x(place), text) for place, text in axis.ticks),
        bands=tuple(bands),
        series=tuple(part for part in drawn if part.path),
        slanted=axis.slanted,
        x_title="" if axis.slanted else axis.title,
    )


def _logarithmic(frame: Frame, low: float, high: float) -> tuple[Height, Ticks]:
    """Return height of a value, and the marks, for values from ``low`` to ``high``."""
    margin = max(0.04 * math.log10(high / low), 0.05)
    bottom = math.log10(low) - margin
    top = math.log10(high) + margin

    def y(value: float) -> float:
        return frame.bottom - (math.log10(value) - bottom) / (top - bottom) * frame.plot

    return y, tuple((y(value), text) for value, text in series.log_ticks(10**bottom, 10**top))


def _linear(frame: Frame, high: float) -> tuple[Height, Ticks]:
    """Return height of a value, and the marks, for values from 0 to ``high``."""

    def y(value: float) -> float:
        return frame.bottom - value / (high * 1.05) * frame.plot

    return y, tuple((y(value), f"{value:g}") for value in series.linear_ticks(high))


def _style(step: str, order: int) -> str:
    """Return the CSS class of a step; unknown ones get one of three spare colours."""
    if step in series.TIMED_STEPS:
        return f"step-{step}"
    return f"step-more-{order % 3}"
