"""A picture of one table: perplexity of every row on both texts, the best at the top."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.ablation.peers import PEERS
from benchmarks.ablation.records import FLOAT, Run

_COLOURS = ("#1f6f8b", "#c8553d")
_HIDDEN = 3000.0  # of rows that are worse only the name is of interest


def draw(runs: Sequence[Run], path: Path, *, bits: int, group_size: int, tokens: int) -> None:
    """Draw the rows of one table, means over seeds, into a PNG or SVG file."""
    base = next(run for run in runs if run.key == FLOAT.key)
    texts = list(base.perplexity)
    means = _means([run for run in runs if (run.bits, run.group_size) == (bits, group_size) and run.tokens == tokens])
    names = sorted(
        (name for name in means if means[name][texts[-1]] < _HIDDEN), key=lambda name: means[name][texts[-1]]
    )
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    for text, colour in zip(texts, _COLOURS, strict=True):
        axes.scatter([means[name][text] for name in names], places, color=colour, label=text, zorder=3, s=28)
        axes.axvline(base.perplexity[text], color=colour, linestyle=":", linewidth=1)
    axes.set_yticks(places, [f"{name} (other library)" if name in PEERS else name for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel("perplexity (dotted: float)")
    axes.set_title(f"SmolLM2-135M, {bits} bits, groups of {group_size}, {tokens} calibration tokens", fontsize=10)
    axes.grid(axis="x", which="both", alpha=0.25)
    figure.legend(loc="outside lower right", ncols=len(texts), fontsize=8)
    figure.savefig(path, dpi=130)


def _means(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Mean perplexity of every row over its seeds."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.name for run in runs):
        same = [run.perplexity for run in runs if run.name == name]
        found[name] = {text: sum(one[text] for one in same) / len(same) for text in same[0]}
    return found
