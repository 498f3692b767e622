"""Saving: collect every tensor once, write beside the old files, then swap."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tsq_layers.config.versions import library_versions
from tsq_layers.errors import CheckpointError, StateError
from tsq_layers.formats.tsq.description import (
    DESCRIPTION_DIGEST,
    DESCRIPTION_FILE,
    TENSORS_FILE,
    Description,
    LayerSpec,
    TensorSpec,
    entries,
    header_digest,
    sort_metadata,
)
from tsq_layers.layers import composite_behind, packed
from tsq_layers.numerics.memory import memory_extent


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a quantised model to a directory; :func:`load` brings it back bit by bit.

    All parameters and buffers are saved, those that are not persistent as well. A tensor that has
    several names is stored once and is shared again after loading. Both files are written
    beside the old ones and renamed at the very end; other files in the directory are left alone.

    Args:
        model: a model with at least one :class:`~tsq_layers.runtime.linear.QuantLinear`, or such a layer.
        path: the directory; made if it does not exist.

    Raises:
        StateError: nothing in the model is quantised, or it is on the meta device and has no values.
        CheckpointError: something that such a file cannot hold, or ``path`` cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from tsq_layers.runtime.linear import QuantLinear
        >>> from tsq_layers.formats.tsq import load
        >>> model = nn.Sequential(QuantLinear(16, 8, bits=2, group_size=8), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(model, directory)
        ...     again = load(directory, nn.Sequential(nn.Linear(16, 8), nn.ReLU()))
        >>> torch.equal(model[0].words, again[0].words)
        True
    """
    write(model, path)


def write(model: nn.Module, path: str | os.PathLike[str], placeholders: Sequence[str] = ()) -> None:
    """:func:`save`, with empty tensors under the keys ``placeholders``, see :mod:`tsq_layers.formats.tsq.outline`."""
    layers = layers_of(model)
    tensors, aliases = shared_once(model)
    _check_values(tensors)
    _check_state(model)
    _check_overlaps(tensors)
    description = Description(
        layers=layers,
        composites=composites_of(model),
        aliases=aliases,
        tensors={key: TensorSpec.of(tensor) for key, tensor in tensors.items()},
        report=getattr(model, "tsq_report", None),
        library_version=library_versions()["tsq_layers"],
        placeholders=placeholders,
    )
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, tensors | dict.fromkeys(placeholders, torch.empty(0)), description)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save to {directory}: {error}; give a directory that can be written, with room for the model"
        ) from error


def layers_of(model: nn.Module) -> dict[str, LayerSpec]:
    """Return the specification of every quantised layer of a model.

    Raises:
        StateError: there is none.
    """
    layers = {name: LayerSpec.of(matrix) for name, _, matrix in packed(model)}
    if not layers:
        raise StateError(
            f"{type(model).__name__} holds no QuantLinear: call tsq.quantize(model, config, "
            "batches), or prepare, calibrate and convert, first"
        )
    return layers


def composites_of(model: nn.Module) -> list[str]:
    """Names of the modules that were split into plain layers."""
    return [name for name, module in model.named_modules() if composite_behind(module) is not None]


def _write(directory: Path, tensors: Mapping[str, Tensor], description: Description) -> None:
    """Both files in a new folder beside their final places, then renamed: a crash leaves no half-written file."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        new_tensors, new_description = (
            Path(temporary, TENSORS_FILE),
            Path(temporary, DESCRIPTION_FILE),
        )
        contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        # "format" is what transformers asks for before it opens a file.
        save_file(
            contiguous,
            new_tensors,
            metadata={"format": "pt", DESCRIPTION_DIGEST: description.digest()},
        )
        sort_metadata(new_tensors)
        new_description.write_text(
            replace(description, header_sha256=header_digest(new_tensors)).to_json(),
            encoding="utf-8",
        )
        new_tensors.chmod(
            new_description.stat().st_mode
        )  # safetensors makes a file that only its owner can read
        for file in (new_tensors, new_description):
            _flush(file)
        new_tensors.replace(directory / TENSORS_FILE)
        new_description.replace(directory / DESCRIPTION_FILE)


def _flush(file: Path) -> None:
    """Wait until a file is on the disk: a rename may otherwise survive a power cut that its content does not."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _check_state(model: nn.Module) -> None:
    """Refuse modules that keep anything else than their parameters and buffers: it would be lost."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"module {name!r} ({type(module).__name__}) keeps extra state beside its tensors, "
                "which safetensors cannot hold; save it on your own"
            )
    known = {memory_extent(entry.tensor) for entry in entries(model)}
    state = model.state_dict(keep_vars=True)
    kept = {
        key
        for key, value in state.items()
        if isinstance(value, Tensor) and memory_extent(value) in known
    }
    lost = next((key for key in state if key not in kept), None)
    if lost is not None:
        names = {name for name, _ in model.named_modules() if lost.startswith(f"{name}.")}
        owner = max(names, key=len, default="")
        raise CheckpointError(
            f"module {owner!r} ({type(model.get_submodule(owner)).__name__}) keeps {lost!r}, which "
            "is no parameter or buffer, and which a checkpoint "
            "cannot hold: save the model before the pass that makes it (quantize_dynamic, for "
            "example), and run that again after loading"
        )


def shared_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor under its first key, and the other keys of the same tensor as aliases."""
    first: dict[object, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for entry in entries(model):
        tensor = entry.tensor
        key = first.setdefault(
            (memory_extent(tensor), tensor.dtype, tensor.shape, tensor.stride()), entry.key
        )
        if key == entry.key:
            tensors[key] = tensor
        else:
            aliases[entry.key] = key
    return tensors, aliases


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise StateError(
                f"tensor {key!r} is on the meta device and has no values to save: load a "
                "checkpoint, or build the model on a real device"
            )
        if is_traceable_wrapper_subclass(tensor):
            raise CheckpointError(
                f"tensor {key!r} is of type {type(tensor).__name__}, which safetensors cannot "
                "hold: save the model before the "
                "pass that makes it, and run that again after loading"
            )


def _check_overlaps(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that share memory without being the same: loaded again, they would have come apart silently.

    Only tensors without holes are compared; interleaved slices of one storage need not overlap.
    """
    dense = [
        (memory_extent(tensor), key)
        for key, tensor in tensors.items()
        if tensor.numel() and _spans_itself(tensor)
    ]
    for ((storage, start, size), key), ((other_storage, other_start, _), other) in pairwise(
        sorted(dense)
    ):
        if storage == other_storage and other_start < start + size:
            raise CheckpointError(
                f"tensors {key!r} and {other!r} share memory but are not the same tensor, which a "
                "checkpoint cannot keep; clone one of them"
            )


def _spans_itself(tensor: Tensor) -> bool:
    reach = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return reach == tensor.numel()
