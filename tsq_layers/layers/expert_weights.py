"""Layers in the place of a parameter that holds several matrices, for a forward that was written for the parameter.

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
    """E linear layers in the place of a 3-D parameter.

    A forward that was written for the parameter works with it if it multiplies by one matrix, which it
    gets by its number, or by all, and asks for shape, dtype and device. Products call the layers.

    Args:
        weight: (E, out, in), or (E, in, out) if ``transposed``. The layers' weights are views of it.
        transposed: which of the two.

    Raises:
        LayerError: where the forward does anything else with it.

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
        """One weight: something to multiply by. The layer itself is ``get_submodule(str(index))``."""
        if isinstance(index, Tensor):
            if index.dim():
                raise LayerError(
                    f"experts are called one by one: index with one number, not with {tuple(index.shape)}"
                )
            index = int(to_host(index)[0])
        layer = self.get_submodule(str(range(len(self))[index]))
        return Operand(layer, BY_ONE, transposed=self.transposed, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Every layer on a slice of its own: (E, T, in) → (E, T, out).

        Raises:
            LayerError: another shape.
        """
        if x.dim() != 3 or len(x) != len(self):
            raise LayerError(
                f"{len(self)} experts were given {tuple(x.shape)}: give (experts, tokens, features)"
            )
        return torch.stack([linear(own) for linear, own in zip(self, x.unbind(0), strict=True)])

    @property
    def shape(self) -> torch.Size:
        """(E, out, in), or (E, in, out) if ``transposed``."""
        first: Any = next(iter(self))
        sides = (first.out_features, first.in_features)
        return torch.Size((len(self), *(sides[::-1] if self.transposed else sides)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first layer's weight."""
        first: Any = next(iter(self))
        dtype: torch.dtype = first.weight.dtype if isinstance(first, nn.Linear) else first.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Of the first layer."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @property
    def mT(self) -> "Operand":
        """All of them, with the last two dimensions exchanged."""
        return Operand(self, BY_ALL, transposed=not self.transposed, dtype=self.dtype)

    def transpose(self, first: int, second: int) -> "Operand":
        """As :attr:`mT`."""
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
        """A product with all weights, such as ``torch.bmm(x, weights)``."""
        return Operand.__torch_function__(func, types, tuple(map(_operand, args)), kwargs)


class Operand:
    """What stands for weights in a product: ``F.linear(x, operand)``, ``x @ operand``, ….

    Args:
        layer: what the product is: called with x.
        products: functions that it can be given to as the second argument → whether these take
            a weight as (in, out).
        transposed: whether it stands for such a weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        layer: Callable[[Tensor], Tensor],
        products: Mapping[Any, bool],
        *,
        transposed: bool,
        dtype: torch.dtype,
    ) -> None:
        self.layer, self.products, self.transposed, self.dtype = layer, products, transposed, dtype

    @property
    def mT(self) -> "Operand":
        """Its last two dimensions exchanged."""
        return Operand(self.layer, self.products, transposed=not self.transposed, dtype=self.dtype)

    T = mT

    def t(self) -> "Operand":
        """As :attr:`mT`."""
        return self.mT

    def transpose(self, first: int, second: int) -> "Operand":
        """As :attr:`mT`."""
        _check_transpose({first % 2, second % 2} == {0, 1}, first, second)
        return self.mT

    def float(self) -> "Operand":
        """Itself, if it is float32.

        Raises:
            LayerError: it is not.
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
        """The product that ``func`` is.

        Raises:
            LayerError: it is none, or takes its weight the other way round.
        """
        return _product(func, *args, **(kwargs or {}))


def _linear(matrix: Tensor, requires_grad: bool) -> nn.Linear:
    linear = nn.Linear(
        matrix.shape[1], matrix.shape[0], bias=False, device="meta"
    )  # made without memory
    linear.weight = nn.Parameter(matrix, requires_grad)
    return linear


def _product(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    x, operand = (*args, None, None)[:2]
    extra = {**dict(zip(["bias"], args[2:], strict=False)), **kwargs}
    bias = extra.pop("bias", None) if func is F.linear else None
    if (
        not isinstance(x, Tensor)
        or not isinstance(operand, Operand)
        or operand.products.get(func) != operand.transposed
        or extra
    ):
        name = getattr(func, "__name__", repr(func))
        raise LayerError(
            f"{name} was given weights of experts, which are layers that can only be multiplied by (F.linear, @, torch.bmm); add the experts to skip"
        )
    y = operand.layer(x)
    return y if bias is None else y + bias


def _operand(value: Any) -> Any:
    if isinstance(value, ExpertWeights):
        return Operand(value, BY_ALL, transposed=value.transposed, dtype=value.dtype)
    return value


def _check_transpose(sound: bool, first: int, second: int) -> None:
    if not sound:
        raise LayerError(
            f"transpose({first}, {second}) of the weights of experts: only the last two dimensions can be exchanged"
        )
