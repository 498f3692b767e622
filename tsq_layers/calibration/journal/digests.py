"""Identify batches and weights between two processes, by digests of their bytes."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from tsq_layers.errors import CalibrationError, CheckpointError
from tsq_layers.numerics.memory import dtype_name
from tsq_layers.numerics.sync import to_host

HELD_OUT = "held-out:"

_PLAIN = (bool, int, float, complex, str, bytes, bytearray)
_NAMED = (torch.dtype, torch.device, torch.layout)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # entries of a weight that are looked at together, as 64-bit integers
_HALF = 0xFFFFFFFF


def fingerprint_data(batches: Iterable[object], held_out: Iterable[object] = ()) -> list[str]:
    """Digests of all batches, in their order, then those of the held-out ones with :data:`HELD_OUT` before them.

    Raises:
        CalibrationError: as :func:`fingerprint_batch`, with the number of the batch.
    """
    digests = [fingerprint_batch(batch, f"batch {index}") for index, batch in enumerate(batches)]
    others = [
        fingerprint_batch(batch, f"held-out batch {index}") for index, batch in enumerate(held_out)
    ]
    return digests + [HELD_OUT + digest for digest in others]


def fingerprint_batch(batch: object, name: str = "batch") -> str:
    """SHA-256 of a batch: equal for equal contents, in every process and on every device.

    Tensors count by dtype, shape and bytes, not by device, strides or ``requires_grad``; so do
    NumPy arrays and other buffers of numbers. Mappings count by their items whatever the order, sets by
    their elements; lists and tuples are not the same. Dataclasses count by class name and fields.
    Numbers, text, bytes, ``None``, enumeration members and torch's dtypes, devices and layouts count by value.

    Args:
        batch: any nesting of these.
        name: what the batch is called in a message.

    Raises:
        CalibrationError: anything else: its ``repr`` may be another one in the next process, or hide a difference.

    Example:
        >>> first = {"input_ids": torch.arange(3), "attention_mask": None}
        >>> second = {"attention_mask": None, "input_ids": torch.tensor([0, 1, 2])}
        >>> fingerprint_batch(first) == fingerprint_batch(second) != fingerprint_batch({})
        True
    """
    return _digest(batch, name).hex()


def fingerprint_weights(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and a checksum of the values of every tensor; one device-to-host read for all of a device.

    The checksum is Σ_ij r_i f(c_j b_ij) mod 2^64 over the bits b_ij of the entries, with fixed odd r_i and c_j
    that look random; f folds the upper half of an integer into its lower half. Sums of integers do not
    depend on their order, so that the number is the same on every device and for any number of threads; and it
    changes with a single bit, and when rows or columns change places, which a sum of values need not show.

    Args:
        weights: name → tensor of any shape and dtype, on any real device; not changed.

    Returns:
        name → ``{"shape": [N, K], "dtype": "float32", "checksum": "0123456789abcdef"}``.

    Raises:
        CheckpointError: a tensor that is not dense or has no values.

    Example:
        >>> fingerprint_weights({"fc": torch.eye(2)})
        {'fc': {'shape': [2, 2], 'dtype': 'float32', 'checksum': '5b8732e788bed3a4'}}
    """
    by_device: dict[torch.device, list[str]] = {}
    for name, weight in weights.items():
        problem = _no_bytes(weight)
        if problem:
            raise CheckpointError(
                f"{name}: the tensor {problem}, so that a resumed run could not tell whether it is "
                "the same; leave checkpoint_dir out"
            )
        by_device.setdefault(weight.device, []).append(name)
    sums: dict[str, str] = {}
    for names in by_device.values():
        halves = to_host(*(half for name in names for half in _checksum(weights[name])))
        pairs = zip(halves[::2], halves[1::2], strict=True)
        sums |= {
            name: f"{int(high):08x}{int(low):08x}"
            for name, (high, low) in zip(names, pairs, strict=True)
        }
    return {
        name: {
            "shape": list(weight.shape),
            "dtype": dtype_name(weight.dtype),
            "checksum": sums[name],
        }
        for name, weight in weights.items()
    }


