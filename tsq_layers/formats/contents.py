"""Read a quantised model for a format that holds packed linear layers and float tensors, and nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tsq_layers.errors import ExportError, StateError
from tsq_layers.formats.floats import Stored, float_tensors
from tsq_layers.formats.limits import check_properties
from tsq_layers.layers import composite_behind, kind_behind, packed
from tsq_layers.runtime.linear import QuantLinear


@dataclass(frozen=True, eq=False)
class Layer:
    """A quantised layer of a model.

    Args:
        name: dotted name.
        module: the layer.
        matrix: its packed matrix; the layer itself if it is a linear one.
        kind: ``"Linear"``, ``"Conv1D"`` (that of transformers), or what else it took the place of.
    """

    name: str
    module: nn.Module
    matrix: QuantLinear
    kind: str


@dataclass(frozen=True, eq=False)
class Contents:
    """A quantised model, divided by what a format can hold.

    Args:
        model: of transformers.
        config: its ``config``.
        held: name → packed matrix, the layers that the format holds packed.
        floats: every other tensor of the model, quantised ones dequantised, under the names that the float
            model has for them. Tensors that loaders tie to another one are left out.
        unquantised: names of the layers that hold a float matrix: linear layers, but no embeddings.
    """

    model: nn.Module
    config: Any
    held: Mapping[str, QuantLinear]
    floats: Sequence[Stored]
    unquantised: Sequence[str]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model, that of its first packed layer."""
        return next(iter(self.held.values())).dtype


def read(
    model: nn.Module,
    takes: Callable[[Layer], bool],
    *,
    format_name: str,
    holds: str = "linear layers",
    dequantize_others: bool = False,
    planned: Sequence[Layer] | None = None,
) -> Contents:
    """Divide a model.

    Args:
        model: a transformers model with quantised layers.
        takes: whether the format can hold a layer packed; its width and grids are not asked for here.
        format_name: for messages.
        holds: for messages, what ``takes`` is true of.
        dequantize_others: let the layers that it cannot hold be float tensors.
        planned: layers that a float model will have, which need no values.

    Raises:
        StateError: nothing in the model is quantised, or tensors have no values.
        ExportError: no transformers model; layers that the format cannot hold, and ``dequantize_others`` is not
            given; or tensors whose names in the float model are not known.
    """
    config = getattr(model, "config", None)
    layers = layers_of(model) if planned is None else planned
    if not hasattr(config, "to_json_string") or not hasattr(config, "model_type"):
        raise ExportError(
            f"{type(model).__name__} has no transformers config, without which no engine can build "
            "it; save it with tsq.save"
        )
    held, others = _divided(layers, takes)
    if others and not dequantize_others:
        raise ExportError(
            f"{format_name} holds {holds} only, and {_named(others)} not; leave such layers out of the quantisation "
            "(skip=…), or write them as floats with dequantize_others=True (--dequantize-others)"
        )
    if not held:
        raise ExportError(
            f"{format_name} can hold no quantised layer of this {type(model).__name__} packed"
        )
    if planned is None:
        _check_values(layers)
    check_properties(held, format_name)
    turned = _turned(others) if planned is None else {}  # floats still
    linear = [layer.name for layer in others if layer.kind in ("Linear", "Conv1D")]
    unquantised = dict.fromkeys([*_unquantised(model), *linear])
    return Contents(
        model,
        config,
        held,
        float_tensors(model, held, turned),
        [name for name in unquantised if name not in held],
    )


def layers_of(model: nn.Module) -> list[Layer]:
    """Every quantised layer of a model.

    Raises:
        StateError: there is none.
    """
    report = getattr(model, "tsq_report", None)
    kinds = {} if report is None else {layer.name: layer.kind for layer in report.layers}
    layers = []
    for name, module, matrix in packed(model):
        inside = composite_around(model, name, composite_behind)
        known = kind_behind(module) or kinds.get(name)
        kind = inside or known or ("Linear" if module is matrix else type(module).__name__)
        layers.append(Layer(name, module, matrix, kind))
    if not layers:
        raise StateError(
            f"{type(model).__name__} holds no QuantLinear: call tsq.quantize(model, config, "
            "batches), or prepare, calibrate and convert, first"
        )
    return layers


def composite_around(
    model: nn.Module, name: str, of: Callable[[nn.Module], str | None]
) -> str | None:
    """Return the kind of the module that is split into layers, one of them called ``name``; ``None`` without one.

    Args:
        model: whose it is.
        name: of the layer; the module need not be split yet.
        of: what a module is.
    """
    parts = name.split(".")
    for end in range(len(parts)):
        composite = of(model.get_submodule(".".join(parts[:end])))
        if composite is not None:
            return composite
    return None


def _divided(
    layers: Sequence[Layer], takes: Callable[[Layer], bool]
) -> tuple[dict[str, QuantLinear], list[Layer]]:
    """Split layers into those that a format holds and others. A matrix not held in one place is held nowhere."""
    elsewhere = {id(layer.matrix) for layer in layers if not takes(layer)}
    held = {layer.name: layer.matrix for layer in layers if id(layer.matrix) not in elsewhere}
    return held, [layer for layer in layers if layer.name not in held]


def _turned(others: Sequence[Layer]) -> dict[str, bool]:
    """Names of layers to be dequantised → whether the float layer has its matrix as (K, N)."""
    return {layer.name: layer.kind == "Conv1D" for layer in others}


def _named(others: Sequence[Layer]) -> str:
    shown = ", ".join(f"{layer.name!r} ({layer.kind})" for layer in others[:3])
    return shown if len(others) <= 3 else f"{shown} and {len(others) - 3} more"


def _check_values(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if layer.matrix.words.is_meta:
            raise StateError(
                f"layer {layer.name!r} is on the meta device and has no values to export: load a checkpoint first"
            )


def _unquantised(model: nn.Module) -> list[str]:
    """Modules with a matrix of their own that is no table: what loaders take for a linear layer."""
    names = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            names.append(name)
    return names
