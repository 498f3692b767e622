"""Offload the activations of suspended passes to another device until the passes go on.

A suspended pass holds its activations in the local variables of its frames, and no other code can
delete those. So their memory is freed under them: the content of a storage is copied away, the
storage is resized to 0 bytes, and both are undone before the pass goes on. Tensors of the model and
of the batch stay where they are.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 2**16  # bytes of the smallest storage that is offloaded; a copy has a fixed cost


class ActivationOffload:
    """The activations of suspended passes, on another device.

    Args:
        device: where to keep them.
        model: its parameters and buffers, and all other tensors that its modules hold, stay.
    """

    def __init__(self, device: torch.device | str, model: nn.Module) -> None:
        self.device = torch.device(device)
        self._model = model
        self._storages: dict[int, list[_Storage]] = {}

    def store(self, index: int, batch: object) -> Callable[[], None]:
        """Offload the tensors in the local variables of the calling thread.

        Args:
            index: number of the pass that the thread runs.
            batch: the batch of the pass. Its tensors stay, because other passes may have it too.

        Returns:
            a function that brings the tensors back.
        """
        exempt = {_key(tensor) for tensor in (*_tensors_of(self._model), *_tensors([batch]))}
        candidates: dict[int, torch.UntypedStorage] = {}
        for tensor in _locals(sys._getframe(1)):
            candidates[_key(tensor)] = tensor.untyped_storage()
        storages: list[_Storage] = []
        for key, storage in candidates.items():
            is_large = storage.nbytes() >= _SMALLEST
            if key not in exempt and storage.device != self.device and is_large:
                storages.append(_Storage(storage))
        self._storages[index] = storages
        self._move_away(index)

        def restore() -> None:
            self._bring_back(index)
            del self._storages[index]

        return restore

    @contextmanager
    def present(self, index: int) -> Iterator[None]:
        """Bring the activations of a pass back inside of the ``with`` block."""
        self._bring_back(index)
        try:
            yield
        finally:
            self._move_away(index)

    def _move_away(self, index: int) -> None:
        for storage in self._storages.get(index, []):
            storage.move_away(self.device)

    def _bring_back(self, index: int) -> None:
        for storage in self._storages.get(index, []):
            storage.bring_back()


class _Storage:
    """One storage, and a copy of its content while it is offloaded."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.content: Tensor | None = None

    def move_away(self, device: torch.device) -> None:
        self.content = self._bytes().to(device, copy=True)
        self.storage.resize_(0)

    def bring_back(self) -> None:
        if self.content is not None:
            self.storage.resize_(self.content.numel())
            self._bytes().copy_(self.content)
            self.content = None

    def _bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)


def _locals(frame: FrameType | None) -> Iterator[Tensor]:
    """Yield the tensors in the local variables of a frame and of its callers."""
    while frame is not None:
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            values = frame.f_locals
            yield from _tensors(values.values())
            if isinstance(values, dict):
                # Before Python 3.13, f_locals is a copy that the frame keeps, and it would keep the tensors.
                values.clear()
        frame = frame.f_back


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors among the attributes of a model's modules, parameters and buffers included."""
    for module in model.modules():
        yield from _tensors(vars(module).values())


def _tensors(values: Iterable[Any], depth: int = 3) -> Iterator[Tensor]:
    """Yield the plain tensors among some values, and those in lists, tuples and mappings down to ``depth``."""
    for value in values:
        if type(value) in (Tensor, nn.Parameter):
            yield value
        elif depth and isinstance(value, Mapping):
            yield from _tensors(value.values(), depth - 1)
        elif depth and isinstance(value, (tuple, list)):
            yield from _tensors(value, depth - 1)


def _key(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)
