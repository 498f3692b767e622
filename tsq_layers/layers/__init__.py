"""Which layers can be quantised: how each shows itself as a weight matrix, and what takes its place.

Everything else in the library sees only :class:`LayerKind` and :class:`Composite`.
"""

from tsq_layers.layers.composites import Composite, composite_behind, replace, split_of
from tsq_layers.layers.kinds import LayerKind, kind_behind, rows_of
from tsq_layers.layers.registry import (
    composite_of,
    kind_of,
    packed,
    register,
    unregister,
    unsupported,
    why_not,
)

__all__ = [
    "Composite",
    "LayerKind",
    "composite_behind",
    "composite_of",
    "kind_behind",
    "kind_of",
    "packed",
    "register",
    "replace",
    "rows_of",
    "split_of",
    "unregister",
    "unsupported",
    "why_not",
]
