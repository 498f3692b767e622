"""The tables of the ablation, in Markdown."""

import itertools
import math
from collections.abc import Iterator, Sequence

from benchmarks.ablation.records import Run
from benchmarks.ablation.rows import HEADLINES, LADDER
from tsq_layers.cli.demonstration.results import BLANK, markdown

_NUMBERS = ("layer loss", "held out", "bits/weight", "CPU s")
_STEPS = {*LADDER} - {*HEADLINES, "rounding"}


def lines(runs: Sequence[Run]) -> Iterator[str]:
    """A table for each width, group size, number of tokens and seed that has rows beside the
    ladder's and the headlines; then the ladder and the headlines along all of these.
    """
    base = [run for run in runs if run.name == "float"]
    rest = sorted((run for run in runs if run not in base), key=_place)
    for place, group in itertools.groupby(rest, key=_place):
        rows = sorted(group, key=lambda run: -list(run.perplexity.values())[-1])
        if not {run.name for run in rows} <= {*LADDER, *HEADLINES}:
            bits, group_size, tokens, seed = place
            title = (
                f"{bits} bits, groups of {group_size}, {tokens} calibration tokens, seed {seed}:"
            )
            yield from ("", title, "", *table([*base, *rows]))
    if any(run.name in _STEPS for run in rest):
        texts = " / ".join(rest[0].perplexity)
        yield from ("", f"The ladder, group sizes along the top ({texts}):", "", *ladder(rest))
    headlines = [run for run in rest if run.name in HEADLINES]
    if headlines:
        yield from ("", "Along the axes:", "", *axes(headlines))


def table(rows: Sequence[Run]) -> list[str]:
    """Lines of one table, in the order given."""
    texts = list(rows[0].perplexity)
    return markdown(["", *texts, *_NUMBERS], [[run.name, *_cells(run, texts)] for run in rows])


def ladder(runs: Sequence[Run]) -> list[str]:
    """Lines of the table of the ladder and the best: perplexities of each step, a column for each
    width and group size.
    """
    steps = [*LADDER, *(name for name in HEADLINES if name not in LADDER)]
    found: dict[tuple[int, int], dict[str, str]] = {}
    for run in sorted(runs, key=_place, reverse=True):  # of several tokens and seeds the first
        if run.name in steps:
            cells = found.setdefault((run.bits, run.group_size), {})
            cells[run.name] = " / ".join(_number(value, 1) for value in run.perplexity.values())
    places = sorted(place for place, cells in found.items() if _STEPS & cells.keys())
    titles = [f"{bits} bits, {group_size}" for bits, group_size in places]
    return markdown(
        ["", *titles],
        [[name, *(found[place].get(name, BLANK) for place in places)] for name in steps],
    )


def axes(headlines: Sequence[Run]) -> list[str]:
    """Lines of the table of the headline rows, those of a width, group size, number of tokens and seed together."""
    texts = list(headlines[0].perplexity)
    cells = []
    ordered = sorted(headlines, key=lambda run: (_place(run), HEADLINES.index(run.name)))
    for place, group in itertools.groupby(ordered, key=_place):
        for index, run in enumerate(group):
            cells.append([*([""] * 4 if index else map(str, place)), run.name, *_cells(run, texts)])
    return markdown(["bits", "group", "tokens", "seed", "method", *texts, *_NUMBERS], cells)


def _place(run: Run) -> tuple[int, int, int, int]:
    return (run.bits, run.group_size, run.tokens, run.seed)


def _cells(run: Run, texts: Sequence[str]) -> list[str]:
    perplexities = [_number(run.perplexity[text]) for text in texts]
    losses = [BLANK if value is None else f"{value:.5f}" for value in (run.loss, run.held_out_loss)]
    bits = BLANK if run.bits_per_weight is None else f"{run.bits_per_weight:.3f}"
    return [*perplexities, *losses, bits, f"{run.cpu_seconds:.0f}" if run.cpu_seconds else BLANK]


def _number(value: float, digits: int = 2) -> str:
    return (
        f"{value:.{digits}f}"
        if value < 10 ** (digits + 1)
        else f"{value:.0f}"
        if math.isfinite(value)
        else "∞"
    )
