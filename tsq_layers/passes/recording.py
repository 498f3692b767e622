"""Record the layers that one forward pass calls, their order, and the layers that share an input."""

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
    """The calls of layers in one forward pass.

    Args:
        order: names of the layers that were called, in the order of their first calls.
        calls: number of calls of each of these layers, by name.
        groups: the input groups, a partition of ``order``, in the order of their first calls. Layers
            are in one group if their first calls received the same tensor object, and it was not
            modified in between. A layer that was called more than once is a group of its own.
    """

    order: tuple[str, ...]
    calls: Mapping[str, int]
    groups: tuple[tuple[str, ...], ...]


def record(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> Recording:
    """Call ``run`` once, in this thread, and record its calls of ``modules``.

    The input of a call is its first tensor argument. A modification of an inference tensor in place
    cannot be seen.

    Args:
        modules: the layers to watch, by name.
        run: makes one forward pass.
    """
    calls: Counter[str] = Counter()
    inputs = _InputGroups()

    def on_call(
        name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        calls[name] += 1
        if calls[name] == 1:
            inputs.add(name, first_tensor(args, kwargs))

    with hooked(modules, on_call):
        run()
    groups: list[tuple[str, ...]] = []
    for group in inputs.groups:
        names = tuple(name for name in group if calls[name] == 1)
        if names:
            groups.append(names)
    for name, count in calls.items():
        if count > 1:
            groups.append((name,))
    position = {name: index for index, name in enumerate(calls)}
    groups.sort(key=lambda group: position[group[0]])
    return Recording(tuple(calls), MappingProxyType(dict(calls)), tuple(groups))


class _InputGroups:
    """The names of layers, grouped by the tensor that they were called with."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        # By the tensor's id, for speed. An id may be used again; the weak reference tells if it still
        # belongs to the same tensor, and keeps no tensor alive.
        self._tensors: dict[int, tuple[TensorWeakRef, int | None, list[str]]] = {}

    def add(self, name: str, tensor: torch.Tensor | None) -> None:
        """Add a layer to the group of its input; ``None`` is an input that is no tensor."""
        group = None if tensor is None else self._group_of(tensor)
        if group is None:
            group = []
            self.groups.append(group)
            if tensor is not None:
                self._tensors[id(tensor)] = TensorWeakRef(tensor), _version(tensor), group
        group.append(name)

    def _group_of(self, tensor: torch.Tensor) -> list[str] | None:
        if id(tensor) not in self._tensors:
            return None
        reference, version, group = self._tensors[id(tensor)]
        if reference() is tensor and version == _version(tensor):
            return group
        return None


@contextlib.contextmanager
def hooked(modules: Mapping[str, nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Call ``hook(name, module, args, kwargs)`` before every call of the modules, inside of the ``with`` block."""
    with contextlib.ExitStack() as handles:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(
                functools.partial(hook, name), with_kwargs=True
            )
            handles.callback(handle.remove)
        yield


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the first tensor among the arguments of a call, positional ones first; ``None`` if there is none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    return None


def _version(tensor: torch.Tensor) -> int | None:
    """Return the number of modifications in place, which inference tensors do not count."""
    return None if tensor.is_inference() else tensor._version
