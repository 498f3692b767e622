"""All cases by their names, and those of a quick look."""

import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase

from benchmarks.proof import matrix
from benchmarks.proof.case import Case

QUICK = (
    "llama/rtn/symmetric/no-data",
    "llama/two-stage/integer/paired",
)
"""Every method, kind of grid, model, way and format once."""


@functools.cache
def all_cases() -> Mapping[str, Case]:
    """Find all cases by their names."""
    found: dict[str, Case] = {}
    for case in matrix.cases():
        assert case.name not in found, case.name
        found[case.name] = case
    return found


def chosen(*, quick: bool, only: str | None) -> list[str]:
    """Name the cases to run: all, those of a quick look, or those that match a pattern."""
    names = QUICK if quick else tuple(all_cases())
    return [name for name in names if only is None or fnmatchcase(name, only)]
