"""GGUF, version 3: the container. Little-endian: a header, typed metadata, tensor descriptions, aligned tensor data.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Value = bool | int | float | str | list[str] | list[int] | list[float]

ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_KINDS = {
    bool: _BOOL,
    int: _UINT32,
    float: _FLOAT32,
    str: _STRING,
}  # in this order: a bool is an int too
_CODES = {_UINT32: "I", _INT32: "i", _FLOAT32: "f", _BOOL: "?"}


@dataclass(frozen=True)
class BlockType:
    """The way in which a row of a tensor is stored.

    Args:
        number: that of ggml.
        length: entries of a block.
        size: bytes of a block.
    """

    number: int
    length: int
    size: int


F32, F16, BF16 = BlockType(0, 1, 4), BlockType(1, 1, 2), BlockType(30, 1, 2)
Q4_0, Q5_0, Q8_0 = BlockType(2, 32, 18), BlockType(6, 32, 22), BlockType(8, 32, 34)


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a file.

    Args:
        name: at most 63 bytes.
        type: of its blocks.
        shape: as torch has it, the last dimension in a row; a file has them the other way round.
        make: its bytes, a contiguous tensor on the CPU, made when it is written.
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() // self.type.length * self.type.size


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[GGUFTensor]) -> None:
    """Write a file; only one tensor is in memory at a time.

    Args:
        path: of the file.
        metadata: an ``int`` is written as uint32, a list of them as int32, a ``float`` as float32.
        tensors: in this order.
    """
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _typed(value))
        offset = 0
        for tensor in tensors:
            dimensions = tensor.shape[::-1]
            file.write(
                _string(tensor.name)
                + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
            )
            file.write(struct.pack("<IQ", tensor.type.number, offset))
            offset += _aligned(tensor.size)
        file.write(bytes(-file.tell() % ALIGNMENT))
        for tensor in tensors:
            content = tensor.make().view(torch.uint8)
            assert content.numel() == tensor.size, tensor.name
            file.write(content.numpy().data)
            file.write(bytes(-tensor.size % ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _typed(value: Value) -> bytes:
    """The number of a type, and a value of it."""
    if not isinstance(value, list):
        kind = _kind(value)
        return struct.pack("<I", kind) + _items([value], kind)
    kind = _kind(value[0]) if value else _STRING
    kind = _INT32 if kind == _UINT32 else kind
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + _items(value, kind)


def _kind(value: bool | float | str) -> int:
    return next(kind for type_, kind in _KINDS.items() if isinstance(value, type_))


def _items(values: Sequence[bool | float | str], kind: int) -> bytes:
    if kind == _STRING:
        return b"".join(_string(str(value)) for value in values)
    return struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
