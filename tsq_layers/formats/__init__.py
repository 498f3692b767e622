"""Read and write quantised models as files: the library's own format, GPTQ, compressed-tensors and GGUF.

Reading a model (:mod:`~tsq_layers.formats.contents`), refusing what a format cannot hold
(:mod:`~tsq_layers.formats.limits`) and writing are apart: nothing is written before all is known to fit.
Imports take over codes and scales exactly.
"""

from tsq_layers.errors import ExportError, ExportWarning
from tsq_layers.formats.exporting import export_checkpoint
from tsq_layers.formats.importing import import_checkpoint

__all__ = ["ExportError", "ExportWarning", "export_checkpoint", "import_checkpoint"]
