"""Tell frameworks that layers of their models are quantised, so that they can save the result.

A framework's integration registers a function, with :func:`register_host` when it is imported, or as
an entry point of the group ``tsq_layers.hosts`` whose name is the framework's top-level module:

    [project.entry-points."tsq_layers.hosts"]
    transformers = "tsq_layers.integrations.transformers.quantizer:attach"

Entry points are loaded only once that module has been imported. The function is called with every
model that was quantised or loaded; it does nothing to models that are not its own.
"""

import importlib.metadata
import sys
import warnings
from collections.abc import Callable

from torch import nn

from tsq_layers.errors import HostWarning

Attach = Callable[[nn.Module], None]

GROUP = "tsq_layers.hosts"
_hosts: dict[str, Attach] = {}

# Frameworks that write a directory which loads with random weights, unless they are told: the
# module with the class of their models, and the class.
_NEED_TO_KNOW = {"transformers": ("transformers.modeling_utils", "PreTrainedModel")}


def register_host(framework: str, attach: Attach) -> None:
    """Register the function of a framework; a later one takes its place.

    Args:
        framework: top-level module of the framework.
        attach: is called with every model that was quantised or loaded.
    """
    _hosts[framework] = attach


def tell_hosts(model: nn.Module) -> None:
    """Call the functions of all frameworks that are in use.

    Warns:
        HostWarning: the model is of a framework that has no function here.

    Example:
        >>> tell_hosts(nn.Linear(2, 2))
    """
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name in sys.modules and entry.name not in _hosts:
            register_host(entry.name, entry.load())
    for attach in _hosts.values():
        attach(model)
    for framework in _NEED_TO_KNOW:
        if framework not in _hosts and _is_of(model, framework):
            warnings.warn(
                f"{framework} does not know that layers of this {type(model).__name__} are quantised: "
                "a directory that its save_pretrained writes would load with random weights. Install "
                f"tsq_layers (pip install -e . in a source tree), or import tsq_layers.integrations.{framework} "
                "before",
                HostWarning,
                stacklevel=3,
            )


def _is_of(model: nn.Module, framework: str) -> bool:
    """Return whether a module of the model is of a framework's class of models."""
    module, name = _NEED_TO_KNOW[framework]
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and any(isinstance(inner, kind) for inner in model.modules())
