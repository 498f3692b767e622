"""Copy values from the device to the host, in the only place that does so while layers are quantised.

The host must wait for the device when it reads the value of a tensor. Observers, the solver and the
packer keep their values on the device; the few values that the host needs (whether a factorisation
succeeded, the losses; a handful for each layer) are read by :func:`to_host`. So a test can count
them, and a replacement can answer where tensors have no values.
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
    scalars = [value.detach().to(torch.float64) for value in values]
    floats: list[float] = torch.stack(scalars).tolist()
    return floats


def clock(tensor: Tensor) -> float:
    """Return the wall time in seconds, after all work that is queued on the tensor's device has finished."""
    if tensor.device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(tensor.device)
    return time.perf_counter()
