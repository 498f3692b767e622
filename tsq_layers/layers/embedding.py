"""Define the kind of ``nn.Embedding``, a table whose rows are looked up by number.

Inputs do not tell which entries of a row matter, so H is the identity. A row of zeros (padding) stays
exactly zero: zero is a value of every grid with a zero point, its code is the zero point, and
scale · 0 is 0.

Shapes: V rows (num_embeddings), D columns (embedding_dim).
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tsq_layers.layers.kinds import LayerKind, is_patched, mark_replacement
from tsq_layers.runtime.linear import QuantLinear


class QuantEmbedding(nn.Embedding):
    """An embedding with a packed table; only the rows that are looked up are dequantised.

    It is an ``nn.Embedding``, so it can be a base of a subclass of ``nn.Embedding`` too:
    ``super().forward(ids)`` in a scaled or positional embedding calls it, see :data:`EMBEDDING`. The
    packed table may also be that of an output layer (tied weights); its bias is not used here.

    Args:
        matrix: the packed table (V, D), as a matrix of N = V rows and K = D columns; not copied.
        padding_idx: number of the row that stands for padding, or ``None``. It is information for
            users of the layer; the row is looked up like the others.

    Example:
        >>> table = QuantEmbedding(QuantLinear(64, 100, bits=4, group_size=32, bias=False))
        >>> table(torch.tensor([[3, 99]])).shape
        torch.Size([1, 2, 64])
    """

    matrix: QuantLinear

    def __init__(self, matrix: QuantLinear, *, padding_idx: int | None = None) -> None:
        # Not the __init__ of nn.Embedding, which would create a weight.
        nn.Module.__init__(self)
        self.num_embeddings = matrix.out_features
        self.embedding_dim = matrix.in_features
        self.padding_idx = padding_idx
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self.matrix = matrix
        mark_replacement(self)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table (V, D), dequantised at each access; changes of it have no effect."""
        return self.matrix.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (so it is called in nn.Embedding)
        """Return rows of the table, (…) → (…, D) in the dtype of :attr:`weight`.

        Args:
            input: numbers of rows, int32 or int64 (…).

        Raises:
            LayerError: ``input`` is of another dtype.
        """
        return self.matrix.rows(input)

    def extra_repr(self) -> str:
        """Return the sizes of the table and the padding row, for ``repr``."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


# --- subclasses --------------------------------------------------------------------------------


class _Table(Tensor):
    """A tensor with the shape, dtype and device of a packed table, which any operation on it dequantises.

    Without it, a forward that reads ``self.weight.dtype`` or ``self.weight.device`` would dequantise
    the table in each call.
    """

    matrix: QuantLinear

    @staticmethod
    def of(matrix: QuantLinear) -> "_Table":
        """Return the table of a packed matrix."""
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
        arguments = (args, kwargs or {})
        args, kwargs = pytree.tree_map_only(cls, lambda table: table.matrix.weight, arguments)
        return function(*args, **kwargs)


def _lazy_weight(layer: QuantEmbedding) -> Tensor:
    """Return the table (V, D), which is dequantised when its values are needed."""
    # A compiled graph drops a table whose values are not read.
    if torch.compiler.is_compiling():
        return layer.matrix.weight
    return _Table.of(layer.matrix)


@functools.cache
def _class_behind(kind: type[nn.Embedding]) -> type[QuantEmbedding]:
    """Return a subclass of ``kind``, a class of embeddings, whose table is packed.

    In its method resolution order :class:`QuantEmbedding` comes after ``kind`` and before
    ``nn.Embedding``. So ``super().forward(ids)`` in ``kind`` looks up rows of the packed table, and
    all other code of ``kind`` reads the dequantised table.
    """
    if kind is nn.Embedding:
        return QuantEmbedding

    def fill(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = kind.__module__
        namespace["__doc__"] = f"{kind.__name__} with a packed table."
        namespace["weight"] = property(_lazy_weight)
        # copy and pickle would look for the class in a module, and no module has it.
        namespace["__reduce_ex__"] = lambda self, protocol: (_empty, (kind,), vars(self))  # noqa: ARG005

    return types.new_class(f"Quant{kind.__name__}", (kind, QuantEmbedding), {}, fill)


def _empty(kind: type[nn.Embedding]) -> QuantEmbedding:
    """Return an instance without attributes of the class with a packed table."""
    cls = _class_behind(kind)  # type: ignore[arg-type]  # types are hashable
    return cls.__new__(cls)


# --- the kind ----------------------------------------------------------------------------------

# Attributes that other libraries put on a module to run their hooks.
_HOOK_ATTRIBUTES = {"forward", "_old_forward", "_hf_hook"}


def _matches(module: nn.Module) -> bool:
    if not isinstance(module, nn.Embedding) or isinstance(module, QuantEmbedding):
        return False
    if module._parameters.keys() != {"weight"} or module._modules:
        return False
    # max_norm changes rows when they are looked up.
    return not is_patched(module) and module.max_norm is None


def _replacement(module: nn.Module, matrix: QuantLinear) -> nn.Module:
    """Return an embedding with a packed table and all other attributes and buffers of the module."""
    assert isinstance(module, nn.Embedding)
    layer = _empty(type(module))
    QuantEmbedding.__init__(layer, matrix, padding_idx=module.padding_idx)
    exempt = vars(layer).keys() | _HOOK_ATTRIBUTES
    attributes = {name: value for name, value in vars(module).items() if name not in exempt}
    vars(layer).update(attributes)
    layer._buffers.update(module._buffers)
    layer._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    return layer.train(module.training)


EMBEDDING = LayerKind(name="Embedding", matches=_matches, inputs=None, replacement=_replacement)
"""``nn.Embedding`` without ``max_norm``, and its subclasses without parameters or layers of their own.

The ``forward`` of a subclass may compute anything around the lookup; the replacement runs it."""
