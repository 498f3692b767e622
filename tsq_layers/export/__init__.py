"""Quantised models as files of other engines: GPTQ, compressed-tensors, GGUF. One file a format, and what they share.

Reading a model (:mod:`~tsq_layers.export.contents`), refusing what a format cannot hold
(:mod:`~tsq_layers.export.limits`) and writing are apart: nothing is written before all is known to fit.
"""

from tsq_layers.errors import ExportError, ExportWarning
from tsq_layers.export.exporting import export

__all__ = ["ExportError", "ExportWarning", "export"]
