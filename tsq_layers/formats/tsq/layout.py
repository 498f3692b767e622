"""Plan the loading of a model, with every check that needs no tensor values. Nothing is changed here."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsq_layers.errors import CheckpointError
from tsq_layers.formats.tsq.description import (
    DESCRIPTION_FILE,
    NON_PERSISTENT,
    Description,
    Entry,
    LayerSpec,
    TensorSpec,
    entries,
)
from tsq_layers.layers import kind_of, packed
from tsq_layers.runtime.linear import QuantLinear

_WRAPPERS = ("module", "_orig_mod")  # where DataParallel and torch.compile keep the model
_OTHER_MODEL = "build the model with the configuration that it was saved with"


@dataclass(frozen=True, eq=False)
class Plan:
    """The changes that loading makes to a model.

    Args:
        layers: name → new layer, on the meta device.
        fill: parameters and buffers, of the model and of the new layers, that take stored values.
        follow: plain attributes (module, name, entry) that are the same tensor as an entry.
        devices: key of a stored tensor → where it goes.
    """

    layers: Mapping[str, nn.Module]
    fill: Sequence[Entry]
    follow: Sequence[tuple[nn.Module, str, Entry]]
    devices: Mapping[str, torch.device]


def plan(model: nn.Module, description: Description, device: torch.device | None) -> Plan:
    """Compare a model with a description, and plan where each stored tensor goes.

    Raises:
        CheckpointError: they do not fit.
    """
    weights: dict[str, Tensor] = {}
    for name, spec in description.layers.items():
        weights[name] = replaced_weight(model, name, spec)
    layers = new_layers(model, description)
    new_entries = {name: list(entries(layer, name)) for name, layer in layers.items()}
    all_new = [entry for name in new_entries for entry in new_entries[name]]
    old_entries = [entry for entry in entries(model) if not is_under(entry.key, weights)]
    _check_keys(old_entries, [entry.key for entry in all_new], description)
    old_entries = [
        entry for entry in old_entries if description.canonical(entry.key) in description.tensors
    ]
    _check_sharing(old_entries, description)
    for entry in old_entries:
        if not entry.key.startswith(NON_PERSISTENT):
            _check_shape(entry, description)
    for entry in all_new:
        _check_exactly(entry, description)
    devices: dict[str, torch.device] = {}
    for entry in reversed(old_entries):  # of entries that share a tensor, the first one decides
        devices[description.canonical(entry.key)] = device or _real(entry.tensor.device)
    for name, weight in weights.items():
        for entry in new_entries[name]:
            devices[description.canonical(entry.key)] = device or _real(weight.device)
    fill = [*old_entries, *all_new]
    return Plan(layers, fill, _following_attributes(model, old_entries, weights), devices)


def replaced_weight(model: nn.Module, name: str, spec: LayerSpec) -> Tensor:
    """The weight of the layer that a quantised one is to replace, checked."""
    kind = type(model).__name__
    try:
        module = model.get_submodule(name)
    except AttributeError:
        wrapper = next(
            (prefix for prefix in _WRAPPERS if f".{name}".startswith(f".{prefix}.")), None
        )
        cure = (
            _OTHER_MODEL
            if wrapper is None
            else f"the model was saved inside a wrapper: save its .{wrapper} instead"
        )
        raise CheckpointError(
            f"layer {name!r} of the checkpoint is not in this {kind}; {cure}"
        ) from None
    if isinstance(module, QuantLinear):
        raise CheckpointError(
            f"layer {name!r} of this {kind} is quantised already; give a freshly built float model"
        )
    layer_kind = kind_of(module)
    if layer_kind is None:
        raise CheckpointError(
            f"layer {name!r} of this {kind} is a {type(module).__name__}, no layer that can be "
            f"quantised; {_OTHER_MODEL}, and with the kinds that were registered then"
        )
    weight = layer_kind.weight(module)
    if tuple(weight.shape) != (spec.out_features, spec.in_features):
        raise CheckpointError(
            f"layer {name!r} of this {kind} has a weight matrix of shape {tuple(weight.shape)}, in "
            f"the checkpoint it is {(spec.out_features, spec.in_features)}; {_OTHER_MODEL}"
        )
    return weight


def new_layers(model: nn.Module, description: Description) -> dict[str, nn.Module]:
    """An empty layer for every name.

    A module that the model has under two names becomes one layer under two names; layers whose packed matrix is one
    in the checkpoint share it.
    """
    layers: dict[str, nn.Module] = {}
    matrices: dict[object, QuantLinear] = {}
    known: dict[object, nn.Module] = {}
    for name, spec in description.layers.items():
        old = model.get_submodule(name)
        kind = kind_of(old)
        assert kind is not None
        stored = _stored_keys(kind.replacement(old, spec.build(name)), name, description)
        matrix = matrices.setdefault((spec, stored), spec.build(name))
        old_bias = getattr(old, "bias", None)
        if matrix.bias is not None and isinstance(old_bias, nn.Parameter):
            matrix.bias.requires_grad_(old_bias.requires_grad)
        layers[name] = known.setdefault(
            (id(old), spec, stored), kind.replacement(old, matrix).train(old.training)
        )
    return layers


def _stored_keys(layer: nn.Module, name: str, description: Description) -> tuple[str, ...]:
    """The stored tensors of a layer's packed matrix."""
    prefix = next(f"{name}.{place}".strip(".") for place, _, _ in packed(layer))
    matrix = next(matrix for _, _, matrix in packed(layer))
    inner = prefix if matrix is layer else f"{prefix}.matrix".lstrip(".")
    return tuple(description.canonical(entry.key) for entry in entries(matrix, inner))


