"""Open the journal of a run.

It is described by everything that the result depends on, so that only the same run continues from it.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.calibration.journal import (
    Fingerprint,
    Journal,
    fingerprint_batch,
    fingerprint_weights,
)
from tsq_layers.calibration.preparation import Preparation
from tsq_layers.config.versions import library_versions
from tsq_layers.layers.offloading import present
from tsq_layers.passes.modes import AUTOCAST_DEVICES


def journal_of(
    directory: str | os.PathLike[str],
    model: nn.Module,
    preparation: Preparation,
    paired: bool,
    *functions: Any,
    start: nn.Module | None = None,
) -> Journal:
    """A context in which solved layers are kept in a directory, or found there.

    Args:
        directory: of the journal.
        model: what runs, prepared.
        preparation: of it.
        paired: whether a full-precision pass runs beside the quantised one.
        functions: that the caller gave, or ``None``.
        start: a quantised model that the run starts from.

    Raises:
        CheckpointError: the directory belongs to another run, or cannot be written.
    """
    weights: dict[str, dict[str, Any]] = {}
    for name, target in preparation.targets.items():
        with present(target.module):  # one after the other: they may not fit together
            weights |= fingerprint_weights({name: target.weight})
    targets = {id(target.module.weight) for target in preparation.targets.values()}
    rest = {name: tensor for name, tensor in _tensors(model) if id(tensor) not in targets}
    if start is not None:
        rest |= {f"start: {name}": tensor for name, tensor in _tensors(start)}
    options = {
        "paired": paired,
        "functions": [_named(function) for function in functions],
        "autocast": [torch.is_autocast_enabled(kind) for kind in AUTOCAST_DEVICES],
        "devices": sorted({str(tensor.device) for tensor in rest.values()}),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }
    fingerprint = Fingerprint(
        config=preparation.config.to_dict(),
        layers=weights,
        options=options,
        tensors=fingerprint_weights(rest),
    )
    return Journal(directory, fingerprint)


def _named(function: Any) -> str:
    """Return the name of a function.

    An object that can be called has the name of its class, whatever it holds; a partial function
    has that of its function, and its arguments.
    """
    if function is None:
        return "none"
    if isinstance(function, functools.partial):
        arguments = fingerprint_batch(
            (function.args, function.keywords), f"partial of {_named(function.func)}"
        )
        return f"partial of {_named(function.func)}, {arguments}"
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{owner.__qualname__}"


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            yield name, tensor
