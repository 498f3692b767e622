"""What torch keeps for each thread: grad and inference mode, autocast, the CUDA stream, dispatch and function modes."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import overrides
from torch.utils import _python_dispatch

from tsq_layers.precision import AUTOCAST_DEVICES


def thread_state() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Take what torch keeps per thread in this one; the result enters it in another."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in AUTOCAST_DEVICES]
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
    _python_dispatch._pop_mode(getattr(mode, "_dispatch_key", None) or getattr(mode, "_mode_key", None))
