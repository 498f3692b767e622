"""Draw the report as a picture: loss, bits and seconds of every quantised layer. Needs matplotlib."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tsq_layers.errors import ConfigError
from tsq_layers.reports import series
from tsq_layers.reports.extras import required
from tsq_layers.reports.layer import STEPS, LayerReport

_SUFFIXES = (".png", ".svg", ".pdf")
_STEP_COLORS = {
    "factorise": "#7c6bb0",
    "initialize": "#9aa5b1",
    "assign": "#e08a1e",
    "refine": "#2563c9",
}
_MORE_COLORS = ("#2a9d6f", "#c2477f", "#6b7280")
_HELD_OUT = "#c2477f"
_MEDIAN = "#111827"
# Scales of large dots, step by step: a later one leaves a ring of an equal earlier one.
_DOTS = (1.0, 1.25, 0.75)
_LARGE = 5.0
_CODES = "#2563c9"
_OVERHEAD = "#a9c3ee"

Panel = tuple[float, Callable[[Any, Sequence[LayerReport]], None]]


def draw(
    layers: Sequence[LayerReport], bits_per_weight: float | None, path: str | os.PathLike[str]
) -> None:
    """Write the picture; :meth:`tsq_layers.Report.plot` says how, and what it raises."""
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ConfigError(
            f"cannot draw into {path}: give a file name that ends in {', '.join(_SUFFIXES)}"
        )
    picture(layers, bits_per_weight).savefig(path, format=suffix[1:], dpi=150)


def picture(layers: Sequence[LayerReport], bits_per_weight: float | None) -> Any:
    """Return the picture, a ``matplotlib.figure.Figure`` of its own that pyplot does not know.

    Args:
        layers: all layers of the report; those that were quantised are drawn.
        bits_per_weight: of the whole model, for the title.
    """
    figures = required("matplotlib.figure")
    rows = [layer for layer in layers if layer.is_quantized]
    panels = _panels(rows)
    heights = [height for height, _ in panels]
    width = min(max(7.0, 5.5 + 0.045 * len(rows)), 18.0)
    figure = figures.Figure(figsize=(width, 1.6 + sum(heights)), layout="constrained")
    title = _title(len(rows), len(layers), bits_per_weight)
    figure.suptitle(title, fontsize=11, parse_math=False)
    if not panels:
        figure.text(0.5, 0.4, "nothing to draw: no layer has a loss, bits or seconds", ha="center")
        return figure
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    axes = grid[:, 0]
    for panel, (_, fill) in zip(axes, panels, strict=True):
        _dress(panel)
        fill(panel, rows)
    _mark_layers(axes, [layer.name for layer in rows])
    return figure


def _title(quantized: int, count: int, bits_per_weight: float | None) -> str:
    bits = "" if bits_per_weight is None else f", {bits_per_weight:.2f} bits per weight"
    return f"{quantized} of {count} layers quantised{bits}"


def _panels(layers: Sequence[LayerReport]) -> list[Panel]:
    """Return height in inches and drawing function of each panel that has something to show."""
    panels: list[Panel] = []
    if any(map(_has_loss, layers)):
        panels.append((3.6, _losses))
    _, stored_bits = series.bits(layers)
    if any(stored_bits):
        panels.append((1.3, _bits))
    if any(series.seconds(layer) > 0 for layer in layers):
        panels.append((1.8, _seconds))
    return panels


def _has_loss(layer: LayerReport) -> bool:
    values = [*layer.losses.values(), *layer.held_out_losses.values()]
    return bool(series.positives(values))


def _losses(panel: Any, layers: Sequence[LayerReport]) -> None:
    size = _dot(len(layers))
    _loss_ranges(panel, layers, size)
    for order, step in enumerate(series.steps((layer.losses for layer in layers), STEPS)):
        points = _points([layer.losses.get(step) for layer in layers])
        scale = _DOTS[min(order, 2)] if size > _LARGE else 1.0
        panel.plot(
            *points,
            color=_color(step, order),
            label=step,
            linestyle="none",
            marker="o",
            markeredgewidth=0,
            zorder=2 + order,
            markersize=size * scale,
        )
    held_out_points = _points([series.final_held_out(layer) for layer in layers])
    if held_out_points[0]:
        panel.plot(
            *held_out_points,
            color=_HELD_OUT,
            markeredgewidth=size / 6,
            label="held out, last step",
            linestyle="none",
            marker="o",
            markerfacecolor="none",
            markersize=size * 1.5,
            zorder=9,
        )
    _medians(panel, layers)
    _log_scale(panel)
    panel.set_ylabel("relative output error")
    _legend(panel, markerscale=max(1.0, 4.0 / size))


def _loss_ranges(panel: Any, layers: Sequence[LayerReport], size: float) -> None:
    """Draw a thin line from the lowest to the highest loss of each layer that has several."""
    places = []
    lows = []
    highs = []
    for index, layer in enumerate(layers):
        values = series.positives(layer.losses.values())
        if len(values) > 1:
            places.append(index)
            lows.append(min(values))
            highs.append(max(values))
    if places:
        panel.vlines(places, lows, highs, color="#c9d0d8", linewidth=size / 4, zorder=1)


def _log_scale(panel: Any) -> None:
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    values = []
    texts = []
    for value, text in series.log_ticks(low, high):
        if low <= value <= high:
            values.append(value)
            texts.append(text)
    panel.set_yticks(values, texts, minor=False)
    panel.set_yticks([], minor=True)


def _medians(panel: Any, layers: Sequence[LayerReport]) -> None:
    axis = series.layer_axis([layer.name for layer in layers])
    losses = [series.positive(series.final_loss(layer)) for layer in layers]
    medians = series.block_medians(losses, axis)
    if medians:
        # Layer i stands at i, so that its column reaches from i - 0.5 to i + 0.5.
        panel.hlines(
            [value for _, _, value in medians],
            [start - 0.5 for start, _, _ in medians],
            [end - 0.5 for _, end, _ in medians],
            color=_MEDIAN,
            linewidth=2,
            zorder=10,
            label="median of a block, last step",
        )


def _bits(panel: Any, layers: Sequence[LayerReport]) -> None:
    codes, totals = series.bits(layers)
    _bars(panel, [0.0] * len(layers), codes, _CODES, "codes")
    if totals != codes:
        _bars(panel, codes, totals, _OVERHEAD, "scales and zero points")
    panel.set_ylim(0, max(totals) * 1.08)
    panel.set_ylabel("bits per\nweight")
    _legend(panel)


def _seconds(panel: Any, layers: Sequence[LayerReport]) -> None:
    for order, (step, bottom, top) in enumerate(series.stacked_seconds(layers)):
        _bars(panel, bottom, top, _color(step, order), step)
        panel.set_ylim(0, max(top) * 1.08)
    panel.set_ylabel("seconds")
    _legend(panel)


def _bars(panel: Any, bottom: list[float], top: list[float], color: str, label: str) -> None:
    """Draw one bar a layer; a single outline where bars are too narrow for gaps between them."""
    places = range(len(top))
    if len(top) <= 60:
        heights = [high - low for low, high in zip(bottom, top, strict=True)]
        panel.bar(places, heights, width=0.7, bottom=bottom, color=color, linewidth=0, label=label)
    else:
        edges = [index - 0.5 for index in range(len(top) + 1)]
        panel.stairs(top, edges, baseline=bottom, fill=True, color=color, linewidth=0, label=label)


def _mark_layers(axes: Sequence[Any], names: Sequence[str]) -> None:
    marks = series.layer_axis(names)
    margin = 0.01 * len(names)
    # A few slanted names need no shading to be told apart.
    shaded_blocks = marks.blocks[1::2] if not marks.slanted or len(names) > 8 else ()
    for panel in axes:
        for start, end in shaded_blocks:
            panel.axvspan(start - 0.5, end - 0.5, color="#f3f5f7", linewidth=0, zorder=0)
        panel.set_xlim(-0.5 - margin, len(names) - 0.5 + margin)
    rotation = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if marks.slanted else {}
    positions, texts = zip(*marks.ticks, strict=True)
    axes[-1].set_xticks(positions, texts, parse_math=False, fontsize=8.5, **rotation)
    if not marks.slanted:
        axes[-1].set_xlabel(marks.title, parse_math=False)


def _dress(panel: Any) -> None:
    panel.grid(visible=True, axis="y", color="#e3e6ea", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8.5)


def _legend(panel: Any, **more: Any) -> None:
    style = {
        "frameon": False,
        "fontsize": 8.5,
        "ncols": 6,
        "handlelength": 1.2,
        "columnspacing": 1.4,
    }
    panel.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1, **style, **more)


def _color(step: str, order: int) -> str:
    return _STEP_COLORS.get(step, _MORE_COLORS[order % len(_MORE_COLORS)])


def _dot(count: int) -> float:
    """Return the diameter of a mark in points: smaller where there are more."""
    return min(max(60 / math.sqrt(count), 1.6), 7.0)


def _points(values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """Return places and values of what can be drawn on a logarithmic axis."""
    places = []
    heights = []
    for index, value in enumerate(values):
        height = series.positive(value)
        if height is not None:
            places.append(index)
            heights.append(height)
    return places, heights
