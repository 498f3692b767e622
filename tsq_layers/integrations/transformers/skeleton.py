"""A float model of transformers on the meta device, made ready to take the tensors of a quantised checkpoint."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tsq_layers.errors import CheckpointError
from tsq_layers.formats.tsq.description import Description, TensorSpec, entries
from tsq_layers.formats.tsq.headers import AGAIN, present_aliases
from tsq_layers.formats.tsq.layout import new_layers, replaced_weight
from tsq_layers.formats.tsq.outline import Outline
from tsq_layers.formats.tsq.reading import splits_of
from tsq_layers.layers import packed, replace
from tsq_layers.layers.composites import share_hooks
from tsq_layers.numerics.memory import dtype_name
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.spec import LayerSpec


class _Later(nn.Module):
    """A module in the place of a layer that comes later.

    It has a weight, for models that give initial values to the weights of their parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_hf_initialized = True
        self.weight = torch.empty(1, 1)
        self.bias = None


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The modules that were put into a model.

    Args:
        layers: name → packed layer, all of them.
        later: those of ``layers`` that share their packed matrix with one before: they are not in the model yet, for
            transformers would look for their tensors in the files.
    """

    layers: Mapping[str, nn.Module]
    later: Mapping[str, nn.Module]

    def complete(self, model: nn.Module) -> None:
        """Put the rest in, once all tensors are loaded."""
        for name, layer in self.later.items():
            _put(model, name, layer)


def skeleton(
    model: Any,
    outline: Outline,
    stored: Mapping[str, TensorSpec] | None,
    dtypes: Mapping[str, torch.dtype],
) -> Skeleton:
    """Put empty packed layers into a model in the place of float ones.

    Args:
        model: a ``PreTrainedModel`` on the meta device.
        outline: of the model that was saved; of another class perhaps, with or without a head.
        stored: every tensor of the checkpoint, which is compared with what the layers need; ``None`` if not known.
        dtypes: part of a name → dtype, for layers that do not have the dtype of the model.

    Raises:
        CheckpointError: a layer or a tensor is missing or has another shape, with its name.
    """
    splits = splits_of(model, list(_own_names(model, outline.composites).values()))
    replace(model, splits)
    names = _own_names(model, outline.layers)
    if not names:
        first = next(iter(outline.layers), "")
        raise CheckpointError(
            f"layer {first!r} of the checkpoint, like all others, is not in this {type(model).__name__}"
        )
    specs = {}
    for name, own in names.items():
        specs[own] = _in_dtype(model, own, outline.layers[name], dtypes)
    aliases = {}
    for key, other in outline.aliases.items():
        aliases[_own_key(key, names)] = _own_key(other, names)
    keys = None
    if stored is not None:
        keys = {_own_key(key, names): spec for key, spec in stored.items()}
        aliases = present_aliases(aliases, keys)
    layers = new_layers(model, _description(specs, aliases))
    first_layers, later = _apart(layers, keys)
    if keys is not None:
        _check(first_layers, keys)
    for module in splits.values():
        # Its parameters are not those that _init_weights expects.
        module._is_hf_initialized = True  # type: ignore[assignment]
    for name, layer in layers.items():
        # A table of its own class may have buffers, which transformers makes anew; the rest needs no initial values.
        layer._is_hf_initialized = isinstance(layer, QuantLinear) or not layer._buffers  # type: ignore[assignment]
        _put(model, name, layer if name not in later else _Later())
    return Skeleton(layers, later)


def _own_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return name in the checkpoint → name in this model, for those that are in it."""
    own_names = {}
    for name in names:
        own = _own_name(model, name)
        if own is not None:
            own_names[name] = own
    return own_names


def _own_name(model: Any, name: str) -> str | None:
    """Return the name of a layer in this model, which may be the saved one's base model, or have one.

    Raises:
        CheckpointError: it is not in it, but should be.
    """
    prefix = f"{model.base_model_prefix}."
    for own in (name, f"{prefix}{name}", name.removeprefix(prefix)):
        if _has(model, own):
            return own
    # A layer of a head that this model lacks is left out; one of a part that it has is an error.
    part = name.removeprefix(prefix).partition(".")[0]
    base = getattr(model, model.base_model_prefix, model)
    if _has(model, part) or _has(base, part):
        raise CheckpointError(
            f"layer {name!r} of the checkpoint is not in this {type(model).__name__}: its "
            "config.json is that of another model"
        )
    return None


def _has(model: nn.Module, name: str) -> bool:
    """Return whether there is such a module."""
    module: Any = model
    for part in name.split("."):
        module = module._modules.get(part)
        if module is None:
            return False
    return True


def _own_key(key: str, names: Mapping[str, str]) -> str:
    """Return a tensor's key, with the name of its layer in this model."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        own = names.get(".".join(parts[:end]))
        if own is not None:
            return ".".join([own, *parts[end:]])
    return key


def _in_dtype(
    model: nn.Module, name: str, spec: LayerSpec, dtypes: Mapping[str, torch.dtype]
) -> LayerSpec:
    """Return the specification of a layer that computes in the dtype that the model is loaded in."""
    dtype = replaced_weight(model, name, spec).dtype
    name_parts = name.split(".")
    for part, part_dtype in dtypes.items():
        if part in name_parts:
            dtype = part_dtype
            break
    return dataclasses.replace(spec, dtype=dtype_name(dtype))


def _description(specs: Mapping[str, LayerSpec], aliases: Mapping[str, str]) -> Description:
    return Description(
        layers=specs, composites=[], aliases=aliases, tensors={}, report=None, library_version=""
    )


def _apart(
    layers: Mapping[str, nn.Module], keys: Mapping[str, TensorSpec] | None
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Split layers into one for each packed matrix, whose tensors are stored, and the others."""
    holders: dict[int, str] = {}
    for name, layer in layers.items():
        (_, _, matrix), *_ = packed(layer)
        word_keys = {f"{name}.words", f"{name}.matrix.words"}
        is_stored = keys is not None and not word_keys.isdisjoint(keys)
        if id(matrix) not in holders or is_stored:
            holders[id(matrix)] = name
    holder_names = set(holders.values())
    first_layers = {}
    later = {}
    for name, layer in layers.items():
        if name in holder_names:
            first_layers[name] = layer
        else:
            later[name] = layer
    return first_layers, later


def _check(layers: Mapping[str, nn.Module], keys: Mapping[str, TensorSpec]) -> None:
    """Check that every tensor of the packed layers is stored as the layer needs it.

    The dtype of a floating point tensor is not compared: it is cast.
    """
    for name, layer in layers.items():
        for entry in entries(layer, name):
            if entry.key.startswith("non_persistent:"):
                continue
            actual = keys.get(entry.key)
            required = TensorSpec.of(entry.tensor)
            if actual is None:
                raise CheckpointError(
                    f"layer {name!r}: its tensor {entry.key!r} is not in the checkpoint; {AGAIN}"
                )
            is_castable = actual.dtype == required.dtype or entry.tensor.is_floating_point()
            if actual.shape != required.shape or not is_castable:
                raise CheckpointError(
                    f"layer {name!r}: its tensor {entry.key!r} is {actual} in the checkpoint and "
                    f"should be {required}; {AGAIN}"
                )


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, local = name.rpartition(".")
    share_hooks(model.get_submodule(name), layer)
    setattr(model.get_submodule(parent), local, layer)
