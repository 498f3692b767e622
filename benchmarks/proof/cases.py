"""All cases by their names, and those of a quick look."""

import functools
import itertools
from collections.abc import Mapping
from fnmatch import fnmatchcase

from benchmarks.proof import calls, exchange, matrix, solver, variants
from benchmarks.proof.case import Case

QUICK = (
    "llama/rtn/symmetric/no-data",
    "llama/two-stage/symmetric/paired",
    "llama/two-stage/integer/resumed",
    "llama/quantease/outlier-columns/paired",
    "llama/best/integer/paired",
    "t5/cdquant/integer/paired",
    "t5/two-stage/rotation/one-pass",
    "t5/lnq/tables-group/resumed",
    "vision/gptq/integer/paired",
    "vision/two-stage/float/paired",
    "vision/best/inputs/one-pass",
    "mixtral/lnq/tables-row/paired",
    "mixtral/quantease/outliers/one-pass",
    "mixtral/best/float/resumed",
    "gpt2/variants/joint",
    "tied/variants/embeddings",
    "llama/variants/guidance",
    "llama/variants/distill",
    "llama/variants/scaling",
    "llama/variants/overrides",
    "llama/variants/auto",
    "llama/variants/ragged-float",
    "calls/pruned/quantease-True",
    "calls/own-kind",
    "calls/perplexity",
    "exchange/import/gptq",
    "exchange/refine/joint",
    "exchange/formats/4",
    "solver/observer",
    "solver/run/two-stage-joint",
    "solver/blocks/lnq-group",
)
"""Every method, kind of grid, model, way and format once."""


@functools.cache
def all_cases() -> Mapping[str, Case]:
    """Find all cases by their names."""
    found: dict[str, Case] = {}
    parts = (matrix, variants, calls, solver, exchange)
    for case in itertools.chain.from_iterable(part.cases() for part in parts):
        assert case.name not in found, case.name
        found[case.name] = case
    return found


def chosen(*, quick: bool, only: str | None) -> list[str]:
    """Name the cases to run: all, those of a quick look, or those that match a pattern."""
    names = QUICK if quick else tuple(all_cases())
    # What compiles takes longest, and would be waited for at the end.
    names = sorted(names, key=lambda name: not all_cases()[name].compiles)
    return [name for name in names if only is None or fnmatchcase(name, only)]
