"""All kinds and composites that the library knows, the user's own among them; and why a module is neither."""

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
from tsq_layers.layers.kinds import LayerKind, is_twin
from tsq_layers.layers.linear import CONV1D, LINEAR
from tsq_layers.layers.same_padding import CONV_SAME
from tsq_layers.runtime.linear import QuantLinear

KINDS: list[LayerKind] = [LINEAR, CONV1D, *CONVOLUTIONS, CONV_SAME, EMBEDDING]
COMPOSITES: list[Composite] = [ATTENTION, EXPERTS]

_Entry = TypeVar("_Entry", LayerKind, Composite)


def register(entry: LayerKind | Composite) -> None:
    """Teach the library a layer of your own; it goes before all that are known, one of the same name is replaced.

    Loading a checkpoint needs the same registrations as making it.

    Raises:
        ConfigError: neither a ``LayerKind`` nor a ``Composite``.

    Example:
        >>> class Half(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) / 2
        >>> def split(module):
        ...     linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        ...     linear.weight, linear.bias = module.weight, module.bias
        ...     return nn.Sequential(linear, HalfOf())
        >>> class HalfOf(nn.Module):
        ...     def forward(self, x):
        ...         return x / 2
        >>> register(Composite(name="Half", matches=lambda module: type(module) is Half, split=split))
        >>> unregister("Half")
    """
    if isinstance(entry, LayerKind):
        _put_first(KINDS, entry)
    elif isinstance(entry, Composite):
        _put_first(COMPOSITES, entry)
    else:
        raise ConfigError(f"register({entry!r}): give a LayerKind, or a Composite")


def unregister(name: str) -> None:
    """Forget the kind or composite called ``name``.

    Args:
        name: as it was registered; kinds that the library brings along can be forgotten too.

    Raises:
        ConfigError: there is none.
    """
    if _remove(KINDS, name) or _remove(COMPOSITES, name):
        return
    names = ", ".join(
        [repr(kind.name) for kind in KINDS] + [repr(composite.name) for composite in COMPOSITES]
    )
    raise ConfigError(f"unregister({name!r}): there is no such kind of layer; known are {names}")


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a module, or ``None`` if it is not one layer with a weight of its own."""
    if isinstance(module, torch.jit.ScriptModule) or module._parameters.get("weight") is None:
        return None  # its weight is computed from other parameters, as pruning and weight_norm do
    return next((kind for kind in KINDS if kind.matches(module)), None)


def composite_of(module: nn.Module) -> Composite | None:
    """The composite that a module is, or ``None``."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    return next((composite for composite in COMPOSITES if composite.matches(module)), None)


def why_not(module: nn.Module) -> str:
    """Why a module with parameters of its own is no layer that can be quantised, and what can be done."""
    name = type(module).__name__
    return next((reason for applies, reason in _reasons(module) if applies), "").format(
        name=name
    ) or (f"{name} is no layer that is known; tsq_layers.layers.register can teach it")


def _reasons(module: nn.Module) -> Iterator[tuple[bool, str]]:
    own = set(module._parameters.keys())
    yield (
        isinstance(module, torch.jit.ScriptModule),
        "its code is compiled by torch.jit; give the module that it was made from",
    )
    yield (
        isinstance(module, parametrize.ParametrizationList) or parametrize.is_parametrized(module),
        "a weight is computed by a parametrization; torch.nn.utils.parametrize.remove_parametrizations makes it a plain layer",
    )
    yield (
        {"weight_g", "weight_v"} <= own,
        "its weight is computed by weight_norm; torch.nn.utils.remove_weight_norm makes it a plain layer",
    )
    yield (
        bool({"weight_orig", "bias_orig"} & own),
        "its weight or bias is computed by a hook (pruning, spectral_norm); torch.nn.utils.prune.remove, or remove_spectral_norm, makes it a plain layer",
    )
    yield (
        isinstance(module, (nn.RNNBase, nn.RNNCellBase)),
        "the weights of {name} are used step by step inside torch; torch.ao.quantization.quantize_dynamic takes them to 8 bits",
    )
    yield (
        isinstance(module, nn.Embedding) and module.max_norm is not None,
        "max_norm changes its rows when they are looked up; load the table into an nn.Embedding without max_norm",
    )
    yield (
        isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)),
        "{name} computes something of its own around its weight; tsq_layers.layers.register can teach it",
    )


def unsupported(modules: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own that are no known layer."""
    for name, module in modules:
        if module._parameters and kind_of(module) is None and not isinstance(module, QuantLinear):
            yield name, module


def packed(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantLinear]]:
    """Every quantised layer of a model: its name, the layer, and its packed matrix (which may be the layer itself).

    A layer that the model has under two names comes twice.
    """
    inside: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name in inside:
            continue
        matrix = module._modules.get("matrix") if is_twin(module) else module
        if isinstance(matrix, QuantLinear):
            inside.add(f"{name}.matrix".lstrip("."))
            yield name, module, matrix


def _put_first(known: list[_Entry], entry: _Entry) -> None:
    _remove(known, entry.name)
    known.insert(0, entry)


def _remove(known: list[_Entry], name: str) -> bool:
    """Whether an entry of that name was there."""
    before = len(known)
    known[:] = [entry for entry in known if entry.name != name]
    return len(known) < before
