"""Which layers one forward pass calls, in which order, and which of them are given the same tensor."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef


@dataclass(frozen=True)
class Recording:
    """The calls that one pass made.

    Args:
        order: the names of the layers that were called, by first call.
        calls: how often each of them was called.
        groups: a partition of `order`, by first call. Layers are in one group when their first calls received the very
            same tensor, unmodified in between. A layer that was called more than once is a group of its own.
    """

    order: tuple[str, ...]
    calls: Mapping[str, int]
    groups: tuple[tuple[str, ...], ...]


def record(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> Recording:
    """Call `run` once, in this thread, and tell which of `modules` it called, in which order and with which input.

    The input of a call is its first tensor argument. Two inputs are the same when they are one tensor object that was
    not modified in place in between; a modification of an inference tensor cannot be seen.

    Args:
        modules: the layers to watch, by name.
        run: makes one forward pass.
    """
    calls: Counter[str] = Counter()
    groups: list[list[str]] = []
    # By id, for speed. The weak reference tells whether it is still the same tensor, and keeps nothing alive.
    seen: dict[int, tuple[TensorWeakRef, int | None, list[str]]] = {}

    def watch(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] += 1
        if calls[name] > 1:
            return
        tensor = first_tensor(args, kwargs)
        reference, version, group = seen.get(id(tensor), (None, None, None))
        if (
            tensor is None
            or reference is None
            or reference() is not tensor
            or version != _version(tensor)
        ):
            group = []
            groups.append(group)
            if tensor is not None:
                seen[id(tensor)] = (TensorWeakRef(tensor), _version(tensor), group)
        assert group is not None
        group.append(name)

    with hooked(modules, watch):
        run()
    place = {name: index for index, name in enumerate(calls)}
    single = [[name] for name in calls if calls[name] > 1]
    shared = [[name for name in group if calls[name] == 1] for group in groups]
    partition = sorted(
        (group for group in single + shared if group), key=lambda group: place[group[0]]
    )
    return Recording(tuple(calls), MappingProxyType(dict(calls)), tuple(map(tuple, partition)))


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Call `hook(name, module, args, kwargs)` before every call of the modules."""
    with contextlib.ExitStack() as handles:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(
                functools.partial(hook, name), with_kwargs=True
            )
            handles.callback(handle.remove)
        yield


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first tensor among the arguments of a call, positional ones before keywords."""
    return next(
        (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None
    )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