def _checksum(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The checksum as two scalars below 2^32, which float64 holds exactly; on the weight's device."""
    values = weight.detach().resolve_conj().resolve_neg()
    values = torch.view_as_real(values) if values.is_complex() else values
    matrix = (
        values.reshape(values.shape[0] if values.dim() else 1, -1)
        if values.numel()
        else values.reshape(1, 0)
    )
    bits = matrix.view(_INTEGERS[matrix.element_size()])
    rows, columns = (
        _multipliers(size, seed, weight.device) for seed, size in enumerate(bits.shape)
    )
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    step = max(1, _CHUNK // max(1, bits.shape[1]))
    for start in range(0, bits.shape[0], step):
        wide = bits[start : start + step].to(
            torch.int64, copy=True
        )  # a copy even of int64: it is changed in place
        wide.mul_(columns)
        wide ^= wide >> 32
        total = total + (wide.sum(1) * rows[start : start + step]).sum()
    return (total >> 32) & _HALF, total & _HALF


def _multipliers(size: int, seed: int, device: torch.device) -> Tensor:
    """Odd 64-bit integers that look random: the finaliser of SplitMix64 over a counter. Products wrap."""
    mixed = (
        torch.arange(1, size + 1, dtype=torch.int64, device=device) * _signed(0x9E3779B97F4A7C15)
        + seed
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> shift)) * _signed(factor)
    return (mixed ^ (mixed >> 31)) | 1


def _signed(value: int) -> int:
    return value - (1 << 64)


def _digest(value: object, where: str) -> bytes:
    """SHA-256 of a kind and its parts, each after its length, so that no two values have the same bytes."""
    kind, parts = _parts(value, where)
    sha = hashlib.sha256()
    for part in (kind.encode(), *parts):
        view = memoryview(part)
        sha.update(view.nbytes.to_bytes(8, "little"))
        sha.update(view)
    return sha.digest()


def _parts(value: object, where: str) -> tuple[str, Sequence[Any]]:
    """Return the type of a value, and bytes or buffers that identify it."""
    if isinstance(value, Tensor):
        return "tensor", _tensor_parts(value, where)
    if isinstance(value, Enum):
        return "enum", [type(value).__qualname__.encode(), value.name.encode()]
    for plain in _PLAIN:
        if isinstance(value, plain):
            return plain.__name__, [plain.__repr__(value).encode()]  # exact for floats, too
    if value is None or isinstance(value, _NAMED):
        return type(value).__name__, [str(value).encode()]
    return _container_parts(value, where) or ("buffer", _buffer_parts(value, where))


def _container_parts(value: object, where: str) -> tuple[str, Sequence[bytes]] | None:
    """The same of what holds other values; ``None`` for what does not."""
    if isinstance(value, Mapping):
        items = [
            _digest(key, f"a key of {where}") + _digest(value[key], f"{where}[{key!r}]")
            for key in value
        ]
        return "mapping", sorted(items)
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return kind, [_digest(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return "set", sorted(_digest(entry, f"an element of {where}") for entry in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        names = [type(value).__qualname__.encode(), *(name.encode() for name in fields)]
        return "dataclass", names + [
            _digest(entry, f"{where}.{name}") for name, entry in fields.items()
        ]
    return None


def _tensor_parts(tensor: Tensor, where: str) -> Sequence[Any]:
    problem = _no_bytes(tensor)
    if problem:
        raise _not_comparable(where, f"a tensor that {problem}")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    flat = plain.clone(memory_format=torch.contiguous_format).reshape(
        -1
    )  # a single number may count as contiguous
    return [
        str(tensor.dtype).encode(),
        str(list(tensor.shape)).encode(),
        flat.view(torch.uint8).numpy(),
    ]


def _no_bytes(tensor: Tensor) -> str:
    """Return why a tensor has no bytes that identify it; empty if it has."""
    if tensor.is_meta:
        return "is on the meta device and has no values"
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        return "is sparse, nested or quantised"
    return ""


def _buffer_parts(value: Any, where: str) -> Sequence[Any]:
    """Arrays of numbers that are not torch's."""
    try:
        view = memoryview(value)
    except (TypeError, ValueError):
        raise _not_comparable(where, f"a {type(value).__name__}") from None
    if "O" in view.format:  # pointers to objects
        raise _not_comparable(where, f"a {type(value).__name__} of objects")
    return [view.format.encode(), str(view.shape).encode(), view.tobytes()]


def _not_comparable(where: str, what: str) -> CalibrationError:
    return CalibrationError(
        f"{where} is {what}, so that a resumed run could not tell whether its data are the same; "
        "give tensors, numbers, text, and lists, tuples or dicts of them, or leave checkpoint_dir out"
    )
