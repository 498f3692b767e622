"""Define :class:`LayerKind`, which shows a layer as a weight matrix with rows of inputs, and tells what replaces it.

Shapes: N rows of the matrix (output features), K columns (input features), B row blocks that have
inputs of their own, T tokens. A leading "…" stands for any axes over tokens.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from tsq_layers.errors import TSQDeprecationWarning
from tsq_layers.runtime.linear import QuantLinear

_Replacement = Callable[[nn.Module, QuantLinear], nn.Module]
_Class = TypeVar("_Class", bound=type)


def rows_of(module: nn.Module, x: Tensor) -> Tensor:  # noqa: ARG001  (other kinds go by the module)
    """Return the inputs (…, K) of a layer that computes x Wᵀ: they are rows already."""
    return x


def as_it_is(module: nn.Module, weight: Tensor) -> Tensor:  # noqa: ARG001
    """Return a weight that is a matrix (N, K) already; its own inverse."""
    return weight


def one_block(module: nn.Module) -> int:  # noqa: ARG001
    """Return the number of row blocks of a layer whose rows all have the same inputs."""
    return 1


def is_patched(module: nn.Module) -> bool:
    """Return True if ``forward`` was replaced on this one module; its replacement would compute something else.

    A ``forward`` that accelerate put there to run its hooks is not counted: the one behind it is.
    """
    attributes = vars(module)
    name = "_old_forward" if "_hf_hook" in attributes else "forward"
    forward = attributes.get(name)
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def is_class(module: nn.Module, source: str, name: str) -> bool:
    """Return True if a module is of a class of a library that need not be installed.

    Args:
        module: an instance of that very class; a subclass does not count.
        source: the last parts of the dotted name of the module that defines the class. Models that
            bring their code along have it in packages of other names.
        name: name of the class.

    Example:
        >>> is_class(nn.Linear(2, 2), "modules.linear", "Linear")
        True
        >>> is_class(nn.Linear(2, 2), "timm.linear", "Linear")
        False
    """
    cls = type(module)
    return cls.__name__ == name and f".{cls.__module__}".endswith(f".{source}")


def is_plain(module: nn.Module, base: type[nn.Module]) -> bool:
    """Return True if a module computes what ``base`` computes, from the parameters ``weight`` and ``bias`` alone.

    False if its weight or bias is computed from something else (pruning, a parametrization), or if it
    has other parameters or layers, which its replacement would not have.

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
    parameters = module._parameters
    if type(module).forward is not base.forward or is_patched(module):
        return False
    if module._modules or not parameters.keys() <= {"weight", "bias"}:
        return False
    return getattr(module, "bias", None) is parameters.get("bias")


def mark_replacement(module: nn.Module) -> None:
    """Mark a module as a quantised layer around its child ``matrix``; other modules may have such a child too."""
    # The key is in pickled models of version 0.1.
    vars(module)["_tsq_twin"] = True


def is_replacement(module: nn.Module) -> bool:
    """Return True if a module is a quantised layer around its child ``matrix``."""
    return "_tsq_twin" in vars(module)


def kind_behind(module: nn.Module) -> str | None:
    """Return the name of the kind of layer that a quantised layer replaces; ``None`` if it replaces none."""
    return vars(module).get("_tsq_kind")


def packed_linear(module: nn.Module, matrix: QuantLinear) -> nn.Module:
    """Return the replacement of a linear layer: the packed matrix itself, in the mode of the layer."""
    return matrix.train(module.training)


def _accepts_twin(cls: _Class) -> _Class:
    """Accept the name that ``LayerKind.replacement`` had in version 0.1, with a warning. It goes with version 0.3."""
    plain_init: Callable[..., None] = cls.__init__  # type: ignore[misc]

    def warn() -> None:
        message = "LayerKind.twin is LayerKind.replacement now, and goes with version 0.3"
        warnings.warn(message, TSQDeprecationWarning, stacklevel=3)

    @functools.wraps(plain_init)
    def init(self: Any, **fields: Any) -> None:
        if "twin" in fields:
            warn()
            if "replacement" in fields:
                raise TypeError("twin is the old name of replacement; give replacement alone")
            fields["replacement"] = fields.pop("twin")
        plain_init(self, **fields)

    def twin(self: Any) -> Any:
        """Return ``replacement``, with a warning."""
        warn()
        return self.replacement

    cls.__init__ = init  # type: ignore[misc]
    cls.twin = property(twin)  # type: ignore[attr-defined]
    return cls


@_accepts_twin
@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """A kind of layer: a module with one weight, which maps rows x of length K to x Wᵀ + bias.

    Give it to :func:`register`. For a layer that computes like ``nn.Linear``, ``name`` and ``matches``
    are enough.

    Args:
        name: name in reports and checkpoints.
        matches: module → True if it is of this kind. It is called only with modules that have a
            parameter ``weight``.
        to_matrix: (module, its ``weight``) → the matrix (N, K), a view of the weight.
        from_matrix: (module, a matrix (N, K)) → the same numbers in the shape of ``weight``; the
            inverse of ``to_matrix``.
        inputs: (module, its first tensor argument) → rows (…, K) in the order of the matrix' columns, or
            (T, B, K) if there are B > 1 row blocks. ``None`` if inputs do not tell which weights
            matter, as for a table whose rows are looked up; then H is the identity.
        blocks: module → B. The N rows are B blocks of N/B rows, each with inputs of its own, as in a
            convolution with groups.
        replacement: (module, packed matrix with the module's bias) → the module that replaces it.

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
        ...     replacement=lambda module, matrix: QuantScaled(matrix),
        ... )
    """

    name: str
    matches: Callable[[nn.Module], bool]
    to_matrix: Callable[[nn.Module, Tensor], Tensor] = as_it_is
    from_matrix: Callable[[nn.Module, Tensor], Tensor] = as_it_is
    inputs: Callable[[nn.Module, Tensor], Tensor] | None = rows_of
    blocks: Callable[[nn.Module], int] = one_block
    replacement: _Replacement = packed_linear

    def __post_init__(self) -> None:
        object.__setattr__(self, "replacement", _marking(self.name, self.replacement))

    def __deepcopy__(self, memo: dict[int, object]) -> "LayerKind":
        """Return the same object: a copy of a prepared model refers to the registered kinds too."""
        return self

    def weight(self, module: nn.Module) -> Tensor:
        """Return the weight matrix (N, K) of a module of this kind, a view of its parameter."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return self.to_matrix(module, weight.detach())


def _marking(kind: str, replacement: _Replacement) -> _Replacement:
    """Return ``replacement`` with marks on its results, by which quantised layers of a model are found."""

    @functools.wraps(replacement)
    def marking(module: nn.Module, matrix: QuantLinear) -> nn.Module:
        layer = replacement(module, matrix)
        vars(layer)["_tsq_kind"] = kind
        if layer is not matrix:
            mark_replacement(layer)
        return layer

    return marking
