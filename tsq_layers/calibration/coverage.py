"""Assign parameters of a model to its layers, and report how much of them was quantised."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from tsq_layers.errors import ConfigError, CoverageError, LayerError
from tsq_layers.layers import kind_of
from tsq_layers.numerics.memory import memory_extent
from tsq_layers.reports import LayerReport, ParameterReport
from tsq_layers.reports.gaps import largest, share_of_entries

_GAPS = 5  # that a message names

Extent = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """Entries of a parameter that are the weight of a layer; of several, if their weights are tied."""

    layers: tuple[str, ...]
    numel: int


@dataclass(frozen=True)
class Ownership:
    """One parameter of the float model, and the layers that it consists of."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]


def ownership(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[Ownership, ...]:
    """Every parameter of a model once, with the layers whose weights lie in its memory.

    Args:
        model: the float model.
        modules: its modules by name, composites split: the layers inside share the composites' memory.

    Raises:
        LayerError: a parameter has no shape yet.
    """
    _check_shapes(model)
    weights: dict[int, dict[Extent, list[str]]] = defaultdict(lambda: defaultdict(list))
    for layer, parameter in _matrices(modules):
        extent = memory_extent(parameter)
        weights[extent[0]][extent].append(layer)
    owned = []
    for name, parameter in model.named_parameters():
        storage, start, size = memory_extent(parameter)
        parts = [
            Part(tuple(layers), length // parameter.element_size())
            for (_, offset, length), layers in weights[storage].items()
            if start <= offset and offset + length <= start + size
        ]
        owned.append(
            Ownership(
                name,
                tuple(parameter.shape),
                str(parameter.dtype).removeprefix("torch."),
                tuple(parts),
            )
        )
    return tuple(owned)


def _check_shapes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise LayerError(f"{name} has no shape yet; call the model on a batch first")


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix, or a stack of them; biases of several experts are not."""
    return parameter.dim() >= 2 and "bias" not in name


def parameter_reports(
    owned: Iterable[Ownership], layers: Iterable[LayerReport]
) -> tuple[ParameterReport, ...]:
    """Return a report of every parameter, from the reports of the layers."""
    by_name = {layer.name: layer for layer in layers}
    return tuple(_report(owner, by_name) for owner in owned)


def check_share(wanted: float) -> None:
    """Raise :class:`~tsq_layers.errors.ConfigError` if a wanted coverage is no share, 0 to 1."""
    if not isinstance(wanted, (int, float)) or not 0 <= wanted <= 1:
        raise ConfigError(f"min_coverage={wanted!r}: give a number of at least 0 and at most 1")


def check_coverage(parameters: Sequence[ParameterReport], wanted: float) -> None:
    """Raise if less than a share of all parameters was quantised.

    Raises:
        CoverageError: it was less; the largest gaps are named.
    """
    share = share_of_entries(parameters)
    if share >= wanted:
        return
    total = sum(parameter.numel for parameter in parameters)
    gaps = "; ".join(
        f"{item.kept / total:.1%} {item.name} ({item.reason})"
        for item in largest(parameters, _GAPS)
    )
    raise CoverageError(
        f"{share:.1%} of the parameters would be quantised, min_coverage={wanted:g} asks for more; "
        f"the largest gaps are {gaps}"
    )


def _report(owner: Ownership, layers: Mapping[str, LayerReport]) -> ParameterReport:
    packed_parts = [
        part for part in owner.parts if any(_is_quantized(layers.get(name)) for name in part.layers)
    ]
    float_parts = [part for part in owner.parts if part not in packed_parts]
    entries = sum(part.numel for part in packed_parts)
    return ParameterReport(
        name=owner.name,
        shape=owner.shape,
        dtype=owner.dtype,
        quantized=entries,
        reason="" if entries == math.prod(owner.shape) else _reason(owner, float_parts, layers),
        layers=tuple(name for part in owner.parts for name in part.layers),
    )


def _reason(owner: Ownership, kept: list[Part], layers: Mapping[str, LayerReport]) -> str:
    if not owner.parts:
        return (
            "bias"
            if "bias" in owner.name.rpartition(".")[2]
            else "no matrix: a scale, or another vector"
        )
    reasons = dict.fromkeys(
        layers[name].reason for part in kept for name in part.layers if name in layers
    )
    text = "; ".join(filter(None, reasons)) or "not called"
    return (
        text
        if len(kept) == len(owner.parts)
        else f"{len(kept)} of {len(owner.parts)} parts: {text}"
    )


def _is_quantized(layer: LayerReport | None) -> bool:
    return layer is not None and layer.is_quantized


def _matrices(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Layers with their weights, and what else holds matrices, as reports call them."""
    for layer, module in modules.items():
        if kind_of(module) is not None:
            yield layer, module.weight  # type: ignore[misc]
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if is_matrix(name, parameter):
                yield f"{layer}.{name}".lstrip("."), parameter
