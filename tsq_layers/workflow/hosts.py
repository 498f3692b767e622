"""Tell frameworks that layers of their models are quantised, so that they can save the result.

A framework's integration registers a function with :func:`register_host` when it is imported, or
names it in an entry point of the group ``tsq_layers.hosts``. The entry point is called like the
framework's top-level module:

    [project.entry-points."tsq_layers.hosts"]
    transformers = "tsq_layers.integrations.transformers.quantizer:attach"

An entry point is loaded when a model contains a module of the framework: one whose class, or a base
of it, is defined there. Models of other kinds load nothing. A registered function is called with
every model that is quantised or loaded afterwards, and does nothing to models that are not its own.
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

# Classes of these are in every quantised model, and need no function. Looking for entry points reads
# the metadata of all installed packages, which is slow where layers are converted one by one.
_NO_FRAMEWORKS = {"builtins", "torch", "tsq_layers"}


def register_host(framework: str, attach: Attach) -> None:
    """Register the function of a framework; a later one takes its place.

    Args:
        framework: top-level module of the framework.
        attach: is called with every model that is quantised or loaded.
    """
    _hosts[framework] = attach


def tell_hosts(model: nn.Module) -> None:
    """Call the function of every registered framework, and of every other one that the model is of.

    Warns:
        HostWarning: the model is of a framework that has no function, or the function cannot be loaded.

    Example:
        >>> tell_hosts(nn.Linear(2, 2))
    """
    frameworks = _frameworks_of(model) - _NO_FRAMEWORKS - _hosts.keys()
    reasons = _load_entry_points(frameworks) if frameworks else {}
    for attach in list(_hosts.values()):
        attach(model)
    for framework in _NEED_TO_KNOW:
        if framework not in _hosts and _is_of(model, framework):
            reasons.setdefault(framework, f"it has no entry point in {GROUP!r}")
    for framework, reason in reasons.items():
        _warn(model, framework, reason)


def _warn(model: nn.Module, framework: str, reason: str) -> None:
    """Warn that a framework cannot save a model."""
    unaware = f"{framework} does not know that layers of this {type(model).__name__} are quantised"
    if framework in _NEED_TO_KNOW:
        integration = f"tsq_layers.integrations.{framework}"
        message = (
            f"{unaware}: a directory that its save_pretrained writes would load with random weights, "
            f"for {reason}. Save it with tsq.save, or call {integration}.attach(model) before; for other "
            f"models install tsq_layers (pip install -e . in a source tree), or import {integration} first"
        )
    else:
        message = (
            f"{unaware}, for {reason}: save the model with tsq.save, or install versions of {framework} "
            "and of its integration that fit together"
        )
    warnings.warn(message, HostWarning, stacklevel=5)  # the caller of convert, quantize or load


def _frameworks_of(model: nn.Module) -> set[str]:
    """Return the top-level modules that define the classes of a model's modules, and their bases."""
    classes = {type(module) for module in model.modules()}
    bases = {base for cls in classes for base in cls.__mro__}
    return {base.__module__.partition(".")[0] for base in bases}


def _load_entry_points(frameworks: set[str]) -> dict[str, str]:
    """Register the functions of frameworks that have an entry point.

    Returns:
        framework → why its function cannot be loaded.
    """
    reasons: dict[str, str] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name not in frameworks or entry.name in _hosts:
            continue
        # A result of hours must not be lost for an entry point of another version, or for a
        # framework of a version that its integration does not know.
        try:
            attach = entry.load()
        except (ImportError, AttributeError) as error:
            reasons[entry.name] = f"{entry.value} cannot be loaded: {error}"
        else:
            register_host(entry.name, attach)
            reasons.pop(entry.name, None)
    return reasons


def _is_of(model: nn.Module, framework: str) -> bool:
    """Return whether a module of the model is of a framework's class of models."""
    module, name = _NEED_TO_KNOW[framework]
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and any(isinstance(inner, kind) for inner in model.modules())
