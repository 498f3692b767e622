"""Define :class:`ExpertWeights`, a list of layers that a forward can use like a 3-D parameter.

Shapes: E layers, T tokens, in and out features.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsq_layers.errors import LayerError
from tsq_layers.layers.source import BY_ALL, BY_ONE
from tsq_layers.numerics.sync import to_host


class ExpertWeights(nn.ModuleList):
    """A list of E linear layers that replaces a 3-D parameter.

    A forward that was written for the parameter runs with it, if it only multiplies by one matrix,
    ``weights[i]``, or by all of them, and reads ``shape``, ``dtype`` and ``device``. Its products call
    the layers.

    Args:
        weight: (E, out, in), or (E, in, out) if ``transposed``. The layers' weights are views of it.
        transposed: True if the matrices are (in, out).

    Raises:
        LayerError: in the forward, if it does anything else with the weights.

    Example:
        >>> weights = ExpertWeights(nn.Parameter(torch.ones(3, 8, 4)), transposed=False)
        >>> nn.functional.linear(torch.ones(2, 4), weights[1]).shape
        torch.Size([2, 8])
        >>> weights.shape, len(weights), next(iter(weights))
        (torch.Size([3, 8, 4]), 3, Linear(in_features=4, out_features=8, bias=False))
    """

    def __init__(self, weight: nn.Parameter, *, transposed: bool) -> None:
        super().__init__(
            _linear(matrix.T if transposed else matrix, weight.requires_grad)
            for matrix in weight.detach().unbind(0)
        )
        self.transposed = transposed

    def __getitem__(self, index: int | Tensor) -> "Operand":  # type: ignore[override]
        """Return one weight, as an operand of a product.

        The layer itself is ``get_submodule(str(index))``.

        Args:
            index: number of the expert, an integer or a scalar tensor.

        Raises:
            LayerError: ``index`` is a tensor with dimensions.
        """
        if isinstance(index, Tensor):
            if index.dim():
                raise LayerError(
                    "experts are called one by one: "
                    f"index with one number, not with {tuple(index.shape)}"
                )
            index = int(to_host(index)[0])
        layer = self.get_submodule(str(range(len(self))[index]))
        return Operand(layer, BY_ONE, transposed=self.transposed, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Call every layer with its slice of the input, (E, T, in) → (E, T, out).

        Raises:
            LayerError: ``x`` has another shape.
        """
        if x.dim() != 3 or len(x) != len(self):
            raise LayerError(
                f"{len(self)} experts were given {tuple(x.shape)}: give (experts, tokens, features)"
            )
        pairs = zip(self, x.unbind(0), strict=True)
        return torch.stack([linear(tokens) for linear, tokens in pairs])

    @property
    def shape(self) -> torch.Size:
        """(E, out, in), or (E, in, out) if ``transposed``."""
        first: Any = next(iter(self))
        if self.transposed:
            return torch.Size((len(self), first.in_features, first.out_features))
        return torch.Size((len(self), first.out_features, first.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first layer's weight."""
        first: Any = next(iter(self))
        # A packed layer has a dtype; to read that of its weight would dequantise it.
        layer = first.weight if isinstance(first, nn.Linear) else first
        dtype: torch.dtype = layer.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of the first layer."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @property
    def mT(self) -> "Operand":
        """All weights as an operand, with the last two dimensions exchanged."""
        return Operand(self, BY_ALL, transposed=not self.transposed, dtype=self.dtype)

    def transpose(self, first: int, second: int) -> "Operand":
        """Return :attr:`mT`; only the last two dimensions can be exchanged."""
        _check_transpose({first % 3, second % 3} == {1, 2}, first, second)
        return self.mT

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute a product with all weights, such as ``torch.bmm(x, weights)``."""
        return Operand.__torch_function__(func, types, tuple(map(_operand, args)), kwargs)


class Operand:
    """The weights of experts as an operand of a product: ``F.linear(x, operand)``, ``x @ operand``, ….

    Args:
        layer: function that computes the product with x.
        products: functions that accept the operand as their second argument → True if they take a
            weight as (in, out).
        transposed: True if the operand is a weight (in, out).
        dtype: dtype of the weights.
    """

    def __init__(
        self,
        layer: Callable[[Tensor], Tensor],
        products: Mapping[Any, bool],
        *,
        transposed: bool,
        dtype: torch.dtype,
    ) -> None:
        self.layer = layer
        self.products = products
        self.transposed = transposed
        self.dtype = dtype

    @property
    def mT(self) -> "Operand":
        """The operand with its last two dimensions exchanged."""
        return Operand(self.layer, self.products, transposed=not self.transposed, dtype=self.dtype)

    T = mT

    def t(self) -> "Operand":
        """Return :attr:`mT`."""
        return self.mT

    def transpose(self, first: int, second: int) -> "Operand":
        """Return :attr:`mT`; only the last two dimensions can be exchanged."""
        _check_transpose({first % 2, second % 2} == {0, 1}, first, second)
        return self.mT

    def float(self) -> "Operand":
        """Return the operand itself, if its dtype is float32.

        Raises:
            LayerError: it is another dtype; the layers would not compute in float32.
        """
        if self.dtype != torch.float32:
            raise LayerError(
                f"the forward takes the weights of experts to float32, but they are {self.dtype}"
            )
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute the product that ``func`` is.

        Raises:
            LayerError: ``func`` is not a product, or takes its weight in the other layout.
        """
        return _product(func, *args, **(kwargs or {}))


def _linear(matrix: Tensor, requires_grad: bool) -> nn.Linear:
    # The meta device takes no memory for the weight that is replaced.
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad)
    return linear


def _product(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Compute ``func(x, operand)``, where ``func`` may be ``F.linear`` with a bias."""
    options = dict(kwargs)
    if len(args) > 2:
        options["bias"] = args[2]
    bias = options.pop("bias", None) if func is F.linear else None
    has_operands = (
        len(args) in (2, 3) and isinstance(args[0], Tensor) and isinstance(args[1], Operand)
    )
    if not has_operands or options or args[1].products.get(func) != args[1].transposed:
        name = getattr(func, "__name__", repr(func))
        raise LayerError(
            f"{name} was given weights of experts, which are layers that can only be multiplied by "
            "(F.linear, @, torch.bmm); add the experts to skip"
        )
    output: Tensor = args[1].layer(args[0])
    return output if bias is None else output + bias


def _operand(value: Any) -> Any:
    """Return all weights as an operand; any other value as it is."""
    if isinstance(value, ExpertWeights):
        return Operand(value, BY_ALL, transposed=value.transposed, dtype=value.dtype)
    return value


def _check_transpose(is_allowed: bool, first: int, second: int) -> None:
    if not is_allowed:
        raise LayerError(
            f"transpose({first}, {second}) of the weights of experts: "
            "only the last two dimensions can be exchanged"
        )
