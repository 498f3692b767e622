"""Checkpoints of other libraries as models of this one: GPTQ and compressed-tensors, codes and scales exactly theirs.

Each format tells which layers a directory holds packed and reads one of them (:mod:`~tsq_layers.importing.gptq`,
:mod:`~tsq_layers.importing.compressed_tensors`); everything else is common.
"""

from tsq_layers.importing.importing import import_checkpoint

__all__ = ["import_checkpoint"]
