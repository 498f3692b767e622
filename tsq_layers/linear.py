"""The place of `QuantLinear` up to version 0.1, under which pickled models name it."""

from tsq_layers.runtime.linear import QuantLinear

__all__ = ["QuantLinear"]
