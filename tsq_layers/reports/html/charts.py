"""The pictures of the page that have a column for every quantised layer: coordinates, and no colours."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tsq_layers.reports import series
from tsq_layers.reports.html.frame import LEFT, RIGHT, Frame, Height
from tsq_layers.reports.layer import STEPS, LayerReport

_DOTS = (
    1.0,
    1.25,
    0.75,
)  # large dots, step by step: a later one leaves a ring of an equal earlier one
_LARGE = 6.0


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
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    bands: tuple[tuple[float, float], ...]
    series: tuple[Series, ...]
    slanted: bool
    x_title: str


def loss_chart(layers: Sequence[LayerReport]) -> Chart | None:
    """Losses of these quantised layers after each step, on a logarithmic scale; ``None`` if there are none."""
    axis = series.layer_axis([layer.name for layer in layers])
    held_out = [series.positive(series.final_held_out(layer)) for layer in layers]
    by_step = {
        step: [series.positive(layer.losses.get(step)) for layer in layers]
        for step in series.steps((layer.losses for layer in layers), STEPS)
    }
    everything = [
        value for values in (*by_step.values(), held_out) for value in values if value is not None
    ]
    if not everything:
        return None
    frame = Frame(count=len(layers), plot=300)
    y, ticks = _logarithmic(frame, min(everything), max(everything))
    ranges = [
        [value for value in values if value is not None]
        for values in zip(*by_step.values(), strict=True)
    ]
    marks = [
        Series(label="", style="stem", path=frame.stems(y, ranges), stroke=max(frame.dot / 5, 0.6))
    ]
    for order, (step, values) in enumerate(by_step.items()):
        size = frame.dot * (_DOTS[min(order, 2)] if frame.dot > _LARGE else 1.0)
        marks.append(
            Series(
                label=step,
                style=f"dot {_style(step, order)}",
                path=frame.dots(y, values),
                stroke=size,
            )
        )
    marks.append(
        Series(label="held out, last step", style="ring", path=frame.rings(y, held_out), stroke=1.4)
    )
    medians = series.block_medians(
        [series.positive(series.final_loss(layer)) for layer in layers], axis
    )
    path = frame.levels(y, medians)
    marks.append(
        Series(label="median of a block, last step", style="median", path=path, stroke=2.5)
    )
    return _chart(
        frame, "Output error of every layer, after each step", "relative error", ticks, marks, axis
    )


def bar_charts(layers: Sequence[LayerReport]) -> list[Chart]:
    """Bits and seconds of these quantised layers, where there are any."""
    if not layers:
        return []
    axis = series.layer_axis([layer.name for layer in layers])
    return [chart for chart in (_bits(layers, axis), _seconds(layers, axis)) if chart is not None]


def _bits(layers: Sequence[LayerReport], axis: series.LayerAxis) -> Chart | None:
    codes, totals = series.bits(layers)
    if not any(totals):
        return None
    frame = Frame(count=len(layers), plot=90)
    y, ticks = _linear(frame, max(totals))
    base = [0.0] * len(layers)
    bars = [
        Series(label="codes", style=f"{frame.bar} codes", path=frame.bars(y, base, codes)),
        Series(
            label="scales and zero points",
            style=f"{frame.bar} overhead",
            path=frame.bars(y, codes, totals),
        ),
    ]
    return _chart(frame, "Stored bits per weight", "bits", ticks, bars, axis)


def _seconds(layers: Sequence[LayerReport], axis: series.LayerAxis) -> Chart | None:
    stacked = series.stacked_seconds(layers)
    highest = max((value for _, _, top in stacked for value in top), default=0.0)
    if highest <= 0:
        return None
    frame = Frame(count=len(layers), plot=120)
    y, ticks = _linear(frame, highest)
    bars = [
        Series(
            label=step, style=f"{frame.bar} {_style(step, order)}", path=frame.bars(y, bottom, top)
        )
        for order, (step, bottom, top) in enumerate(stacked)
    ]
    return _chart(frame, "Seconds in the solver", "seconds", ticks, bars, axis)


def _chart(
    frame: Frame,
    title: str,
    unit: str,
    y_ticks: tuple[tuple[float, str], ...],
    drawn: Iterable[Series],
    axis: series.LayerAxis,
) -> Chart:
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
        bands=tuple(
            (frame.x(start - 0.5), (end - start) * frame.step) for start, end in axis.blocks[1::2]
        ),
        series=tuple(part for part in drawn if part.path),
        slanted=axis.slanted,
        x_title="" if axis.slanted else axis.title,
    )


def _logarithmic(
    frame: Frame, low: float, high: float
) -> tuple[Height, tuple[tuple[float, str], ...]]:
    """Height of a value, and the marks, for values from ``low`` to ``high``."""
    margin = max(0.04 * math.log10(high / low), 0.05)
    bottom, top = math.log10(low) - margin, math.log10(high) + margin

    def y(value: float) -> float:
        return frame.bottom - (math.log10(value) - bottom) / (top - bottom) * frame.plot

    return y, tuple((y(value), text) for value, text in series.log_ticks(10**bottom, 10**top))


def _linear(frame: Frame, high: float) -> tuple[Height, tuple[tuple[float, str], ...]]:
    """The same for values from 0 to ``high``."""

    def y(value: float) -> float:
        return frame.bottom - value / (high * 1.05) * frame.plot

    return y, tuple((y(value), f"{value:g}") for value in series.linear_ticks(high))


def _style(step: str, order: int) -> str:
    """CSS class of a step; unknown ones get one of three spare colours."""
    return f"step-{step}" if step in series.TIMED_STEPS else f"step-more-{order % 3}"