def _check_keys(kept: Sequence[Entry], added: Sequence[str], description: Description) -> None:
    """Every tensor of the model is stored, and every stored tensor is in the model.

    Buffers that are not persistent are derived values, which some models make only when they run:
    they are asked for only where there is nothing else, on the meta device.
    """
    stored = {*description.tensors, *description.aliases}
    wanted = {*added, *(entry.key for entry in kept if not entry.key.startswith(NON_PERSISTENT))}
    underived = {
        entry.key for entry in kept if entry.key.startswith(NON_PERSISTENT) and entry.tensor.is_meta
    }
    missing = sorted((wanted | underived) - stored)
    if missing:
        derived = all(key.startswith(NON_PERSISTENT) for key in missing)
        cure = "build the model on a real device, where it makes them" if derived else _OTHER_MODEL
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}, which the model has; {cure}")
    unexpected = sorted(key for key in stored - wanted if not key.startswith(NON_PERSISTENT))
    if unexpected:
        raise CheckpointError(
            f"the checkpoint holds {_some(unexpected)}, which the model does not have; {_OTHER_MODEL}"
        )


def _check_sharing(kept: Sequence[Entry], description: Description) -> None:
    """A module that the model has under two names can hold only one value."""
    first: dict[tuple[int, str], Entry] = {}
    for entry in kept:
        other = first.setdefault((id(entry.owner), entry.local), entry)
        if description.canonical(other.key) != description.canonical(entry.key):
            raise CheckpointError(
                f"{other.key!r} and {entry.key!r} belong to one module in this model but are two "
                f"tensors in the checkpoint; {_OTHER_MODEL}"
            )


def _check_shape(entry: Entry, description: Description) -> None:
    stored = description.tensors[description.canonical(entry.key)]
    if stored.shape != tuple(entry.tensor.shape):
        raise CheckpointError(
            f"tensor {entry.key!r} has shape {tuple(entry.tensor.shape)} in this model and "
            f"{stored.shape} in the checkpoint; {_OTHER_MODEL}"
        )


def _check_exactly(entry: Entry, description: Description) -> None:
    stored, expected = (
        description.tensors[description.canonical(entry.key)],
        TensorSpec.of(entry.tensor),
    )
    if stored != expected:
        raise CheckpointError(
            f"tensor {entry.key!r} is {stored} in the checkpoint; its layer, as {DESCRIPTION_FILE} "
            f"describes it, needs {expected}. "
            "The file is damaged or was changed by hand; save the model again"
        )


def _following_attributes(
    model: nn.Module, kept: Sequence[Entry], replaced: Collection[str]
) -> list[tuple[nn.Module, str, Entry]]:
    """Tensors that modules keep as plain attributes: those that are also a parameter or buffer will follow it."""
    by_tensor = {id(entry.tensor): entry for entry in kept}
    follow = []
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, Tensor) or is_under(name, replaced):
                continue
            if id(value) in by_tensor:
                follow.append((module, attribute, by_tensor[id(value)]))
            elif value.is_meta:
                raise CheckpointError(
                    f"attribute {attribute!r} of module {name!r} ({type(module).__name__}) is a "
                    "tensor on the meta device and, being neither "
                    "parameter nor buffer, is not in the checkpoint; build the model on a real device"
                )
    return follow


def is_under(key: str, names: Collection[str]) -> bool:
    """Return whether a key, or a module's name, is one of ``names`` or lies below one."""
    parts = key.removeprefix(NON_PERSISTENT).split(".")
    return "" in names or any(".".join(parts[:end]) in names for end in range(1, len(parts) + 1))


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(map(repr, keys[:3]))
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
