"""Loading: check files against each other and against the model, read all tensors, and only then change the model."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tsq_layers.calibration.preparation import is_prepared
from tsq_layers.errors import CheckpointError, StateError
from tsq_layers.formats.tsq.description import (
    DESCRIPTION_FILE,
    TENSORS_FILE,
    Description,
    Entry,
    TensorSpec,
    header_digest,
)
from tsq_layers.formats.tsq.headers import (
    AGAIN,
    description_from_headers,
    is_described,
    outlined,
    tensor_files,
)
from tsq_layers.formats.tsq.layout import Plan, plan
from tsq_layers.layers import composite_of, replace, split_of
from tsq_layers.layers.composites import share_hooks
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.workflow.hosts import tell_hosts


def load(
    path: str | os.PathLike[str], model: nn.Module, *, device: torch.device | str | None = None
) -> nn.Module:
    """Turn a float model into the quantised model that :func:`save` wrote.

    Every layer that was saved quantised is replaced, every parameter and buffer takes the stored
    values and dtype, and tensors that shared memory share it again. All checks come before the
    first change: after an error ``model`` is as it was.

    Args:
        path: the directory that :func:`save` wrote, or ``save_pretrained`` of a quantised transformers model.
        model: the float model, freshly built with the configuration of the saved one. It may be on
            the meta device (``with torch.device("meta")``), so that no float weight is ever allocated.
        device: where all tensors go. ``None``: each to the device of the tensor that it replaces,
            and to the CPU if that is on the meta device.

    Returns:
        The model. If it is itself a quantised layer: the new layer, and ``model`` is not changed.

    Raises:
        StateError: the model is prepared.
        CheckpointError: a file that is missing, damaged, foreign or too new; or a model that does
            not have the layers, tensors and shapes that were saved.

    Example:
        >>> import tempfile
        >>> from tsq_layers.formats.tsq import save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(QuantLinear(16, 8, bits=2, group_size=8), directory)
        ...     load(directory, nn.Linear(16, 8, device="meta")).bits
        2
    """
    if is_prepared(model):
        raise StateError(
            "the model is prepared, and its observers would stay on the packed layers; call "
            "unprepare(model) before load"
        )
    directory = Path(path)
    description = _read_description(directory)
    splits = splits_of(model, description.composites)
    replace(model, splits)
    try:
        todo = plan(model, description, None if device is None else torch.device(device))
        tensors = _read_tensors(directory, description, todo.devices)
    except BaseException:
        replace(model, {split: original for original, split in splits.items()})
        raise
    return _apply(model, todo, description, tensors)


def splits_of(model: nn.Module, names: Iterable[str]) -> dict[nn.Module, nn.Module]:
    """Composite → split form, for every one that was split when it was saved."""
    splits: dict[nn.Module, nn.Module] = {}
    for name in names:
        module = dict(model.named_modules(remove_duplicate=False)).get(name)
        composite = None if module is None else composite_of(module)
        if module is None or composite is None or module is model:
            raise CheckpointError(
                f"{name!r} was split into layers when the model was saved, and is no such module "
                f"in this {type(model).__name__}; "
                "build the model with the configuration that it was saved with"
            )
        splits[module] = split_of(composite, module)
    return splits


def _read_description(directory: Path) -> Description:
    """Return the description in ``tsq.json``, or that in ``config.json`` and headers if transformers wrote it."""
    outline = None if is_described(directory) else outlined(directory)
    if outline is not None:
        return description_from_headers(directory, outline)
    try:
        text = (directory / DESCRIPTION_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"no {DESCRIPTION_FILE} in {directory}: give the directory that tsq.save wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"cannot read {DESCRIPTION_FILE} in {directory}: {error}; give the directory that tsq.save wrote"
        ) from error
    return Description.from_json(text)


def _read_tensors(
    directory: Path, description: Description, devices: Mapping[str, torch.device]
) -> dict[str, Tensor]:
    """All tensors that the model takes, on their devices; the file is first checked against the description."""
    files = tensor_files(directory)
    if description.header_sha256:  # of tsq.json
        files = [directory / TENSORS_FILE]
        _check_file(directory, description)
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                wanted = devices.keys() & set(opened.keys())
                tensors |= {key: opened.get_tensor(key).to(devices[key]) for key in wanted}
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from error
    for key, tensor in tensors.items():
        if TensorSpec.of(tensor) != description.tensors[key]:
            raise CheckpointError(
                f"tensor {key!r} is {TensorSpec.of(tensor)} in {TENSORS_FILE} and "
                f"{description.tensors[key]} in {DESCRIPTION_FILE}; {AGAIN}"
            )
    return tensors


def _check_file(directory: Path, description: Description) -> None:
    """The tensors file is the one that belongs to ``tsq.json``."""
    file = directory / TENSORS_FILE
    try:
        with safe_open(file, framework="pt") as opened:
            keys = set(opened.keys())
        differing = sorted(keys ^ {*description.tensors, *description.placeholders})
        if differing:
            lacking = TENSORS_FILE if differing[0] not in keys else DESCRIPTION_FILE
            raise CheckpointError(
                f"tensor {differing[0]!r} is missing in {lacking}: the two files in {directory} "
                f"are of different saves; {AGAIN}"
            )
        if header_digest(file) != description.header_sha256:
            raise CheckpointError(
                f"{TENSORS_FILE} and {DESCRIPTION_FILE} in {directory} are of different saves; {AGAIN}"
            )
    except FileNotFoundError:
        raise CheckpointError(
            f"no {TENSORS_FILE} in {directory}, only {DESCRIPTION_FILE}; {AGAIN}"
        ) from None
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file.name} in {file.parent} cannot be read, it is damaged or incomplete: {error}; {AGAIN}"
    )


def _apply(
    model: nn.Module, todo: Plan, description: Description, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The only changes to the model: assign tensors, put in the new layers, attach the report."""
    parameters: dict[str, nn.Parameter] = {}
    for entry in todo.fill:
        key = description.canonical(entry.key)
        setattr(entry.owner, entry.local, _new_value(entry, key, tensors[key], parameters))
    for module, attribute, entry in todo.follow:
        setattr(module, attribute, getattr(entry.owner, entry.local))
    for name, layer in todo.layers.items():
        _leave_meta(layer)
        share_hooks(model.get_submodule(name), layer)
        parent, _, local = name.rpartition(".")
        if name:
            setattr(model.get_submodule(parent), local, layer)
        else:
            model = layer
    if description.report is not None:
        model.tsq_report = description.report  # type: ignore[assignment]
    tell_hosts(model)
    return model


def _new_value(
    entry: Entry, key: str, tensor: Tensor, parameters: dict[str, nn.Parameter]
) -> Tensor:
    """The stored tensor, as a parameter where it replaces one; names that share a tensor share the parameter."""
    if not isinstance(entry.tensor, nn.Parameter):
        return tensor
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    return parameters.setdefault(
        key, nn.Parameter(tensor, requires_grad=entry.tensor.requires_grad and differentiable)
    )


def _leave_meta(layer: nn.Module) -> None:
    """The buffers of a new layer that are not stored hold no values, but they must be where the others are."""
    for module in layer.modules():
        if not isinstance(module, QuantLinear):
            continue
        for name, buffer in module.named_buffers():
            if buffer.is_meta and buffer.numel() == 0:
                setattr(module, name, torch.empty_like(buffer, device=module.words.device))
