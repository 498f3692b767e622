"""Quantise further kinds of layers: describe one by :class:`LayerKind` or :class:`Composite`, and register it.

These four names are public, as ``tsq_layers.layers.register(…)`` and so on:

* :class:`LayerKind`: a layer with one weight, which is shown as a matrix with rows of inputs;
* :class:`Composite`: a module with several weights, which is split into plain layers;
* :func:`register` and :func:`unregister`: add and remove one of them.

The other names are for the rest of the library, which knows of layers only what they return.
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
