"""Weights that accelerate keeps elsewhere: a layer's hook brings them when it runs, and takes them away again.

Only the hook's own interface is used; accelerate is not imported.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own parameters are on the meta device, with a hook of accelerate that can bring them."""
    return hasattr(module, "_hf_hook") and any(
        parameter.is_meta for parameter in module.parameters(recurse=False)
    )


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Inside, the module's own parameters are on the device on which it runs."""
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
    """Call a layer with another weight in the place of its own.

    Args:
        module: the layer.
        forward: what runs it: its ``forward`` as the model calls it.
        weight: shaped like its own.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    if not hasattr(module, "_old_forward"):  # no hook of accelerate
        return with_weight(module, forward, weight, args, kwargs)
    hook: Any = module._hf_hook
    result = None
    try:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        result = with_weight(module, module._old_forward, weight, args, kwargs)  # type: ignore[arg-type]
    finally:
        result = hook.post_forward(module, result)
    return result


def pass_on_hook(module: nn.Module, twin: nn.Module) -> None:
    """Let the hook of a layer that moved its inputs to where it runs do so for the layer that takes its place."""
    hook: Any = getattr(module, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:
        moving = type(hook)(
            execution_device=hook.execution_device,
            io_same_device=hook.io_same_device,
            skip_keys=hook.skip_keys,
        )
        sys.modules[type(hook).__module__].add_hook_to_module(twin, moving)


def entry_device(module: nn.Module) -> torch.device | None:
    """Where the inputs of a module belong; ``None`` if its hooks move them, or it has no parameters to tell by."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next(
        (parameter.device for parameter in module.parameters() if not parameter.is_meta), None
    )


def with_weight(
    module: nn.Module,
    forward: Callable[..., Any],
    weight: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """:func:`run_with_weight` for a layer that is where it runs; ``weight`` may be a tensor with a history."""
    original = module._parameters["weight"]
    module._parameters["weight"] = weight  # type: ignore[assignment]
    try:
        return forward(*args, **kwargs)
    finally:
        module._parameters["weight"] = original
