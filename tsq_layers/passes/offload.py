"""Activations of suspended passes, put on another device until the passes go on.

A suspended pass holds its activations in the local variables of its frames, where nobody else can let
go of them. So their memory is given back under them: the storage is copied, then resized to nothing,
and filled again before the pass goes on. Tensors that the model itself holds, or the batch, are left.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 2**16  # bytes; a smaller tensor is not worth a copy


class Parking:
    """Where the activations of suspended passes are kept.

    Args:
        device: where to.
        model: its tensors are never parked: parameters, buffers, and what its modules hold otherwise.
    """

    def __init__(self, device: torch.device | str, model: nn.Module) -> None:
        self.device = torch.device(device)
        self._model = model
        self._parked: dict[int, list[_Parked]] = {}

    def park(self, index: int, batch: object) -> Callable[[], None]:
        """Park what the calling thread holds; the result brings it back.

        Args:
            index: of the pass that the thread runs.
            batch: what the pass was given: other passes may have it too, so it stays.
        """
        held = {_key(tensor) for tensor in (*_held_by(self._model), *_tensors([batch]))}
        storages = {_key(tensor): tensor.untyped_storage() for tensor in _locals(sys._getframe(1))}
        self._parked[index] = [
            _Parked(storage)
            for key, storage in storages.items()
            if key not in held and storage.device != self.device and storage.nbytes() >= _SMALLEST
        ]
        self._leave(index)

        def bring() -> None:
            self._return(index)
            del self._parked[index]

        return bring

    @contextmanager
    def present(self, index: int) -> Iterator[None]:
        """Inside, what a pass holds is where the pass left it."""
        self._return(index)
        try:
            yield
        finally:
            self._leave(index)

    def _leave(self, index: int) -> None:
        for parked in self._parked.get(index, []):
            parked.leave(self.device)

    def _return(self, index: int) -> None:
        for parked in self._parked.get(index, []):
            parked.bring()


class _Parked:
    """One storage, and its content while it is away."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.content: Tensor | None = None

    def leave(self, device: torch.device) -> None:
        self.content = self._bytes().to(device, copy=True)
        self.storage.resize_(0)

    def bring(self) -> None:
        if self.content is not None:
            self.storage.resize_(self.content.numel())
            self._bytes().copy_(self.content)
            self.content = None

    def _bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)


def _locals(frame: FrameType | None) -> Iterator[Tensor]:
    """Tensors in the local variables of all functions that the calling thread is in."""
    while frame is not None:
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            values = frame.f_locals
            yield from _tensors(values.values())
            if isinstance(values, dict):
                values.clear()  # before Python 3.13 it is a copy that the frame keeps, with everything in it
        frame = frame.f_back


def _held_by(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from _tensors(vars(module).values())


def _tensors(values: Iterable[Any], depth: int = 3) -> Iterator[Tensor]:
    """Plain tensors among some values, and in lists, tuples and mappings among them."""
    for value in values:
        if type(value) in (Tensor, nn.Parameter):
            yield value
        elif depth and isinstance(value, Mapping):
            yield from _tensors(value.values(), depth - 1)
        elif depth and isinstance(value, (tuple, list)):
            yield from _tensors(value, depth - 1)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
