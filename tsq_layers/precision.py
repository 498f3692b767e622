"""Products in full float32, whatever the user allows for the model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "maia", "ipu", "privateuseone")


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no autocast inside; also a decorator. Everything is restored afterwards.

    The backends' own switches are used: they can be read whichever way the user set them, which
    ``torch.get_float32_matmul_precision`` cannot.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [switch.fp32_precision for switch in switches]
    with ExitStack() as stack:
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        for switch, precision in zip(switches, allowed, strict=True):
            switch.fp32_precision = "ieee"
            stack.callback(setattr, switch, "fp32_precision", precision)
        yield
