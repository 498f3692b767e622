"""Read weights that accelerate keeps on another device, through the hook that brings them when a layer runs.

Only the interface of the hook is used; accelerate is not imported.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Return True if a module's own parameters are on the meta device, and a hook of accelerate can bring them."""
    if not hasattr(module, "_hf_hook"):
        return False
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Bring a module's own parameters to the device on which it runs, inside of the ``with`` block."""
    if not is_offloaded(module):
        yield
        return
    hook: Any = module._hf_hook
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def run_with_weight(
    module: nn.Module,
    forward: Callable[..., Any],
    weight: nn.Parameter,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a layer with another weight, and with the hook of accelerate that it may have.

    Args:
        module: the layer.
        forward: the function that runs it, its ``forward`` as the model calls it.
        weight: the other weight, shaped like its own.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        the result of ``forward``.
    """
    # accelerate keeps the forward that its hook wraps as _old_forward.
    if not hasattr(module, "_old_forward"):
        return with_weight(module, forward, weight, args, kwargs)
    hook: Any = module._hf_hook
    result = None
    try:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        result = with_weight(module, module._old_forward, weight, args, kwargs)  # type: ignore[arg-type]
    finally:
        result = hook.post_forward(module, result)
    return result


def pass_on_hook(module: nn.Module, replacement: nn.Module) -> None:
    """Give the replacement of a layer a hook that moves inputs to its device, if the layer has one."""
    hook: Any = getattr(module, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:
        moving_hook = type(hook)(
            execution_device=hook.execution_device,
            io_same_device=hook.io_same_device,
            skip_keys=hook.skip_keys,
        )
        sys.modules[type(hook).__module__].add_hook_to_module(replacement, moving_hook)


def entry_device(module: nn.Module) -> torch.device | None:
    """Return the device on which a module expects its inputs.

    Returns:
        the device of the hook of accelerate, or of the first parameter that is not on the meta device;
        ``None`` if there is neither.
    """
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    return None


def with_weight(
    module: nn.Module,
    forward: Callable[..., Any],
    weight: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a layer with another weight, as :func:`run_with_weight`, but without its hook of accelerate.

    ``weight`` may also be a tensor with a gradient function.
    """
    original = module._parameters["weight"]
    module._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        return forward(*args, **kwargs)
    finally:
        module._parameters["weight"] = original
