"""The picture of the demo: perplexity against bits per weight."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsq_layers.cli.demonstration.results import Row

_NAMES = {"rtn": "round to nearest", "gptq": "GPTQ", "two-stage": "two-stage"}
# Colour, marker, and where the value is written, in points from the marker.
_STYLES = {
    "rtn": ("#8c8c8c", "s", (7, 5)),
    "gptq": ("#d98032", "^", (7, 5)),
    "two-stage": ("#1f5fa8", "o", (-6, -14)),
}
# The axis ends at so many times the perplexity of the float model; what lies above is told in words.
_HIGHEST = 40
# Behind each value, so that no line crosses it.
_PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with one panel for each text; the first row is the float model, drawn as a dashed line."""
    figures = importlib.import_module("matplotlib.figure")
    agg = importlib.import_module("matplotlib.backends.backend_agg")
    texts = list(rows[0].perplexity)
    figure = figures.Figure(figsize=(6.4 * len(texts), 4.6), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for panel, text in zip(panels, texts, strict=True):
        _panel(panel, rows, text)
    figure.suptitle("SmolLM2-135M-Instruct: perplexity against stored bits per weight", fontsize=12)
    agg.FigureCanvasAgg(figure).print_png(path)


def _panel(panel: Any, rows: Sequence[Row], text: str) -> None:
    base = rows[0].perplexity[text]
    worst = max(row.perplexity[text] for row in rows)
    top = min(worst * 1.6, base * _HIGHEST)
    for method, (color, marker, offset) in _STYLES.items():
        points = sorted(
            (row.bits_per_weight, row.perplexity[text]) for row in rows if row.method == method
        )
        if points:
            panel.plot(
                *zip(*points, strict=True),
                color=color,
                marker=marker,
                markersize=7,
                linewidth=1.8,
                label=_NAMES[method],
                zorder=3,
            )
        for width, value in points:
            label = f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
            if value < top:
                panel.annotate(
                    label,
                    (width, value),
                    xytext=offset,
                    textcoords="offset points",
                    fontsize=8.5,
                    color=color,
                    bbox=_PLATE,
                )
            else:
                panel.annotate(
                    f"↑ {label}",
                    (width, top),
                    xytext=(-4, -12),
                    textcoords="offset points",
                    fontsize=8.5,
                    color=color,
                    bbox=_PLATE,
                )
    panel.axhline(
        base, color="#333333", linestyle="--", linewidth=1.2, label=f"float ({base:.1f})", zorder=2
    )
    _axes(panel, text, base * 0.8, top)


def _axes(panel: Any, text: str, bottom: float, top: float) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    panel.set_yscale("log")
    panel.set_ylim(bottom, top)
    panel.margins(x=0.12)
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.yaxis.set_minor_locator(ticker.NullLocator())
    panel.set_xlabel("bits per weight (codes, scales and zero points)")
    panel.set_ylabel(f"perplexity on {text} (log scale)")
    panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
