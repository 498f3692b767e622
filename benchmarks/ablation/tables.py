"""The tables of the ablation, in Markdown."""

import itertools
import math
from collections.abc import Iterator, Sequence

from benchmarks.ablation.records import Run
from tsq_layers.demo.results import BLANK, markdown


def lines(runs: Sequence[Run]) -> Iterator[str]:
    """One table for each width, group size, number of tokens and seed; rows in the order of their perplexity on the second text."""
    base = next((run for run in runs if run.name == "float"), None)
    rest = sorted((run for run in runs if run is not base), key=_place)
    for (bits, group_size, tokens, seed), group in itertools.groupby(rest, key=_place):
        yield ""
        yield f"{bits} bits, groups of {group_size}, {tokens} calibration tokens, seed {seed}:"
        yield ""
        rows = sorted(group, key=lambda run: -list(run.perplexity.values())[-1])
        yield from table(rows if base is None else [base, *rows])


def table(rows: Sequence[Run]) -> list[str]:
    """Lines of one table."""
    texts = list(rows[0].perplexity)
    titles = ["", *texts, "layer loss", "held out", "bits/weight", "CPU s"]
    return markdown(titles, [_cells(run, texts) for run in rows])


def _place(run: Run) -> tuple[int, int, int, int]:
    return (run.bits, run.group_size, run.tokens, run.seed)


def _cells(run: Run, texts: Sequence[str]) -> list[str]:
    perplexities = [_number(run.perplexity[text]) for text in texts]
    losses = [BLANK if value is None else f"{value:.5f}" for value in (run.loss, run.held_out_loss)]
    bits = BLANK if run.bits_per_weight is None else f"{run.bits_per_weight:.3f}"
    return [run.name, *perplexities, *losses, bits, f"{run.cpu_seconds:.0f}" if run.cpu_seconds else BLANK]


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if math.isfinite(value) else "∞"
