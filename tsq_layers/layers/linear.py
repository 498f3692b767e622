"""Define the kinds of layers that multiply by a matrix: ``nn.Linear``, and ``Conv1D`` of transformers (GPT-2).

Shapes: N output features, K input features.
"""

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from tsq_layers.layers.kinds import LayerKind, is_class, is_plain

_EQUIVALENT_CLASSES = (
    ("modeling_falcon", "FalconLinear"),  # x @ self.weight.T, and the bias added to that
    ("timm.layers.linear", "Linear"),  # casts to the input's dtype under torch.jit
    ("whisper.model", "Linear"),  # casts to the input's dtype
)
"""Subclasses of ``nn.Linear`` whose own forward computes the same: module and name."""


def _is_linear(module: nn.Module) -> bool:
    cls = type(module)
    # A lazy layer has no shape yet; it becomes an nn.Linear in its first call.
    if not issubclass(cls, nn.Linear) or issubclass(cls, LazyModuleMixin):
        return False
    for source, name in _EQUIVALENT_CLASSES:
        if is_class(module, source, name):
            return is_plain(module, cls)
    return is_plain(module, nn.Linear)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    is_conv1d = is_class(module, "transformers.pytorch_utils", "Conv1D")
    return is_conv1d and is_plain(module, type(module))


def _transposed(module: nn.Module, weight: Tensor) -> Tensor:  # noqa: ARG001
    return weight.T


LINEAR = LayerKind(name="Linear", matches=_is_linear)
"""``nn.Linear``, and its subclasses that compute the same."""
CONV1D = LayerKind(
    name="Conv1D",
    matches=_is_transformers_conv1d,
    to_matrix=_transposed,
    from_matrix=_transposed,
)
"""``Conv1D`` of transformers, whose weight is (K, N)."""
