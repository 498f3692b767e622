"""Measure the memory of tensors, and convert dtypes to their names and back."""

import torch
from torch import Tensor, nn


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers of a model; memory that several share counts once.

    Example:
        >>> first, second = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)
        >>> second.weight = first.weight
        >>> model_bytes(nn.Sequential(first, second))
        512
    """
    sizes: dict[tuple[int, int, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        sizes[memory_extent(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def memory_extent(tensor: Tensor) -> tuple[int, int, int]:
    """Return the identity of a tensor's memory: its storage, the first byte, and the number of bytes.

    Two tensors with the same extent share their memory. This also holds on the meta device, where all
    addresses are 0: a storage is identified by its object, not by its address.
    """
    size = tensor.element_size()
    # A sparse tensor has no storage of its own.
    if tensor.layout is not torch.strided:
        return id(tensor), 0, tensor.numel() * size
    return (
        int(tensor.untyped_storage()._cdata),
        int(tensor.storage_offset()) * size,
        tensor.numel() * size,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``, for example ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name; the inverse of :func:`dtype_name`.

    Raises:
        TypeError: torch has no dtype of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is not a dtype of torch")
    return dtype
