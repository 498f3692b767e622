"""Embeddings: a table of rows that are looked up by number.

No data says which entries of a row matter, so H is the identity. A row of zeros stays exactly zero
(padding): zero is a level of every grid with a zero point, so its codes equal that, and 0 · scale is 0.

Shapes: V rows (num_embeddings), D columns (embedding_dim).
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tsq_layers.layers.kinds import LayerKind, is_patched, mark_twin
from tsq_layers.runtime.linear import QuantLinear


class QuantEmbedding(nn.Embedding):
    """An embedding with a packed table; only the rows that are asked for are dequantised.

    It is an ``nn.Embedding`` so that it can also stand behind a subclass: ``super().forward(ids)`` in
    a scaled or positional embedding finds it, see :data:`EMBEDDING`. The packed table may be
    that of an output layer too (tied weights): its bias is not used here.

    Args:
        matrix: the packed table (V, D), as N = V rows of K = D columns; kept, not copied.
        padding_idx: number of the row that stands for padding, if there is one. It tells users of the layer;
            the row is looked up like the others.

    Example:
        >>> table = QuantEmbedding(QuantLinear(64, 100, bits=4, group_size=32, bias=False))
        >>> table(torch.tensor([[3, 99]])).shape
        torch.Size([1, 2, 64])
    """

    matrix: QuantLinear

    def __init__(self, matrix: QuantLinear, *, padding_idx: int | None = None) -> None:
        nn.Module.__init__(self)  # not that of nn.Embedding: it would make a weight
        self.num_embeddings, self.embedding_dim = matrix.out_features, matrix.in_features
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = (
            None,
            2.0,
            False,
            False,
        )
        self.matrix = matrix
        mark_twin(self)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised table (V, D), made anew each time; changing it changes nothing."""
        return self.matrix.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (so it is called in nn.Embedding)
        """Rows of the table: ids (…) → (…, D) in the dtype of :attr:`weight`.

        Raises:
            LayerError: ``input`` is neither int32 nor int64.
        """
        return self.matrix.rows(input)

    def extra_repr(self) -> str:
        """What the layer is, for ``repr``."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


# --- subclasses --------------------------------------------------------------------------------


class _Table(Tensor):
    """A packed table that knows its shape, dtype and device; dequantised by any operation that needs its values.

    Forwards of embeddings ask ``self.weight.dtype`` or ``.device``, for which the table would be
    dequantised at each call.
    """

    matrix: QuantLinear

    @staticmethod
    def of(matrix: QuantLinear) -> "_Table":
        shape = (matrix.out_features, matrix.in_features)
        table = Tensor._make_wrapper_subclass(
            _Table, shape, dtype=matrix.dtype, device=matrix.words.device
        )
        table.matrix = matrix
        return table

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(
            cls, lambda table: table.matrix.weight, (args, kwargs or {})
        )
        return function(*args, **kwargs)


def _lazy_weight(layer: QuantEmbedding) -> Tensor:
    """The dequantised table (V, D); uncompiled, only once its values are needed."""
    return layer.matrix.weight if torch.compiler.is_compiling() else _Table.of(layer.matrix)


@functools.cache
def _class_behind(kind: type[nn.Embedding]) -> type[QuantEmbedding]:
    """``kind`` with a packed table.

    In the order of resolution :class:`QuantEmbedding` comes after ``kind`` and before ``nn.Embedding``:
    ``super().forward(ids)`` in ``kind`` looks up rows of the packed table, and whatever else it does
    with its weight is done with the dequantised one.
    """
    if kind is nn.Embedding:
        return QuantEmbedding

    def fill(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = kind.__module__
        namespace["__doc__"] = f"{kind.__name__} with a packed table."
        namespace["weight"] = property(_lazy_weight)
        # The class is in no module, where copies would look for it.
        namespace["__reduce_ex__"] = lambda self, protocol: (_empty, (kind,), vars(self))  # noqa: ARG005

    return types.new_class(f"Quant{kind.__name__}", (kind, QuantEmbedding), {}, fill)


def _empty(kind: type[nn.Embedding]) -> QuantEmbedding:
    made = _class_behind(kind)  # type: ignore[arg-type]  # types are hashable
    return made.__new__(made)


# --- the kind ----------------------------------------------------------------------------------

_MACHINERY = {
    "forward",
    "_old_forward",
    "_hf_hook",
}  # what others put on a module to catch its calls


def _matches(module: nn.Module) -> bool:
    if not isinstance(module, nn.Embedding) or isinstance(module, QuantEmbedding):
        return False
    alone = module._parameters.keys() == {"weight"} and not module._modules
    return (
        alone and not is_patched(module) and module.max_norm is None
    )  # which changes rows when they are looked up


def _twin(module: nn.Module, matrix: QuantLinear) -> nn.Module:
    assert isinstance(module, nn.Embedding)
    twin = _empty(type(module))
    QuantEmbedding.__init__(twin, matrix, padding_idx=module.padding_idx)
    known = vars(twin).keys() | _MACHINERY
    vars(twin).update({name: value for name, value in vars(module).items() if name not in known})
    twin._buffers.update(module._buffers)
    twin._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    return twin.train(module.training)


EMBEDDING = LayerKind(name="Embedding", matches=_matches, inputs=None, twin=_twin)
"""``nn.Embedding`` without ``max_norm``; and its subclasses, whatever their ``forward`` does around the lookup,
unless they have parameters or layers of their own."""
