"""Call a model on batches: forward functions, padding masks, checks, devices, and changes of tensors in a batch.

A batch is whatever the user's ``forward`` function accepts.
"""

import copy
import itertools
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.errors import CalibrationError

Batch = Any
"""A tensor, a tuple, a list or a mapping of tensors, or anything that the user's forward function accepts."""
Forward = Callable[[nn.Module, Any], object]
"""(model, batch) → anything; runs one forward pass."""
PaddingMask = Callable[[Any, str, Tensor], Tensor | None]
"""(batch, name of a layer, its input (…, K)) → bool or integer (…), 0 for padding; ``None`` if nothing is padding."""


def default_forward(model: nn.Module, batch: Batch) -> object:
    """Call the model with a tensor, positional arguments (tuple, list) or keyword arguments (mapping)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def attention_mask(batch: Batch, name: str, x: Tensor) -> Tensor | None:  # noqa: ARG001  (other masks go by the layer)
    """Return the batch's ``attention_mask`` if its shape is that of the tokens of a layer's input.

    A batch with inputs for an encoder and a decoder has two kinds of tokens, which shapes do not
    tell apart. Then no token is masked, unless the user gives ``calibrate`` another function.

    Args:
        batch: the batch that is run.
        name: name of the layer, not used.
        x: first tensor argument of the layer, (…, K).

    Returns:
        the mask on the device of ``x``, or ``None`` if every token counts.
    """
    if not isinstance(batch, Mapping) or any(key.startswith("decoder_") for key in batch):
        return None
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    has_flat_tokens = x.dim() == 2 and mask.numel() == x.shape[0]
    if mask.shape == x.shape[:-1] or has_flat_tokens:
        return mask.to(x.device)
    return None


def with_input(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the first tensor among the arguments of a call by ``change(tensor)``.

    Args:
        change: function of the tensor.
        args: positional arguments of the call, which are searched first.
        kwargs: keyword arguments of the call.

    Returns:
        the new positional and keyword arguments.

    Example:
        >>> with_input(lambda x: 2 * x, (), {"input": torch.ones(2)})
        ((), {'input': tensor([2., 2.])})
    """
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:index], change(value), *args[index + 1 :]), dict(kwargs)
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, key: change(value)}
    return args, dict(kwargs)


def peeked(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """Return the first batch, and an iterable of all batches, the first included.

    Raises:
        CalibrationError: there is no batch.
    """
    iterator = iter(batches)
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise CalibrationError("batches holds no batch; give at least one")


def checked_batches(batches: Iterable[Batch], what: str) -> Iterable[Batch]:
    """Return ``batches`` if they can be iterated over; no batch is taken.

    Args:
        batches: what the user gave.
        what: name of the argument, for messages.

    Raises:
        CalibrationError: ``batches`` is a single batch, not iterable, or empty.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"{what} is a {type(batches).__name__}; give an iterable of batches, for example [batch]"
        )
    if isinstance(batches, Sized) and not len(batches):
        raise CalibrationError(f"{what} holds no batch; give at least one")
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside of the ``with`` block, and switch off the key-value cache of a transformers model.

    The cache would hold memory, and no forward pass here reads it.
    """
    training = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if isinstance(use_cache, bool):
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        if isinstance(use_cache, bool):
            config.use_cache = use_cache  # type: ignore[union-attr]


def moved_to(batch: Batch, device: torch.device | None) -> Batch:
    """Return a batch with all its tensors on ``device``; ``None`` leaves them where they are.

    Mappings, tuples and lists are new objects.
    """
    return with_tensors(batch, lambda tensor: tensor.to(device))


def copied_to(batch: Batch, device: torch.device | None) -> Batch:
    """Return a batch with copies of all its tensors on ``device``, for a model that may change them in place."""
    return with_tensors(batch, lambda tensor: tensor.to(device, copy=True))


def versions(batch: Batch) -> list[int]:
    """Return the number of changes in place of each tensor of a batch; −1 for inference tensors, which do not count.

    Example:
        >>> x = torch.ones(2)
        >>> before = versions([x])
        >>> _ = x.mul_(2)
        >>> versions([x]) == before
        False
    """
    numbers: list[int] = []

    def read_version(tensor: Tensor) -> Tensor:
        numbers.append(-1 if tensor.is_inference() else tensor._version)
        return tensor

    with_tensors(batch, read_version)
    return numbers


def with_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch of the same form, with every tensor replaced by ``change(tensor)``.

    Tensors are found in mappings, tuples and lists at any depth; other values stay.

    Example:
        >>> batch = {"x": torch.ones(2), "labels": [torch.ones(1)], "name": "a"}
        >>> with_tensors(batch, lambda tensor: 2 * tensor)
        {'x': tensor([2., 2.]), 'labels': [tensor([2.])], 'name': 'a'}
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        items = {key: with_tensors(value, change) for key, value in batch.items()}
        return with_items(batch, items)
    if isinstance(batch, (tuple, list)):
        values = [with_tensors(value, change) for value in batch]
        if hasattr(batch, "_make"):  # a named tuple
            return batch._make(values)
        return tuple(values) if isinstance(batch, tuple) else values
    return batch


def with_items(batch: Mapping[Any, Any], items: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return a copy of a mapping with some items replaced or added.

    A ``dict``, a ``UserDict`` (such as transformers' ``BatchEncoding``), or a subclass of one keeps its
    class and its attributes; any other mapping becomes a ``dict``.
    """
    # copy.copy of any other class may share its items with the original.
    if not isinstance(batch, (dict, UserDict)):
        return {**batch, **items}
    copied_batch = copy.copy(batch)
    for key, value in items.items():
        copied_batch[key] = value
    return copied_batch
