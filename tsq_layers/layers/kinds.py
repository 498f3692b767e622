"""What a kind of layer is: how it shows itself as a weight matrix with rows of inputs, and its quantised twin."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from tsq_layers.runtime.linear import QuantLinear


def rows_of(module: nn.Module, x: Tensor) -> Tensor:  # noqa: ARG001  (other kinds go by the module)
    """The inputs of a layer that maps x (…, K) to x Wᵀ: they are rows already."""
    return x


def as_it_is(module: nn.Module, weight: Tensor) -> Tensor:  # noqa: ARG001
    """The matrix of a weight that is a matrix (N, K) already, and the other way round."""
    return weight


def one_block(module: nn.Module) -> int:  # noqa: ARG001
    """All rows of the weight see the same inputs."""
    return 1


def is_patched(module: nn.Module) -> bool:
    """Whether this one module has a ``forward`` of its own, which its twin would not have.

    The one that accelerate puts on a module to catch its calls is looked behind.
    """
    attributes = vars(module)
    own = attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def is_class(module: nn.Module, source: str, name: str) -> bool:
    """Whether a module is of a class of a library that need not be installed.

    Args:
        module: of that very class, no subclass.
        source: the last parts of the dotted name of the file that it is defined in: code that models bring along lies
            in a package of its own.
        name: of the class.

    Example:
        >>> is_class(nn.Linear(2, 2), "modules.linear", "Linear"), is_class(nn.Linear(2, 2), "timm.linear", "Linear")
        (True, False)
    """
    kind = type(module)
    return kind.__name__ == name and f".{kind.__module__}".endswith(f".{source}")


def is_plain(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module computes what ``base`` does, of nothing but the parameters ``weight`` and ``bias``.

    Not so if its bias is computed from something else (pruning, a parametrization), or if it has
    parameters or layers beside, which its twin would not have.

    Args:
        module: of the class ``base``, or of a subclass.
        base: a layer of torch.

    Example:
        >>> class Labelled(nn.Linear):
        ...     label = "a"
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> is_plain(Labelled(4, 4), nn.Linear), is_plain(Doubled(4, 4), nn.Linear)
        (True, False)
    """
    own = module._parameters
    unchanged = type(module).forward is base.forward and not is_patched(module)
    alone = own.keys() <= {"weight", "bias"} and not module._modules
    return unchanged and alone and getattr(module, "bias", None) is own.get("bias")


def mark_twin(module: nn.Module) -> None:
    """Leave on a quantised layer that it is one: others may have a child called ``matrix`` too."""
    vars(module)["_tsq_twin"] = True


def is_twin(module: nn.Module) -> bool:
    """Whether a module is a quantised layer around its child ``matrix``."""
    return "_tsq_twin" in vars(module)


def kind_behind(module: nn.Module) -> str | None:
    """The name of the kind of layer in whose place a quantised layer stands; ``None`` if it was made by itself."""
    return vars(module).get("_tsq_kind")


def packed_linear(module: nn.Module, matrix: QuantLinear) -> nn.Module:
    """The twin of a linear layer is the packed matrix itself."""
    return matrix.train(module.training)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """One kind of layer: a module with one weight, that maps rows x of length K to x Wᵀ + bias.

    Only ``name`` and ``matches`` must be given for a layer that computes like ``nn.Linear``.

    Args:
        name: how reports call it.
        matches: whether a module is of this kind.
        to_matrix: (module, its ``weight``) → the matrix (N, K), a view.
        from_matrix: (module, a matrix (N, K)) → as ``weight`` is shaped; the inverse.
        inputs: (module, its first tensor argument) → rows (…, K), in the order of the matrix' columns;
            (T, B, K) where ``blocks`` says B > 1. ``None`` if inputs carry no information about which
            weights matter, as for a table that is looked up: then H is the identity.
        blocks: module → B: its N rows are B blocks of N/B rows, each with inputs of its own, as the
            groups of a convolution are.
        twin: (module, packed matrix with the module's bias) → what takes the module's place.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> class QuantScaled(nn.Module):
        ...     def __init__(self, matrix):
        ...         super().__init__()
        ...         self.matrix = matrix
        ...     def forward(self, x):
        ...         return 2 * self.matrix(x)
        >>> kind = LayerKind(
        ...     name="Scaled",
        ...     matches=lambda module: type(module) is Scaled,
        ...     twin=lambda module, matrix: QuantScaled(matrix),
        ... )
    """

    name: str
    matches: Callable[[nn.Module], bool]
    to_matrix: Callable[[nn.Module, Tensor], Tensor] = as_it_is
    from_matrix: Callable[[nn.Module, Tensor], Tensor] = as_it_is
    inputs: Callable[[nn.Module, Tensor], Tensor] | None = rows_of
    blocks: Callable[[nn.Module], int] = one_block
    twin: Callable[[nn.Module, QuantLinear], nn.Module] = packed_linear

    def __post_init__(self) -> None:
        object.__setattr__(self, "twin", _marking(self.name, self.twin))

    def __deepcopy__(self, memo: dict[int, object]) -> "LayerKind":
        """Itself: a kind is one, in a copy of a prepared model too."""
        return self

    def weight(self, module: nn.Module) -> Tensor:
        """The module's weight matrix (N, K), a view of its parameter."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return self.to_matrix(module, weight.detach())


def _marking(
    kind: str, twin: Callable[[nn.Module, QuantLinear], nn.Module]
) -> Callable[[nn.Module, QuantLinear], nn.Module]:
    @functools.wraps(twin)
    def marked(module: nn.Module, matrix: QuantLinear) -> nn.Module:
        made = twin(module, matrix)
        vars(made)["_tsq_kind"] = kind
        if made is not matrix:
            mark_twin(made)
        return made

    return marked
