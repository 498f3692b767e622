"""Say what to do with every layer: `QuantConfig`, options of each method, patterns of names, JSON both ways."""

from tsq_layers.config.quant_config import QuantConfig

__all__ = ["QuantConfig"]
