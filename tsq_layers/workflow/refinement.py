"""`refine`: stage 2 on a model that is quantised already, by this library or by another one."""

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.calibration import preparation as preparations
from tsq_layers.calibration.journal.resuming import journal_of
from tsq_layers.calibration.preparation import Preparation
from tsq_layers.calibration.run import Calibration, RunOptions
from tsq_layers.calibration.solving import warn_few_tokens
from tsq_layers.calibration.targets import Solved, Target
from tsq_layers.config import QuantConfig
from tsq_layers.config.versions import library_versions
from tsq_layers.errors import ConfigError, LayerError, StateError
from tsq_layers.layers import packed
from tsq_layers.layers.offloading import present
from tsq_layers.numerics.basis import fixed_signs
from tsq_layers.numerics.memory import dtype_name, model_bytes
from tsq_layers.numerics.sync import to_host
from tsq_layers.passes.batches import (
    Batch,
    Forward,
    PaddingMask,
    attention_mask,
    checked_batches,
    default_forward,
)
from tsq_layers.passes.offload import ActivationOffload
from tsq_layers.reports import LayerReport, Report
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.workflow.conversion import warn_never_called

_CHANGED = ("words", "scale_bits", "zero_words", "offset_bits")
_FOREIGN = (
    0.02  # relative difference of a tensor that both models hold: more than rounding to bfloat16
)
_PREPARED: dict[str, Any] = {
    "guidance": 0,
    "distill_epochs": 0,
    "channel_scaling": False,
    "embeddings": True,
    "skip": (),
    "overrides": {},
}


DEFAULT = QuantConfig(deviation_strength="auto", deviation_damping="auto")


