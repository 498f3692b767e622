"""Layers that multiply by a matrix: ``nn.Linear``, and the ``Conv1D`` of transformers (GPT-2)."""

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from tsq_layers.layers.kinds import LayerKind, is_class, is_plain

_SAME = (
    ("modeling_falcon", "FalconLinear"),  # x @ self.weight.T, and the bias added to that
    ("timm.layers.linear", "Linear"),  # casts to the input's dtype under torch.jit
    ("whisper.model", "Linear"),  # casts to the input's dtype
)
"""Subclasses of ``nn.Linear`` with a forward of their own that computes the same: file and name."""


def _is_linear(module: nn.Module) -> bool:
    kind = type(module)
    if not issubclass(kind, nn.Linear) or issubclass(kind, LazyModuleMixin):
        return False  # a lazy one becomes plain once it has a shape
    same = any(is_class(module, source, name) for source, name in _SAME)
    return is_plain(module, kind if same else nn.Linear)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return is_class(module, "transformers.pytorch_utils", "Conv1D") and is_plain(
        module, type(module)
    )


def _transposed(module: nn.Module, weight: Tensor) -> Tensor:  # noqa: ARG001
    return weight.T


LINEAR = LayerKind(name="Linear", matches=_is_linear)
CONV1D = LayerKind(
    name="Conv1D", matches=_is_transformers_conv1d, to_matrix=_transposed, from_matrix=_transposed
)  # its weight is (K, N)
