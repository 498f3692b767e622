"""The state of PyTorch around a call of a packed layer, read once into one frozen value."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tsq_layers.numerics.autograd import has_dual_numbers, is_differentiated


class Environment(NamedTuple):
    """The surroundings of a call.

    Args:
        dtype: in which the layer computes: that of its input, or of autocast where that is on.
        exporting: ``torch.export`` traces. The number of rows may then be a symbol, which must not be compared.
        compiling: ``torch.compile`` or ``torch.export`` traces.
        transforming: inside a transform of ``torch.func``, as ``vmap``.
        dispatching: inside a dispatch mode, as that of fake tensors.
        dual_numbers: inside a level of forward-mode differentiation.
        differentiating: a gradient of the input or the bias is wanted.
    """

    dtype: torch.dtype
    exporting: bool = False
    compiling: bool = False
    transforming: bool = False
    dispatching: bool = False
    dual_numbers: bool = False
    differentiating: bool = False


def environment_of(x: Tensor, bias: Tensor | None = None) -> Environment:
    """The environment of a call.

    Args:
        x: the input; or another tensor of the layer, where there is none.
        bias: of the layer.
    """
    compiling = torch.compiler.is_compiling()
    return Environment(
        autocast_dtype(x),
        torch.compiler.is_exporting(),
        compiling,
        torch._C._are_functorch_transforms_active(),
        not compiling and is_in_torch_dispatch_mode(),  # the tracers have modes of their own
        has_dual_numbers(),
        is_differentiated(x, bias),
    )


def has_values(tensor: Tensor, environment: Environment) -> bool:
    """Return whether a tensor has values that an operation can read: it is not fake, on meta or transformed."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type != "meta"
        and not environment.dispatching
        and not environment.transforming
    )


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast, if it is on, gives the input of a linear layer; float64 stays as it is."""
    device_type = x.device.type
    if (
        x.dtype == torch.float64
        or not torch.amp.is_autocast_available(device_type)
        or not torch.is_autocast_enabled(device_type)
    ):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def autocast(x: Tensor) -> Tensor:
    """The input of a linear layer or a convolution in the dtype of :func:`autocast_dtype`."""
    return x.to(autocast_dtype(x))
