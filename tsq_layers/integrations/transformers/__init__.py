"""Hugging Face transformers: importing this teaches its ``from_pretrained`` and ``save_pretrained`` quantised models.

A directory that ``save_pretrained`` of a quantised model writes is loaded again by ``from_pretrained`` of the
auto classes, and by :func:`tsq_layers.load`. Without this import transformers knows nothing of packed layers: loading
such a directory is an error then, see :mod:`tsq_layers.formats.tsq.outline`.
"""

import importlib.util

from tsq_layers.integrations.causal_lm import (
    empty_causal_lm,
    load_causal_lm,
    load_tokenizer,
    quiet,
    save_causal_lm,
)
from tsq_layers.integrations.texts import read_tokens, windows

__all__ = [
    "empty_causal_lm",
    "load_causal_lm",
    "load_tokenizer",
    "quiet",
    "read_tokens",
    "save_causal_lm",
    "windows",
]

if importlib.util.find_spec("transformers") is not None:
    from tsq_layers.integrations.transformers.config import TsqConfig
    from tsq_layers.integrations.transformers.quantizer import TsqHfQuantizer, attach

    __all__ += ["TsqConfig", "TsqHfQuantizer", "attach"]
