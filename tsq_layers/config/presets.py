"""Presets: fields of a configuration that go together, under a name."""

from typing import Any

BEST: dict[str, Any] = {
    "deviation_strength": 1.0,
    "deviation_damping": "auto",
    "damping": "auto",
    "joint_rounds": 2,
    "zero_points": "float",
    "rotation": 64,
}
"""Fields in which ``"best"`` differs from the defaults of two-stage.

``benchmarks/README.md`` has the table that decided it.
"""

PORTABLE: dict[str, Any] = {"zero_points": "integer", "rotation": None}
"""Fields that keep ``"best"`` within what files of other software can store."""


def best(*, symmetric: bool) -> dict[str, Any]:
    """Return the fields of :data:`BEST`, for grids with or without zero points.

    Example:
        >>> best(symmetric=False)["zero_points"]
        'float'
    """
    fields = dict(BEST)
    if symmetric:
        # A symmetric grid has no zero points that could be floats.
        del fields["zero_points"]
    return fields


PRESETS = {"best": best}
"""Name → the function that returns the fields."""
