"""The only place where a value crosses from the device to the host while layers are observed, solved and packed.

Reading a tensor's value stops the host until the device has caught up. Everything else in the
observers, the solver and the packer stays on the device; the few deliberate reads (a handful a
layer: did the factorisation succeed, what are the losses) go through :func:`to_host`, so that
they can be counted in a test and replaced where tensors have no values.
"""

import time

import torch
from torch import Tensor


def to_host(*values: Tensor) -> list[float]:
    """Return scalar tensors as Python floats with a single device-to-host copy.

    Example:
        >>> to_host(torch.tensor(1), torch.tensor(2.5))
        [1.0, 2.5]
    """
    floats: list[float] = torch.stack(
        [value.detach().to(torch.float64) for value in values]
    ).tolist()
    return floats


def clock(tensor: Tensor) -> float:
    """Wall time in seconds, once everything queued on the tensor's device has run."""
    if tensor.device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(tensor.device)
    return time.perf_counter()
