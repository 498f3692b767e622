"""Batches, and how a model is run on them: calling it, what of them is padding, on which device they are."""

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
Forward = Callable[[nn.Module, Any], object]
PaddingMask = Callable[[Any, str, Tensor], Tensor | None]


def default_forward(model: nn.Module, batch: Batch) -> object:
    """Call the model with a tensor, positional arguments (tuple, list) or keyword arguments (mapping)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def attention_mask(batch: Batch, name: str, x: Tensor) -> Tensor | None:  # noqa: ARG001  (other masks go by the layer)
    """The padding mask of a layer input: the batch's ``attention_mask`` if it has the input's tokens.

    A batch with inputs for a decoder has tokens of two kinds, which cannot be told apart by shape:
    then every token counts, unless a ``padding_mask`` function is given to ``calibrate``.
    """
    if not isinstance(batch, Mapping) or any(key.startswith("decoder_") for key in batch):
        return None
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if mask.shape == x.shape[:-1] or (
        x.dim() == 2 and mask.numel() == x.shape[0]
    ):  # the tokens may be flattened
        return mask.to(x.device)
    return None


def with_input(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with its first tensor changed, positional ones before keywords.

    Example:
        >>> with_input(lambda x: 2 * x, (), {"input": torch.ones(2)})
        ((), {'input': tensor([2., 2.])})
    """
    named = [*enumerate(args), *kwargs.items()]
    first = next((key for key, value in named if isinstance(value, Tensor)), None)
    changed = {key: change(value) if key == first else value for key, value in named}
    return tuple(changed[index] for index in range(len(args))), {
        key: changed[key] for key in kwargs
    }


def peeked(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all of them.

    Raises:
        CalibrationError: there is none.
    """
    iterator = iter(batches)
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise CalibrationError("batches holds no batch; give at least one")


def checked_batches(batches: Iterable[Batch], what: str) -> Iterable[Batch]:
    """The batches, not yet taken.

    Raises:
        CalibrationError: not an iterable of batches, or a list of none.
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
    """Evaluation mode, and no key-value cache of a transformers model: it would only hold memory."""
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
    """A batch with all its tensors on ``device``, or where they are if that is ``None``; mappings, tuples and lists are new ones."""
    return with_tensors(batch, lambda tensor: tensor.to(device))


def copied_to(batch: Batch, device: torch.device | None) -> Batch:
    """The same with copies of all tensors, for a model that may change them in place."""
    return with_tensors(batch, lambda tensor: tensor.to(device, copy=True))


def versions(batch: Batch) -> list[int]:
    """How often each tensor of a batch was changed in place; inference tensors do not know it.

    Example:
        >>> x = torch.ones(2)
        >>> before = versions([x])
        >>> _ = x.mul_(2)
        >>> versions([x]) == before
        False
    """
    found: list[int] = []

    def look(tensor: Tensor) -> Tensor:
        found.append(-1 if tensor.is_inference() else tensor._version)
        return tensor

    with_tensors(batch, look)
    return found


def with_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch of the same form with all its tensors changed.

    Example:
        >>> with_tensors({"x": torch.ones(2), "labels": [torch.ones(1)], "name": "a"}, lambda tensor: 2 * tensor)
        {'x': tensor([2., 2.]), 'labels': [tensor([2.])], 'name': 'a'}
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return with_items(batch, {key: with_tensors(value, change) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        changed = [with_tensors(value, change) for value in batch]
        if hasattr(batch, "_make"):  # a named tuple
            return batch._make(changed)
        return tuple(changed) if isinstance(batch, tuple) else changed
    return batch


def with_items(batch: Mapping[Any, Any], items: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A copy of a mapping with some items changed; of the same class where that has attributes, as transformers' ``BatchEncoding``."""
    if not isinstance(
        batch, (dict, UserDict)
    ):  # what a copy of others shares with them is not known
        return {**batch, **items}
    other = copy.copy(batch)
    for key, value in items.items():
        other[key] = value
    return other
