"""Set and hand on the modes of torch: full float32 precision, and what torch keeps for each thread.

Torch keeps grad mode, inference mode, autocast, the CUDA stream, dispatch and function modes for each thread.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import overrides
from torch.utils import _python_dispatch

AUTOCAST_DEVICES = (
    "cpu",
    "cuda",
    "xpu",
    "mps",
    "hpu",
    "xla",
    "mtia",
    "maia",
    "ipu",
    "privateuseone",
)
"""The device types that have an autocast switch."""


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and autocast off inside of a ``with`` block, or in a function that it decorates.

    All settings are restored afterwards. The switches of the backends are set, because they can be
    read in whichever way the user set them; ``torch.get_float32_matmul_precision`` raises for some.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [switch.fp32_precision for switch in switches]
    with contextlib.ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for switch, precision in zip(switches, precisions, strict=True):
            switch.fp32_precision = "ieee"
            stack.callback(setattr, switch, "fp32_precision", precision)
        yield


def thread_state() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Read the modes that torch keeps for the calling thread.

    Returns:
        a function that makes a context manager, which sets the modes in another thread.
    """
    grad = torch.is_grad_enabled()
    inference = torch.is_inference_mode_enabled()
    enter_autocast = _autocast_state()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    dispatch_modes = _python_dispatch._get_current_dispatch_mode_stack()
    function_modes = overrides._get_current_function_mode_stack()

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        # A thread learns the number that torch.set_num_threads was given only when it asks.
        torch.get_num_threads()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            enter_autocast(stack)
            if stream is not None:
                torch.cuda.set_device(stream.device)
                torch.cuda.set_stream(stream)
            # Modes are pushed, not entered: what a mode does on entering (reset a count, say) was done
            # in the calling thread.
            for mode in dispatch_modes:
                _python_dispatch._push_mode(mode)
                stack.callback(_pop_dispatch_mode, mode)
            for mode in function_modes:
                overrides._push_mode(mode)
                stack.callback(overrides._pop_mode)
            yield

    return enter


def _autocast_state() -> Callable[[contextlib.ExitStack], None]:
    """Read the autocast settings of the calling thread; the result sets them in another one."""
    settings = []
    for device in AUTOCAST_DEVICES:
        is_enabled = torch.is_autocast_enabled(device)
        settings.append((device, is_enabled, torch.get_autocast_dtype(device)))
    cache_is_enabled = torch.is_autocast_cache_enabled()

    def enter(stack: contextlib.ExitStack) -> None:
        for device, is_enabled, dtype in settings:
            torch.set_autocast_enabled(device, is_enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cache_is_enabled)
        if any(is_enabled for _, is_enabled, _ in settings):
            # As inside of the caller's context: otherwise an inner autocast context would empty the
            # cache at its end.
            torch.autocast_increment_nesting()
            stack.callback(torch.autocast_decrement_nesting)

    return enter


def _pop_dispatch_mode(mode: _python_dispatch.TorchDispatchMode) -> None:
    _python_dispatch._pop_mode(
        getattr(mode, "_dispatch_key", None) or getattr(mode, "_mode_key", None)
    )
