"""Whether anybody wants a derivative, backward or forward."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may ask for gradients of any of the tensors.

    Example:
        >>> is_differentiated(None, torch.ones(2)), is_differentiated(torch.ones(2, requires_grad=True))
        (False, True)
    """
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def has_dual_numbers() -> bool:
    """Whether there may be dual numbers, those of ``torch.autograd.forward_ad``.

    Example:
        >>> with forward_ad.dual_level():
        ...     has_dual_numbers()
        True
    """
    level: int = forward_ad._current_level
    return level >= 0