def refine(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Batch],
    *,
    config: QuantConfig | None = None,
    held_out: Iterable[Batch] | None = None,
    forward: Forward = default_forward,
    padding_mask: PaddingMask = attention_mask,
    offload: torch.device | str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Refine the scales of a quantised model on the layer-wise loss, layer after layer, its codes frozen.

    This is stage 2 (arXiv 2602.02126) on any checkpoint: one that ``tsq.import_checkpoint`` has read, or one
    that was made here. The float model and the quantised one run side by side, as in ``tsq.calibrate``; when they
    reach a layer, all scales of a row are solved for at once, and a row whose loss would not fall keeps
    its own. Widths, groups, zero points and the dtype of scales stay, so the model can be written as what it was.

    Args:
        model: holds :class:`~tsq_layers.QuantLinear` layers; changed in place once all are solved.
        reference: the float model that it was quantised from. It runs, and is as before afterwards.
        batches: as for ``tsq.calibrate``.
        config: damping, ``deviation``…, ``refine``… and ``joint_rounds`` are used; bits, groups and
            grids are those of the
            layers. With ``joint_rounds`` the codes (and zero points) are improved too. The default chooses
            strength and damping of the deviation for each layer.
        held_out, forward, padding_mask, offload, checkpoint_dir, progress: as for ``tsq.calibrate``.

    Returns:
        ``model``.

    Raises:
        StateError: ``model`` holds no packed layers, or ``reference`` is quantised or prepared.
        LayerError: ``reference`` is not what ``model`` was quantised from, or a layer has look-up tables, a sparse
            part or scaled columns.
        ConfigError: a method without stage 2.
        CalibrationError, CheckpointError: as ``tsq.calibrate``.

    Warns:
        FewTokensWarning, SkippedLayerWarning: as ``tsq.calibrate``.

    Example:
        >>> import copy
        >>> import tsq_layers as tsq
        >>> reference = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> model = tsq.quantize(copy.deepcopy(reference), QuantConfig(bits=3, group_size=16, method="rtn"))
        >>> model = refine(model, reference, [torch.randn(512, 32)])
        >>> [layer.losses["refine"] <= layer.losses["assign"] for layer in model.tsq_report.layers]
        [True, True]
    """
    config = _checked(config)
    layers = _refinable(model)
    start = time.perf_counter()
    names = {
        name for name, _, _ in packed(model)
    }  # with those of tables, which may be tied to layers
    preparation = preparations.inspect(reference, config.changed(**_PREPARED), only=names)
    _check_same(model, reference, preparation, layers)
    preparation.targets = {
        name: _started(preparation.targets[name], config, layers[name]) for name in layers
    }
    checked = checked_batches(batches, "batches")
    reported = [] if held_out is None else checked_batches(held_out, "held_out")
    parking = None if offload is None else ActivationOffload(offload, reference)
    preparations.store(reference, preparation)
    try:
        paired = any(target.config.uses_deviation for target in preparation.targets.values())
        with (
            nullcontext()
            if checkpoint_dir is None
            else journal_of(
                checkpoint_dir, reference, preparation, paired, forward, padding_mask, start=model
            ) as journal
        ):
            options = RunOptions(
                batches=checked,
                held_out=reported,
                paired=paired,
                forward=forward,
                padding_mask=padding_mask,
                progress=progress,
                journal=journal,
                parking=parking,
            )
            solved = Calibration(reference, preparation, options).run()
        warn_few_tokens(solved)
        warn_never_called(preparation, solved)
    finally:
        preparations.remove(reference)
    for name, layer in solved.items():
        _take(layers[name], layer.matrix)
    _note(model, reference, config, solved, paired=paired, seconds=time.perf_counter() - start)
    return model


def _checked(config: QuantConfig | None) -> QuantConfig:
    if config is None:
        return DEFAULT
    refine = config.option("refine", "none")
    if refine == "none":
        raise ConfigError(
            f"method={config.method!r}, refine={refine!r}: only two-stage refines scales; give "
            "method='two-stage' with refine='exact'"
        )
    return config


def _refinable(model: nn.Module) -> dict[str, QuantLinear]:
    """Name → packed matrix of every layer that has inputs to learn from; a matrix under several names once."""
    layers: dict[str, QuantLinear] = {}
    matrix_ids: set[int] = set()
    for name, module, matrix in packed(model):
        if id(matrix) in matrix_ids or type(module).__name__ == "QuantEmbedding":
            continue
        matrix_ids.add(id(matrix))
        signs, columns = matrix.rotation_signs, matrix.in_features
        obstacles = {
            "look-up tables": matrix.tables is not None,
            "a sparse part": matrix.outlier_bits is not None,
            "scaled columns": matrix.column_scale_bits is not None,
            "a rotation of its own": signs is not None
            and not torch.equal(signs, fixed_signs(columns, signs.device)),
        }
        for what, there in obstacles.items():
            if there:
                raise LayerError(
                    f"{name}: it has {what}, and refine takes plain codes and scales; quantise it anew"
                )
        layers[name] = matrix
    if not layers:
        raise StateError(
            f"{type(model).__name__} holds no packed layers; quantise it, or tsq.import_checkpoint one"
        )
    return layers


def _started(target: Target, config: QuantConfig, matrix: QuantLinear) -> Target:
    """A target that starts from the codes and grids of a layer."""
    weight = dataclasses.replace(matrix.quantized_weight(), basis=None)
    symmetric = matrix.symmetric
    own: dict[str, Any] = {
        "bits": matrix.bits,
        "group_size": matrix.group_size,
        "symmetric": symmetric,
        "zero_points": "integer" if matrix.offset_bits is None else "float",
        "scale_dtype": dtype_name(matrix.scale_dtype),
        "rotation": matrix.rotation,
        "activation_bits": matrix.activation_bits,
    }
    own_config = config.changed(**_PREPARED, **own)
    keep = target.config.keep_zeros and own_config.holds_zero
    return dataclasses.replace(target, config=own_config.changed(keep_zeros=keep), given=weight)


def _check_same(
    model: nn.Module,
    reference: nn.Module,
    preparation: Preparation,
    layers: Mapping[str, QuantLinear],
) -> None:
    """Refuse a float model that is not the one that was quantised."""
    cure = "give the float model that it was quantised from"
    for name, matrix in layers.items():
        if name not in preparation.targets:
            raise LayerError(f"{name}: there is no such layer in the reference; {cure}")
        if preparation.targets[name].shape != (matrix.out_features, matrix.in_features):
            raise LayerError(
                f"{name}: it is {preparation.targets[name].shape} in the reference; {cure}"
            )
    errors = {name: _error(preparation.targets[name], matrix) for name, matrix in layers.items()}
    others = dict(reference.named_parameters())
    parameter_distances = {
        name: _relative(parameter, others[name])
        for name, parameter in model.named_parameters()
        if name in others and parameter.shape == others[name].shape and not others[name].is_meta
    }
    for kinds, limit in ((errors, 1.0), (parameter_distances, _FOREIGN)):
        distances = to_host(*kinds.values()) if kinds else []
        for name, value in zip(kinds, distances, strict=True):
            if not value <= limit:
                raise LayerError(
                    f"{name}: it differs by {100 * value:.0f} % from that of the reference; {cure} "
                    "(after norms were merged or weights scaled: that model)"
                )


def _error(target: Target, matrix: QuantLinear) -> Tensor:
    with present(target.module):
        return _relative(matrix.dequantize(torch.float32), target.weight)


def _relative(value: Tensor, original: Tensor) -> Tensor:
    reference = original.detach().to(torch.float32)
    difference: Tensor = (value.detach().to(reference) - reference).norm()
    share: Tensor = difference / reference.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return share


def _take(matrix: QuantLinear, refined: QuantLinear) -> None:
    for name in _CHANGED:
        old, new = getattr(matrix, name), getattr(refined, name)
        if old is not None:
            setattr(matrix, name, new.to(old.device))


def _note(
    model: nn.Module,
    reference: nn.Module,
    config: QuantConfig,
    solved: Mapping[str, Solved],
    *,
    paired: bool,
    seconds: float,
) -> None:
    """Note in the model's report what was done to every layer."""
    old = getattr(model, "tsq_report", None)
    if not isinstance(old, Report):
        layers = tuple(layer.report for layer in solved.values())
        model.tsq_report = Report(  # type: ignore[assignment]
            layers=layers,
            config=config,
            size_before=model_bytes(reference),
            size_after=model_bytes(model),
            paired=paired,
            seconds=seconds,
            versions=library_versions(),
        )
        return
    layers = tuple(_noted(entry, solved.get(entry.name)) for entry in old.layers)
    model.tsq_report = dataclasses.replace(  # type: ignore[assignment]
        old,
        layers=layers,
        paired=paired,
        seconds=old.seconds + seconds,
        versions=library_versions(),
    )


def _noted(entry: LayerReport, layer: Solved | None) -> LayerReport:
    if layer is None:
        return entry
    return dataclasses.replace(layer.report, method=entry.method)  # of its codes
