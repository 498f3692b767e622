"""Build operations for a CPU, and compile for other devices, before the first calls of packed layers."""

import time
from typing import Any

import torch
from torch import nn

from tsq_layers.runtime import kernels, native
from tsq_layers.runtime.linear import QuantLinear

_ROWS = (1, 2, kernels.FEW_ROWS + 1)
"""One row of input is compiled apart, some more are one kind, and many are another."""


def warmup(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Run every kind of packed layer once, so that no later call waits for a compiler.

    On a CPU one library is built for all layers, once for a machine (it is kept on disk); on other devices, and where
    there is no compiler for that, ``torch.compile`` compiles for each kind of layer.

    Args:
        model: with packed layers, on its device; nothing in it changes.
        dtype: of the inputs that it will get; by default that of each layer.

    Returns:
        Seconds: of ``"build"`` (loading or building the library), then of the first calls of each layer, by its name.
        Layers on the meta device are left out.

    Example:
        >>> model = nn.Sequential(QuantLinear(64, 8, bits=4, group_size=32))
        >>> list(warmup(model))
        ['build', '0']
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)
    }
    layers = {name: layer for name, layer in layers.items() if not layer.words.is_meta}
    seconds = {}
    if any(layer.words.device.type == "cpu" for layer in layers.values()):
        seconds["build"] = _timed(native.usable)
    for name, layer in layers.items():
        seconds[name] = _timed(_run, layer, dtype or layer.dtype)
    return seconds


def _run(layer: QuantLinear, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for rows in _ROWS:
            layer(torch.zeros(rows, layer.in_features, dtype=dtype, device=layer.words.device))


def _timed(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started
