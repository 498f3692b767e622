"""Hold the kinds of layers and the composites that the library knows, and explain why a module is neither."""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from tsq_layers.errors import ConfigError
from tsq_layers.layers.attention import ATTENTION
from tsq_layers.layers.composites import Composite
from tsq_layers.layers.convolution import CONVOLUTIONS
from tsq_layers.layers.embedding import EMBEDDING
from tsq_layers.layers.experts import EXPERTS
from tsq_layers.layers.kinds import LayerKind, is_replacement
from tsq_layers.layers.linear import CONV1D, LINEAR
from tsq_layers.layers.same_padding import CONV_SAME
from tsq_layers.runtime.linear import QuantLinear

KINDS: list[LayerKind] = [LINEAR, CONV1D, *CONVOLUTIONS, CONV_SAME, EMBEDDING]
"""The kinds of layers; a module is of the first one that matches."""
COMPOSITES: list[Composite] = [ATTENTION, EXPERTS]
"""The composites; a module is the first one that matches."""

_Entry = TypeVar("_Entry", LayerKind, Composite)


def register(entry: LayerKind | Composite) -> None:
    """Add a kind of layer or a composite of your own.

    It is tried before all others. An entry of the same name is replaced. To load a checkpoint, the same
    entries must be registered as when it was saved.

    Args:
        entry: the kind or the composite.

    Raises:
        ConfigError: ``entry`` is neither a ``LayerKind`` nor a ``Composite``.

    Example:
        >>> class Half(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) / 2
        >>> class Halve(nn.Module):
        ...     def forward(self, x):
        ...         return x / 2
        >>> def split(module):
        ...     linear = nn.Linear(module.in_features, module.out_features)
        ...     linear.weight, linear.bias = module.weight, module.bias
        ...     return nn.Sequential(linear, Halve())
        >>> half = Composite(name="Half", matches=lambda module: type(module) is Half, split=split)
        >>> register(half)
        >>> unregister("Half")
    """
    if isinstance(entry, LayerKind):
        _put_first(KINDS, entry)
    elif isinstance(entry, Composite):
        _put_first(COMPOSITES, entry)
    else:
        raise ConfigError(f"register({entry!r}): give a LayerKind, or a Composite")


def unregister(name: str) -> None:
    """Remove the kind of layer or the composite called ``name``.

    Args:
        name: name of a registered entry, or of one of the library's own.

    Raises:
        ConfigError: there is no entry of this name.
    """
    if _remove(KINDS, name) or _remove(COMPOSITES, name):
        return
    names = [kind.name for kind in KINDS] + [composite.name for composite in COMPOSITES]
    known_names = ", ".join(map(repr, names))
    raise ConfigError(
        f"unregister({name!r}): there is no such kind of layer; known are {known_names}"
    )


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a module, or ``None`` if it is not a layer with one weight of its own."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    # Pruning and weight_norm compute the weight from other parameters; then it is an attribute.
    if module._parameters.get("weight") is None:
        return None
    for kind in KINDS:
        if kind.matches(module):
            return kind
    return None


def composite_of(module: nn.Module) -> Composite | None:
    """Return the composite that a module is, or ``None``."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    for composite in COMPOSITES:
        if composite.matches(module):
            return composite
    return None


def why_not(module: nn.Module) -> str:
    """Return the reason why a module with parameters of its own cannot be quantised, and what the user can do."""
    parameters = module._parameters.keys()
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return "its code is compiled by torch.jit; give the module that it was made from"
    if isinstance(module, parametrize.ParametrizationList) or parametrize.is_parametrized(module):
        return (
            "a weight is computed by a parametrization; "
            "torch.nn.utils.parametrize.remove_parametrizations makes it a plain layer"
        )
    if parameters >= {"weight_g", "weight_v"}:
        return (
            "its weight is computed by weight_norm; "
            "torch.nn.utils.remove_weight_norm makes it a plain layer"
        )
    if parameters & {"weight_orig", "bias_orig"}:
        return (
            "its weight or bias is computed by a hook (pruning, spectral_norm); "
            "torch.nn.utils.prune.remove, or remove_spectral_norm, makes it a plain layer"
        )
    return _why_not_class(module, name)


def _why_not_class(module: nn.Module, name: str) -> str:
    """Return the reason for a module whose parameters are plain."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return (
            f"the weights of {name} are used step by step inside torch; "
            "torch.ao.quantization.quantize_dynamic takes them to 8 bits"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return (
            "max_norm changes its rows when they are looked up; "
            "load the table into an nn.Embedding without max_norm"
        )
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return (
            f"{name} computes something of its own around its weight; "
            "tsq_layers.layers.register can teach it"
        )
    return f"{name} is no layer that is known; tsq_layers.layers.register can teach it"


def unsupported(modules: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules that have parameters of their own and are no layer of a known kind.

    Args:
        modules: names and modules, as ``named_modules`` yields them.
    """
    for name, module in modules:
        if module._parameters and kind_of(module) is None and not isinstance(module, QuantLinear):
            yield name, module


def packed(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantLinear]]:
    """Yield every quantised layer of a model: its name, the layer, and its packed matrix.

    The matrix may be the layer itself. A layer that the model has under two names is yielded twice.
    """
    matrix_names: set[str] = set()  # of matrices whose layer was yielded
    for name, module in model.named_modules(remove_duplicate=False):
        if name in matrix_names:
            continue
        matrix = module._modules.get("matrix") if is_replacement(module) else module
        if isinstance(matrix, QuantLinear):
            matrix_names.add(f"{name}.matrix".lstrip("."))
            yield name, module, matrix


def _put_first(entries: list[_Entry], entry: _Entry) -> None:
    _remove(entries, entry.name)
    entries.insert(0, entry)


def _remove(entries: list[_Entry], name: str) -> bool:
    """Remove the entries of a name; return True if there was one."""
    count = len(entries)
    entries[:] = [entry for entry in entries if entry.name != name]
    return len(entries) < count
