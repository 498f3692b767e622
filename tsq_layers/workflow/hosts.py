"""Frameworks whose models are quantised: those that are in use are told, so that they can save the result."""

import importlib
import sys

from torch import nn


def tell_host(model: nn.Module) -> None:
    """Let transformers know that layers of a model of its own are quantised; nothing is done if it is not in use.

    Without that its ``save_pretrained`` would write a directory that is loaded with random weights.

    Example:
        >>> tell_host(nn.Linear(2, 2))
    """
    loaded = sys.modules.get("transformers.modeling_utils")
    known = getattr(loaded, "PreTrainedModel", None)
    if known is not None and any(isinstance(module, known) for module in model.modules()):
        importlib.import_module("tsq_layers.integrations.transformers.quantizer").attach(model)
