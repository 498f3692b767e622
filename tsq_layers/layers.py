"""Which layers can be quantised: how each kind shows itself as a weight matrix and gets its twin.

A kind is a layer that maps inputs x (…, K) to x Wᵀ + bias with W (N, K). Everything else in the
library only sees this.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from tsq_layers.linear import QuantLinear
from tsq_layers.records import QuantizedWeight


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer.

    Attributes:
        name: how reports call it.
        matches: whether a module is of this kind.
        to_matrix: the module's weight parameter as (N, K), a view.
        from_matrix: inverse of ``to_matrix``.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]

    def weight(self, module: nn.Module) -> Tensor:
        """The module's weight matrix (N, K)."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return self.to_matrix(weight.detach())

    def twin(self, module: nn.Module, weight: QuantizedWeight) -> QuantLinear:
        """The quantised layer that takes the module's place."""
        bias = module.bias
        twin = QuantLinear.from_quantized(
            weight, bias if isinstance(bias, Tensor) else None, dtype=self.weight(module).dtype
        )
        return twin.train(module.training)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear  # a subclass may compute something else, or never call forward


def _is_transformers_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _same(weight: Tensor) -> Tensor:
    return weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.T


KINDS: tuple[LayerKind, ...] = (
    LayerKind("Linear", _is_linear, _same, _same),
    LayerKind("Conv1D", _is_transformers_conv1d, _transposed, _transposed),
)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a module, or ``None`` if it is not supported."""
    if module._parameters.get("weight") is None:
        return None  # its weight is computed from other parameters, as pruning and weight_norm do
    return next((kind for kind in KINDS if kind.matches(module)), None)


def unsupported(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a matrix of parameters of their own that no kind matches."""
    for name, module in model.named_modules():
        matrices = any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
        if matrices and kind_of(module) is None and not isinstance(module, QuantLinear):
            yield name, module


def tied(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
