"""Layers that multiply by a matrix: ``nn.Linear``, and the ``Conv1D`` of transformers (GPT-2)."""

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from tsq_layers.layers.kinds import LayerKind, is_plain


def _is_linear(module: nn.Module) -> bool:
    kind = type(module)
    if not issubclass(kind, nn.Linear) or issubclass(kind, LazyModuleMixin):
        return False  # a lazy one becomes plain once it has a shape
    return is_plain(module, nn.Linear) or _is_falcon(module)


def _is_falcon(module: nn.Module) -> bool:
    """Whether it is the ``FalconLinear`` of transformers: ``x @ self.weight.T``, and the bias added to that."""
    kind = type(module)
    known = kind.__name__ == "FalconLinear" and kind.__module__.rpartition(".")[2] == "modeling_falcon"
    return known and is_plain(module, kind)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    known = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return known and is_plain(module, kind)


def _transposed(module: nn.Module, weight: Tensor) -> Tensor:  # noqa: ARG001
    return weight.T


LINEAR = LayerKind(name="Linear", matches=_is_linear)
CONV1D = LayerKind(
    name="Conv1D", matches=_is_transformers_conv1d, to_matrix=_transposed, from_matrix=_transposed
)  # its weight is (K, N)
