"""Pictures: of one table, the best at the top; of the headline rows along the axes."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.ablation.peers import PEERS
from benchmarks.ablation.records import FLOAT, Run
from benchmarks.ablation.rows import HEADLINES

_COLOURS = ("#1f6f8b", "#c8553d")
_HEADLINE_COLOURS = dict(zip(HEADLINES, ("#888888", "#1f6f8b", "#c8553d"), strict=True))
_HIDDEN = 3000.0  # of rows that are worse only the name is of interest


def draw(runs: Sequence[Run], path: Path, *, bits: int, group_size: int, tokens: int) -> None:
    """Draw the rows of one table, means over seeds, into a PNG or SVG file."""
    base = next(run for run in runs if run.key == FLOAT.key)
    texts = list(base.perplexity)
    means = _means(
        [
            run
            for run in runs
            if (run.bits, run.group_size) == (bits, group_size) and run.tokens == tokens
        ]
    )
    names = sorted(
        (name for name in means if means[name][texts[-1]] < _HIDDEN),
        key=lambda name: means[name][texts[-1]],
    )
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    for text, colour in zip(texts, _COLOURS, strict=True):
        axes.scatter(
            [means[name][text] for name in names], places, color=colour, label=text, zorder=3, s=28
        )
        axes.axvline(base.perplexity[text], color=colour, linestyle=":", linewidth=1)
    axes.set_yticks(
        places, [f"{name} (other library)" if name in PEERS else name for name in names], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel("perplexity (dotted: float)")
    axes.set_title(
        f"SmolLM2-135M, {bits} bits, groups of {group_size}, {tokens} calibration tokens",
        fontsize=10,
    )
    axes.grid(axis="x", which="both", alpha=0.25)
    figure.legend(loc="outside lower right", ncols=len(texts), fontsize=8)
    figure.savefig(path, dpi=130)


def draw_axes(runs: Sequence[Run], path: Path, *, bits: int, group_size: int, tokens: int) -> None:
    """Draw the headline rows of the first seed into a PNG or SVG file: perplexity against size,
    with ``tokens``, and against tokens, with ``bits`` and ``group_size``.
    """
    base = next(run for run in runs if run.key == FLOAT.key)
    text = list(base.perplexity)[-1]
    shown = [run for run in runs if run.name in HEADLINES and run.seed == 0]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(
        left,
        [(run, run.bits_per_weight or run.bits) for run in shown if run.tokens == tokens],
        text,
    )
    left.set_xlabel("bits a weight, with scales and zero points or offsets")
    sizes = sorted({run.group_size for run in shown if run.tokens == tokens})
    left.set_title(
        f"{tokens} calibration tokens, groups of {', '.join(map(str, sizes))}", fontsize=10
    )
    same = [run for run in shown if (run.bits, run.group_size) == (bits, group_size)]
    _curves(right, [(run, run.tokens) for run in same], text)
    right.set_xscale("log", base=2)
    right.set_xticks(sorted({run.tokens for run in same}), sorted({run.tokens for run in same}))
    right.set_xlabel("calibration tokens")
    right.set_title(f"{bits} bits, groups of {group_size}", fontsize=10)
    for axes in (left, right):
        axes.axhline(base.perplexity[text], color="black", linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.tick_params(which="both", labelsize=8)
        axes.grid(which="both", alpha=0.25)
    left.set_ylabel(f"perplexity, {text} (dotted: float)")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _curves(axes: Axes, runs: Sequence[tuple[Run, float]], text: str) -> None:
    """A line for each row and width."""
    widths = sorted({run.bits for run, _ in runs})
    for (name, colour), bits in itertools.product(_HEADLINE_COLOURS.items(), widths):
        points = sorted(
            (x, run.perplexity[text]) for run, x in runs if (run.name, run.bits) == (name, bits)
        )
        label = name if bits == widths[0] else None
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            "o-",
            color=colour,
            label=label,
            markersize=4,
            linewidth=1.2,
        )


def _means(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Mean perplexity of every row over its seeds."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.name for run in runs):
        same = [run.perplexity for run in runs if run.name == name]
        found[name] = {text: sum(one[text] for one in same) / len(same) for text in same[0]}
    return found
