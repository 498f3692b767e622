"""Say what to do with every layer: `QuantConfig`, its checks, patterns of names, and JSON both ways."""

from tsq_layers.config.quant_config import QuantConfig

__all__ = ["QuantConfig"]
