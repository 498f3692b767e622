"""`import_checkpoint`: one call for all foreign formats."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.calibration.coverage import Ownership, ownership, parameter_reports
from tsq_layers.config import QuantConfig
from tsq_layers.config.versions import library_versions
from tsq_layers.errors import CheckpointError, LayerError
from tsq_layers.formats.architecture import empty_model
from tsq_layers.formats.compressed_tensors import reading as compressed_tensors
from tsq_layers.formats.files import TensorFiles, json_object
from tsq_layers.formats.gptq import reading as gptq
from tsq_layers.formats.packed import PackedLayer, refuse
from tsq_layers.layers import LayerKind, kind_of, replace
from tsq_layers.numerics.memory import model_bytes
from tsq_layers.reports import LayerReport, Report
from tsq_layers.runtime.linear import QuantLinear

FORMATS: Mapping[str, Callable[[TensorFiles, Mapping[str, Any]], list[PackedLayer]]] = {
    "gptq": gptq.layers,
    "compressed-tensors": compressed_tensors.layers,
}
"""``quant_method`` → the layers that such a checkpoint holds packed."""

_DERIVED = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
)  # buffers that old files hold and nobody reads


@dataclass(frozen=True, eq=False)
class _Place:
    """The place of a packed layer."""

    module: nn.Module
    kind: LayerKind
    shape: tuple[int, int]
    layer: PackedLayer


def import_checkpoint(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a quantised checkpoint of another library as a model of :class:`~tsq_layers.QuantLinear`.

    The inverse of ``tsq.export_checkpoint``.

    Codes, scales and zero points are exactly those of the files; nothing is rounded again. Read are the files of GPTQ
    (GPTQModel, AutoGPTQ; versions 1 and 2; 2, 3, 4 and 8 bits) and of compressed-tensors
    (llm-compressor; weights alone,
    "pack-quantized" and "int-quantized"), symmetric and asymmetric. Groups must be neighbouring columns: files that
    were quantised with ``desc_act=True`` in groups are refused.

    Args:
        directory: with ``config.json`` and safetensors files.
        model: the float model to fill, on any device; it is changed once all is read. ``None``: transformers builds it,
            without weights, from ``config.json``.
        dtype: of what is not packed, and of :attr:`QuantLinear.weight`; ``None`` keeps that of the files.

    Returns:
        The model on the CPU, in evaluation mode, with a report, for ``tsq.save``, ``tsq.refine`` and ``tsq.export``.

    Raises:
        CheckpointError: no such checkpoint, a format or a layer that cannot be read, or tensors
            that the model does not have.
        MissingExtraError: transformers is not installed, and no ``model`` was given.

    Example:
        >>> import tempfile
        >>> import tsq_layers as tsq
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
        >>> model = tsq.quantize(model, tsq.QuantConfig(bits=3, group_size=32, method="rtn"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     there = tsq.export_checkpoint(model, Path(folder, "out"), format="gptq")
        ...     back = import_checkpoint(there)
        >>> torch.equal(back.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
        True
    """
    path = Path(directory)
    packed, files = _read_description(path)
    model = empty_model(path) if model is None else model
    places = [_place(model, layer) for layer in packed]
    floats = _float_tensors(model, places, files)
    width = dtype or _common_dtype(floats.values())
    before, owned = _float_bytes(model, width), ownership(model, dict(model.named_modules()))
    twins, taken = {}, set()
    for place in places:
        bias = f"{place.layer.name}.bias"
        twins[place.module] = _twin(place, files.take(bias) if bias in files.keys else None, width)
        taken.add(bias)
    _fill(model, {key: value for key, value in floats.items() if key not in taken}, dtype)
    for module, twin in twins.items():
        twin.train(module.training)
    model = replace(model, twins)
    model.tsq_report = _report(places, twins, owned, before, model)  # type: ignore[assignment]
    return model.eval()


def _read_description(path: Path) -> tuple[list[PackedLayer], TensorFiles]:
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path} holds no config.json: give the directory of a quantised transformers model"
        )
    config = json_object(path / "config.json").get("quantization_config")
    if config is None and (path / "quantize_config.json").exists():
        config = {"quant_method": "gptq", **json_object(path / "quantize_config.json")}
    if config is None:
        raise CheckpointError(
            f"config.json in {path} has no quantization_config: the model is not quantised"
        )
    if not isinstance(config, dict):
        raise CheckpointError(
            f"quantization_config of {path} is a {type(config).__name__}, and an object was expected"
        )
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise CheckpointError(
            f"quant_method={method!r} of {path} is not known: checkpoints of {', '.join(FORMATS)} are read"
        )
    files = TensorFiles(path)
    layers = FORMATS[method](files, config)
    if not layers:
        raise CheckpointError(
            f"the files in {path} hold no packed layers, against what config.json says"
        )
    return layers, files


