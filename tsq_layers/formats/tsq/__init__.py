"""A quantised model as a directory: ``model.safetensors`` and ``tsq.json``. Nothing in it is ever executed.

The tensors file holds every parameter and buffer once, under its dotted name; buffers that are not
persistent have a prefix. The description says which layers are quantised and how, which names share
a tensor, and what happened to every layer. See :mod:`tsq_layers.formats.tsq.description`.
"""

from tsq_layers.formats.tsq.reading import load
from tsq_layers.formats.tsq.writing import save

__all__ = ["load", "save"]
