"""Tell if an operation will be differentiated, in backward or forward mode."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Return True if a backward pass may ask for the gradient of any of the tensors.

    Example:
        >>> is_differentiated(None, torch.ones(2))
        False
        >>> is_differentiated(torch.ones(2, requires_grad=True))
        True
    """
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def has_dual_numbers() -> bool:
    """Return True inside of ``torch.autograd.forward_ad.dual_level()``, where tensors may be dual numbers.

    Example:
        >>> with forward_ad.dual_level():
        ...     has_dual_numbers()
        True
    """
    level: int = forward_ad._current_level
    return level >= 0
