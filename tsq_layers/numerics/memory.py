"""Measure the memory of tensors, and name their dtypes."""

import torch
from torch import Tensor, nn


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model; memory that several of them share counts once.

    Example:
        >>> first, second = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)
        >>> second.weight = first.weight
        >>> model_bytes(nn.Sequential(first, second))
        512
    """
    tensors = [*model.parameters(), *model.buffers()]
    return sum(
        {
            memory_extent(tensor): tensor.numel() * tensor.element_size() for tensor in tensors
        }.values()
    )


def memory_extent(tensor: Tensor) -> tuple[int, int, int]:
    """Identity of a tensor's memory: storage, first byte, bytes. Works on the meta device, where all addresses are zero."""
    size = tensor.element_size()
    if tensor.layout is not torch.strided:  # sparse tensors have no storage of their own
        return id(tensor), 0, tensor.numel() * size
    return (
        int(tensor.untyped_storage()._cdata),
        int(tensor.storage_offset()) * size,
        tensor.numel() * size,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Inverse of :func:`dtype_name`; ``TypeError`` for what is no dtype."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is not a dtype of torch")
    return found
