"""The part of a description that travels inside other files: which layers are quantised, and how to build them.

Layers of one form are listed together, so that a model of hundreds of layers needs a few entries.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn

from tsq_layers.errors import CheckpointError
from tsq_layers.formats.tsq.layout import is_under
from tsq_layers.formats.tsq.writing import composites_of, layers_of, shared_once
from tsq_layers.layers.expert_weights import ExpertWeights
from tsq_layers.runtime.spec import LayerSpec

QUANT_METHOD = "tsq"
SCHEMA_VERSION = 1
_WHERE = "quantization_config"


@dataclass(frozen=True, kw_only=True)
class Outline:
    """An outline of a model: its quantised layers, and the format of each.

    Args:
        layers: dotted name → specification.
        composites: names of the modules that were split into plain layers.
        aliases: key → key of the tensor that it shares; both are of packed layers, or neither is.
        placeholders: keys of empty tensors, which keep other readers from taking the file for a float model.

    Example:
        >>> from tsq_layers.runtime.linear import QuantLinear
        >>> outline = Outline.of(nn.Sequential(QuantLinear(16, 8, bits=2, group_size=8)))
        >>> outline.to_dict()["layers"][0]["names"]
        ['0']
        >>> Outline.from_dict(outline.to_dict()) == outline
        True
    """

    layers: Mapping[str, LayerSpec]
    composites: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    placeholders: Sequence[str] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The outline of a quantised model; its tensors may be on the meta device.

        Raises:
            StateError: nothing in it is quantised.
        """
        layers = layers_of(model)
        return cls(
            layers=layers,
            composites=composites_of(model),
            aliases=_aliases(model, layers),
            placeholders=[_placeholder(model, list(layers))],
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        groups: dict[LayerSpec, list[str]] = {}
        for name, spec in self.layers.items():
            groups.setdefault(spec, []).append(name)
        return {
            "schema_version": SCHEMA_VERSION,
            "layers": [{**spec.to_dict(), "names": names} for spec, names in groups.items()],
            "composites": list(self.composites),
            "aliases": dict(self.aliases),
            "placeholders": list(self.placeholders),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: of another version, or unknown, missing or ill-typed keys.
        """
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{_WHERE} has schema_version={version!r}; this version of tsq_layers reads "
                f"{SCHEMA_VERSION}: upgrade tsq_layers, or save the model again"
            )
        kinds = {"layers": list, "composites": list, "aliases": dict, "placeholders": list}
        for key, kind in kinds.items():
            if not isinstance(values.get(key), kind):
                raise CheckpointError(
                    f"{_WHERE} has no {kind.__name__} under {key!r}; save the model again"
                )
        layers: dict[str, LayerSpec] = {}
        for number, group in enumerate(values["layers"]):
            layers |= _layers(group, number)
        return cls(
            layers=layers,
            composites=list(values["composites"]),
            aliases=dict(values["aliases"]),
            placeholders=list(values["placeholders"]),
        )


def _aliases(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Return the tensors that packed layers share, and those that the rest of the model shares.

    A bias of a head that is also a parameter of another module is stored twice: transformers, which loads these files,
    ties its own parameters, but none to those of a packed layer.
    """
    first: dict[tuple[str, bool], str] = {}
    aliases: dict[str, str] = {}
    for alias, key in shared_once(model)[1].items():
        for name in (key, alias):
            holder = first.setdefault((key, is_under(name, layers)), name)
            if holder != name:
                aliases[name] = holder
    return aliases


def _layers(group: Any, number: int) -> dict[str, LayerSpec]:
    """The layers of one form."""
    names = group.get("names") if isinstance(group, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"{_WHERE}: entry {number} of layers has no list of names; save the model again"
        )
    fields = {key: value for key, value in group.items() if key != "names"}
    spec = LayerSpec.from_dict(fields, next(iter(names), ""), _WHERE)
    return dict.fromkeys(names, spec)


def _placeholder(model: nn.Module, layers: Sequence[str]) -> str:
    """The key of a float weight that a quantised layer has replaced; under it files hold an empty tensor.

    A reader that knows nothing of packed layers finds no weight for them, and may go on with random ones. The empty
    tensor has the wrong shape for the weight, which is an error everywhere.
    """
    for name in layers:
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), ExpertWeights):
            return f"{name}.weight".lstrip(".")
    return layers[0].rpartition(".")[0]  # the parameter that experts have replaced
