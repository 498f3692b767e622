"""The report as a picture: loss, bits and seconds of every quantised layer. Needs matplotlib."""

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
_DOTS = (
    1.0,
    1.25,
    0.75,
)  # large dots, step by step: a later one leaves a ring of an equal earlier one
_LARGE = 5.0
_CODES, _OVERHEAD = "#2563c9", "#a9c3ee"

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
    count = len(layers)
    layers = [layer for layer in layers if layer.is_quantized]
    panels = _panels(layers)
    width = min(max(7.0, 5.5 + 0.045 * len(layers)), 18.0)
    height = 1.6 + sum(share for share, _ in panels)
    figure = figures.Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(_title(len(layers), count, bits_per_weight), fontsize=11, parse_math=False)
    if panels:
        shares = [share for share, _ in panels]
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=shares)[
            :, 0
        ]
        for panel, (_, fill) in zip(axes, panels, strict=True):
            _dress(panel)
            fill(panel, layers)
        _mark_layers(axes, [layer.name for layer in layers])
    else:
        figure.text(0.5, 0.4, "nothing to draw: no layer has a loss, bits or seconds", ha="center")
    return figure


def _title(quantized: int, count: int, bits_per_weight: float | None) -> str:
    bits = "" if bits_per_weight is None else f", {bits_per_weight:.2f} bits per weight"
    return f"{quantized} of {count} layers quantised{bits}"


def _panels(layers: Sequence[LayerReport]) -> list[Panel]:
    """Height in inches and drawing function of each panel that has something to show."""
    losses = any(
        series.positive(v)
        for layer in layers
        for v in (*layer.losses.values(), *layer.held_out_losses.values())
    )
    bits = any(series.bits(layers)[1])
    seconds = any(series.seconds(layer) > 0 for layer in layers)
    return [
        *([(3.6, _losses)] if losses else []),
        *([(1.3, _bits)] if bits else []),
        *([(1.8, _seconds)] if seconds else []),
    ]


def _losses(panel: Any, layers: Sequence[LayerReport]) -> None:
    size = _dot(len(layers))
    ranges = [(index, _positive(layer.losses.values())) for index, layer in enumerate(layers)]
    stems = [(index, min(values), max(values)) for index, values in ranges if len(values) > 1]
    if stems:
        panel.vlines(*zip(*stems, strict=True), color="#c9d0d8", linewidth=size / 4, zorder=1)
    for order, step in enumerate(series.steps((layer.losses for layer in layers), STEPS)):
        points = _points([layer.losses.get(step) for layer in layers])
        style = {"linestyle": "none", "marker": "o", "markeredgewidth": 0, "zorder": 2 + order}
        style["markersize"] = size * (_DOTS[min(order, 2)] if size > _LARGE else 1.0)
        panel.plot(*points, color=_color(step, order), label=step, **style)
    held_out = _points([series.final_held_out(layer) for layer in layers])
    if held_out[0]:
        style = {
            "linestyle": "none",
            "marker": "o",
            "markerfacecolor": "none",
            "markersize": size * 1.5,
            "zorder": 9,
        }
        panel.plot(
            *held_out,
            color=_HELD_OUT,
            markeredgewidth=size / 6,
            label="held out, last step",
            **style,
        )
    _medians(panel, layers)
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    ticks = [(value, text) for value, text in series.log_ticks(low, high) if low <= value <= high]
    panel.set_yticks([value for value, _ in ticks], [text for _, text in ticks], minor=False)
    panel.set_yticks([], minor=True)
    panel.set_ylabel("relative output error")
    _legend(panel, markerscale=max(1.0, 4.0 / size))


def _medians(panel: Any, layers: Sequence[LayerReport]) -> None:
    marks = series.layer_axis([layer.name for layer in layers])
    finals = [series.positive(series.final_loss(layer)) for layer in layers]
    medians = series.block_medians(finals, marks)
    if medians:
        starts, ends, values = zip(
            *[(start - 0.5, end - 0.5, value) for start, end, value in medians], strict=True
        )
        panel.hlines(
            values,
            starts,
            ends,
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
    """One bar a layer. A single outline where bars are too narrow for gaps between them."""
    places = range(len(top))
    if len(top) <= 60:
        heights = [high - low for low, high in zip(bottom, top, strict=True)]
        panel.bar(places, heights, width=0.7, bottom=bottom, color=color, linewidth=0, label=label)
    else:
        edges = [index - 0.5 for index in range(len(top) + 1)]
        panel.stairs(top, edges, baseline=bottom, fill=True, color=color, linewidth=0, label=label)


def _mark_layers(axes: Sequence[Any], names: Sequence[str]) -> None:
    marks = series.layer_axis(names)
    for panel in axes:
        for start, end in marks.blocks[1::2] if not marks.slanted or len(names) > 8 else ():
            panel.axvspan(start - 0.5, end - 0.5, color="#f3f5f7", linewidth=0, zorder=0)
        panel.set_xlim(-0.5 - 0.01 * len(names), len(names) - 0.5 + 0.01 * len(names))
    turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if marks.slanted else {}
    positions, texts = zip(*marks.ticks, strict=True)
    axes[-1].set_xticks(positions, texts, parse_math=False, fontsize=8.5, **turned)
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
    """Diameter of a mark in points: smaller where there are more."""
    return min(max(60 / math.sqrt(count), 1.6), 7.0)


def _positive(values: Any) -> list[float]:
    return [value for value in map(series.positive, values) if value is not None]


def _points(values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """Places and values of what can be drawn on a logarithmic axis."""
    pairs = [
        (index, value)
        for index, value in enumerate(map(series.positive, values))
        if value is not None
    ]
    return [index for index, _ in pairs], [value for _, value in pairs]
