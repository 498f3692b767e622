"""The tensors that a format stores as floats: all that are not packed, under the names of the float model."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.errors import ExportError, StateError
from tsq_layers.layers import composite_behind
from tsq_layers.layers.attention import ATTENTION, SplitAttention
from tsq_layers.layers.expert_weights import ExpertWeights
from tsq_layers.layers.experts import EXPERTS
from tsq_layers.layers.registry import COMPOSITES
from tsq_layers.numerics.memory import memory_extent
from tsq_layers.runtime.linear import QuantLinear

_KNOWN = (ATTENTION, EXPERTS)


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a file, made when it is written.

    Args:
        key: its name in the file.
        dtype: of the tensor.
        shape: of the tensor.
        make: the tensor, on any device.
        identity: equal for tensors with the same values, because they share memory.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    identity: object = None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(key: str, tensor: Tensor) -> "Stored":
        """A tensor that is there already.

        Raises:
            StateError: it has no values.
        """
        if tensor.is_meta:
            raise StateError(
                f"tensor {key!r} is on the meta device and has no values to export: load it first, "
                "or undo the offloading"
            )
        identity = (memory_extent(tensor), tensor.dtype, tensor.shape, tensor.stride())
        return Stored(key, tensor.dtype, tuple(tensor.shape), tensor.detach, identity)


def float_tensors(
    model: nn.Module, held: Mapping[str, QuantLinear], others: Mapping[str, bool]
) -> list[Stored]:
    """Parameters and persistent buffers of a model, without those of the layers in ``held``.

    Args:
        model: with quantised layers.
        held: names of the layers that are written packed.
        others: names of the quantised layers that are dequantised → whether to turn the matrix around.

    Returns:
        every tensor under the name that the float model has for it. What loaders tie to another tensor
        (a tied output layer) is left out.

    Raises:
        StateError: a tensor without values.
        ExportError: a tensor whose name in the float model is not known.
    """
    found: dict[str, Stored] = {}
    done: set[str] = set(held)
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_under(name, done):
            continue
        dot = f"{name}." if name else ""
        if name in others:
            tensors, whole = _dequantised(dot, module, turned=others[name]), True
        else:
            tensors, whole = _of_module(name, dot, module)
        found.update({stored.key: stored for stored in tensors})
        if whole:
            done.add(name)
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return [
        stored
        for key, stored in found.items()
        if not _is_tied(stored, found.get(ties.get(key, "")))
    ]


def _is_tied(stored: Stored, source: Stored | None) -> bool:
    return source is not None and source.identity == stored.identity


def _of_module(name: str, dot: str, module: nn.Module) -> tuple[Iterator[Stored], bool]:
    """The tensors of a module that is not quantised, and whether those of its children are among them."""
    composite = composite_behind(module)
    if composite is not None and not any(
        known.name == composite and known in COMPOSITES for known in _KNOWN
    ):
        raise ExportError(
            f"module {name!r} ({type(module).__name__}) was split into layers by a composite of "
            "your own, so the names of "
            "its tensors in the float model are not known; add it to skip"
        )
    if isinstance(module, ExpertWeights):
        return iter([_stacked(name, module)]), True
    if isinstance(module, SplitAttention):
        return _joined(dot, module), True
    return _own(dot, module), False


def _own(dot: str, module: nn.Module) -> Iterator[Stored]:
    for local, parameter in module._parameters.items():
        if parameter is not None:
            yield Stored.of(dot + local, parameter)
    for local, buffer in module._buffers.items():
        if buffer is not None and local not in module._non_persistent_buffers_set:
            yield Stored.of(dot + local, buffer)


def _dequantised(dot: str, module: nn.Module, *, turned: bool) -> Iterator[Stored]:
    """Weight and bias of a quantised layer, as the float layer had them."""
    layer: Any = module
    matrix: QuantLinear = layer if isinstance(layer, QuantLinear) else layer.matrix
    if not isinstance(getattr(type(layer), "weight", None), property):
        raise ExportError(
            f"layer {dot[:-1]!r} ({type(layer).__name__}) is of a kind of your own, and how its "
            "weight is shaped is not known; add it to skip"
        )

    def weight() -> Tensor:
        tensor: Tensor = layer.weight
        return (tensor.T if turned else tensor).contiguous()

    table = isinstance(layer, nn.Embedding)
    shape = (
        (matrix.out_features, matrix.in_features)
        if table or layer is matrix
        else tuple(layer.weight.shape)
    )
    yield Stored(
        f"{dot}weight", matrix.dtype, shape[::-1] if turned else shape, weight, (id(matrix), turned)
    )
    # A table may share the matrix of an output layer, whose bias is not its own.
    if matrix.bias is not None and not table:
        yield Stored.of(f"{dot}bias", matrix.bias)


def _stacked(name: str, weights: ExpertWeights) -> Stored:
    """Layers in the place of a 3-D parameter, as that parameter."""

    def stack() -> Tensor:
        layers: list[Any] = list(weights)
        matrices: list[Tensor] = [layer.weight for layer in layers]
        return torch.stack([matrix.T if weights.transposed else matrix for matrix in matrices])

    return Stored(name, weights.dtype, tuple(weights.shape), stack, id(weights))


def _joined(dot: str, attention: SplitAttention) -> Iterator[Stored]:
    """An attention that was split into four layers, under the names of ``nn.MultiheadAttention``."""
    if attention.in_proj_weight is not None:
        yield _made(f"{dot}in_proj_weight", lambda: attention.in_proj_weight)
    else:
        for name in ("q_proj", "k_proj", "v_proj"):
            yield _made(f"{dot}{name}_weight", lambda name=name: getattr(attention, name).weight)
    if attention.in_proj_bias is not None:
        yield _made(f"{dot}in_proj_bias", lambda: attention.in_proj_bias)
    out: Any = attention.out_proj
    yield _made(f"{dot}out_proj.weight", lambda: out.weight)
    if out.bias is not None:
        yield Stored.of(f"{dot}out_proj.bias", out.bias)
    yield from _own(dot, attention)


def _made(key: str, make: Callable[..., Tensor | None]) -> Stored:
    def plain() -> Tensor:
        tensor = make()
        assert tensor is not None
        return tensor.detach().as_subclass(Tensor)

    made = plain()
    return Stored(key, made.dtype, tuple(made.shape), plain, key)


def _is_under(name: str, names: set[str]) -> bool:
    """Return whether a module is one of ``names``, or inside of one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in names for end in range(1, len(parts) + 1))