def _place(model: nn.Module, layer: PackedLayer) -> _Place:
    try:
        module = model.get_submodule(layer.name)
    except AttributeError:
        refuse(
            layer.name,
            f"it is not in this {type(model).__name__}; build the model with the config.json beside it",
        )
    kind = kind_of(module)
    if kind is None or kind.inputs is None:
        refuse(
            layer.name, f"it is a {type(module).__name__} in the model, and linear layers are read"
        )
    rows, columns = kind.weight(module).shape
    return _Place(module, kind, (rows, columns), layer)


def _twin(place: _Place, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    try:
        weight = place.layer.read()
    except (
        LayerError,
        ValueError,
        TypeError,
        LookupError,
        RuntimeError,
        ZeroDivisionError,
    ) as error:
        if isinstance(error, CheckpointError):
            raise
        refuse(
            place.layer.name,
            f"its tensors do not fit together or its description ({error}); copy the directory again",
        )
    if not bool(torch.isfinite(weight.scales).all()):
        refuse(place.layer.name, "its scales are not finite; quantise it again")
    if tuple(weight.codes.shape) != place.shape:
        refuse(
            place.layer.name,
            f"it is {tuple(weight.codes.shape)} in the files and {place.shape} in the model",
        )
    return place.kind.replacement(
        place.module, QuantLinear.from_quantized(weight, bias, dtype=dtype)
    )


def _float_tensors(
    model: nn.Module, places: Sequence[_Place], files: TensorFiles
) -> dict[str, Tensor]:
    """Every other tensor of the files; none may be missing in either, but those that are tied to another one."""
    held = frozenset[str]().union(*(place.layer.keys for place in places))
    found = {key for key in files.keys - held if not key.endswith(_DERIVED)}
    packed = {f"{place.layer.name}.weight" for place in places}
    names: dict[int, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        owner, _, local = name.rpartition(".")
        derived = local in model.get_submodule(owner)._non_persistent_buffers_set
        if name not in packed and not derived:
            names.setdefault(id(tensor), []).append(name)
    known = {name for group in names.values() for name in group}
    biases = {f"{place.layer.name}.bias" for place in places}
    if unexpected := sorted(found - known - biases):
        raise CheckpointError(
            f"tensor {unexpected[0]!r} of the checkpoint is not in the model, with {len(unexpected) - 1} others"
        )
    if missing := [group[0] for group in names.values() if not found & {*group}]:
        raise CheckpointError(
            f"tensor {missing[0]!r} of the model is not in the checkpoint, with {len(missing) - 1} others"
        )
    return {key: files.take(key) for key in sorted(found)}


def _common_dtype(floats: Any) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for tensor in floats:
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def _fill(model: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Give tensors their values; those that were one tensor stay one."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    shared: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        shared.setdefault(id(tensor), []).append(name)
    new: dict[str, Tensor] = {}
    for group in shared.values():
        given = [values[name] for name in group if name in values]
        if not given:
            continue
        if any(not torch.equal(given[0], other) for other in given[1:]):
            raise CheckpointError(
                f"tensors {' and '.join(map(repr, group))} are one in the model and differ in the "
                "checkpoint; build it with tie_word_embeddings=False"
            )
        old = tensors[group[0]]
        if old.shape != given[0].shape:
            raise CheckpointError(
                f"tensor {group[0]!r} has shape {tuple(given[0].shape)} in the checkpoint and "
                f"{tuple(old.shape)} in the model"
            )
        value = (
            given[0].to(dtype) if dtype is not None and given[0].is_floating_point() else given[0]
        )
        value = value.clone()  # what was read is the file itself, which may be written again
        kept = (
            nn.Parameter(value, requires_grad=old.requires_grad)
            if isinstance(old, nn.Parameter)
            else value
        )
        new |= dict.fromkeys(group, kept)
    for name, value in new.items():
        owner, _, local = name.rpartition(".")
        setattr(model.get_submodule(owner), local, value)


def _float_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())


def _report(
    places: Sequence[_Place],
    twins: Mapping[nn.Module, nn.Module],
    owned: Sequence[Ownership],
    before: int,
    model: nn.Module,
) -> Report:
    """Return the report of an imported model, without losses: the files do not hold them."""
    matrices = {
        place.layer.name: getattr(twins[place.module], "matrix", twins[place.module])
        for place in places
    }
    layers = tuple(
        LayerReport(
            name=place.layer.name,
            kind=place.kind.name,
            rows=place.shape[0],
            columns=place.shape[1],
            status="quantized",
            bits=matrix.bits,
            group_size=matrix.group_size,
            symmetric=matrix.symmetric,
            bits_per_weight=matrix.bits_per_weight,
        )
        for place in places
        if isinstance(matrix := matrices[place.layer.name], QuantLinear)
    )
    usual = Counter(
        (layer.bits, layer.group_size, layer.symmetric) for layer in layers
    ).most_common(1)[0][0]
    bits, size, symmetric = usual
    assert bits is not None
    assert symmetric is not None
    config = QuantConfig(bits=bits, group_size=size, symmetric=symmetric, method="gptq")
    return Report(
        layers=layers,
        config=config,
        size_before=before,
        size_after=model_bytes(model),
        paired=False,
        seconds=0.0,
        versions=library_versions(),
        parameters=parameter_reports(owned, layers),
    )
