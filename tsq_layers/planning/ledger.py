"""`Ledger`: the memory of tensors that come alive and die, and the work of the operations that make them.

What is counted are storages, by weak references: memory that several tensors share counts once, and
counts until the last of them is gone. Temporaries inside of an operation are not seen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


@dataclass(frozen=True)
class Work:
    """The work of operations.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention.
        traffic: bytes that all other operations read and write, as twice what they write.
    """

    flops: float = 0.0
    traffic: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.traffic + other.traffic)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.flops - other.flops, self.traffic - other.traffic)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.traffic * times)


class Ledger(TorchDispatchMode):
    """Inside, counts the storages that operations make.

    Storages that were there before are not counted, and neither are views of them.

    Args:
        fake: of the tensors without values. With it, floating-point results are fake: nothing is
            computed and nothing allocated. Tensors of integers and truth values that follow from
            others of their kind do have values, so that a model may read its token ids, its masks,
            and how long they are. ``None`` computes everything.

    Attributes:
        live: bytes that are alive.
        peak: the most that were alive since :meth:`restart`.
        work: done so far.

    Example:
        >>> with torch.no_grad(), Ledger() as ledger:
        ...     x = torch.zeros(100)
        ...     y = (x + 1)[:50]
        ...     del x
        >>> ledger.live, ledger.peak
        (400, 800)
    """

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.work = Work()
        self._fake = fake
        self._bytes: dict[int, tuple[int, ref[torch.UntypedStorage]]] = {}

    def restart(self) -> int:
        """Begin a new peak, from what is alive now; returns the one before."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and book its results."""
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        result = self._run(function, args, kwargs, inputs)
        results = [tensor for tensor in _tensors(result) if self._book(tensor, inputs)]
        if results or function._schema.is_mutable:
            self.work += _work(function, args, kwargs, result)
        return result

    def _run(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Tensor]
    ) -> Any:
        if self._fake is None:
            return function(*args, **kwargs)
        if given and all(map(_has_values, given)):
            return pytree.tree_map_only(Tensor, self._without_values, function(*args, **kwargs))
        with self._fake:
            result = function(*args, **kwargs)
        if not given and all(not _is_real_number(tensor) for tensor in _tensors(result)):
            return function(*args, **kwargs)  # integers that a factory makes
        return result

    def _without_values(self, tensor: Tensor) -> Tensor:
        """Of integers, floating-point numbers were made: from here on, values are not known."""
        assert self._fake is not None
        return self._fake.from_tensor(tensor) if _is_real_number(tensor) else tensor

    def _book(self, tensor: Tensor, given: Sequence[Tensor]) -> bool:
        """Add the storage of a result; whether it is a new one."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._bytes:
            before, reference = self._bytes[key]
            if before and before != size:  # resized
                self._bytes[key] = size, reference
                self._alive(size - before)
            return False
        new = all(key != other.untyped_storage()._cdata for other in given)
        self._bytes[key] = size if new else 0, ref(storage, self._forget(key))
        self._alive(self._bytes[key][0])
        return new

    def _forget(self, key: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self.live -= self._bytes.pop(key)[0]

        return forget

    def _alive(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _is_real_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _has_values(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta and not _is_real_number(tensor)


def _out_of_place(packet: Any) -> Any:
    """``addmm`` for ``addmm_``: their arguments are the same."""
    return getattr(torch.ops.aten, packet.__name__.removesuffix("_"), None)


def _work(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Work:
    packet = function._overloadpacket
    count = flop_registry.get(packet) or flop_registry.get(_out_of_place(packet))
    if count is not None:
        return Work(flops=float(count(*args, **kwargs, out_val=result)))
    result_bytes = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(result))
    flops = 0.0
    if "scaled_dot_product" in str(packet):  # kernels of a device that the registry lacks
        flops = float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    return Work(flops, 2.0 * result_bytes)
