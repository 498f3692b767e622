"""Settings of torch around a piece of work: products in full float32, and what torch keeps for each thread.

Grad and inference mode, autocast, the CUDA stream, dispatch and function modes are kept for each thread.
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


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no autocast inside; also a decorator. Everything is restored afterwards.

    The backends' own switches are used: they can be read whichever way the user set them, which
    ``torch.get_float32_matmul_precision`` cannot.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [switch.fp32_precision for switch in switches]
    with contextlib.ExitStack() as stack:
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        for switch, precision in zip(switches, allowed, strict=True):
            switch.fp32_precision = "ieee"
            stack.callback(setattr, switch, "fp32_precision", precision)
        yield


def thread_state() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Take what torch keeps per thread in this one; the result enters it in another."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in AUTOCAST_DEVICES
    ]
    autocast_cache = torch.is_autocast_cache_enabled()
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
            for kind, enabled, dtype in autocast:
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_cache_enabled(autocast_cache)
            if any(enabled for _, enabled, _ in autocast):
                # As if inside the caller's context: else an inner autocast context would empty the cache at its end.
                torch.autocast_increment_nesting()
                stack.callback(torch.autocast_decrement_nesting)
            if stream is not None:
                torch.cuda.set_device(stream.device)
                torch.cuda.set_stream(stream)
            # Pushed, not entered: what a mode does on entering (resetting a count, say) the caller has done.
            for mode in dispatch_modes:
                _python_dispatch._push_mode(mode)
                stack.callback(_pop_dispatch_mode, mode)
            for mode in function_modes:
                overrides._push_mode(mode)
                stack.callback(overrides._pop_mode)
            yield

    return enter


def _pop_dispatch_mode(mode: _python_dispatch.TorchDispatchMode) -> None:
    _python_dispatch._pop_mode(
        getattr(mode, "_dispatch_key", None) or getattr(mode, "_mode_key", None)
    )
