"""What `prepare` leaves on a model: which layers are to be quantised, and their observers."""

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tsq_layers.config import QuantConfig, explicit_patterns, matches
from tsq_layers.errors import ConfigError, LayerError, SkippedLayerWarning, StateError, UnmatchedPatternWarning
from tsq_layers.layers import LayerKind, kind_of, tied, unsupported
from tsq_layers.linear import QuantLinear
from tsq_layers.observer import HessianObserver
from tsq_layers.records import QuantizedWeight
from tsq_layers.report import LayerReport
from tsq_layers.sync import to_host

_ATTRIBUTE = "_tsq_preparation"


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that is to be quantised."""

    name: str
    module: nn.Module
    kind: LayerKind
    config: QuantConfig

    @property
    def weight(self) -> torch.Tensor:
        """The full-precision weight matrix (N, K)."""
        return self.kind.weight(self.module)


@dataclass(frozen=True, eq=False)
class Solved:
    """A layer that was quantised, not yet swapped in."""

    weight: QuantizedWeight
    report: LayerReport


@dataclass(eq=False)
class Preparation:
    """The state between ``prepare`` and ``convert``; lives on the model, outside its state_dict."""

    config: QuantConfig
    targets: dict[str, Target]
    left_alone: list[LayerReport]
    observers: dict[str, HessianObserver] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    solved: dict[str, Solved] | None = None
    paired: bool = False
    seconds: float = 0.0

    def attach(self) -> None:
        """Hook the observers to their layers."""
        for name, observer in self.observers.items():
            hook = functools.partial(_observe_call, observer)
            self.handles.append(self.targets[name].module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Take the observers off their layers; what they saw stays."""
        while self.handles:
            self.handles.pop().remove()


def _observe_call(observer: HessianObserver, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    observer(module, args or tuple(kwargs.values()))  # the layers have one argument, by position or by name


def inspect(model: nn.Module, config: QuantConfig) -> Preparation:
    """Sort the layers of a model into targets and those left alone. Nothing is attached.

    Raises:
        StateError, ConfigError, LayerError: as ``prepare`` says.
    """
    if not isinstance(model, nn.Module):
        raise StateError(f"the model is a {type(model).__name__}; give an nn.Module")
    if not isinstance(config, QuantConfig):
        raise ConfigError(f"config is a {type(config).__name__}; give a QuantConfig")
    if is_prepared(model):
        raise StateError("the model is already prepared; call convert(model), or unprepare(model) to start again")
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise StateError(
            "the model is already converted: it holds QuantLinear layers; start from the full-precision model"
        )
    targets: dict[str, Target] = {}
    left_alone: list[LayerReport] = []
    shared = tied(model)
    for name, module, kind in _supported(model):
        reason = _reason_to_skip(name, module, config, shared)
        if reason is None:
            targets[name] = Target(name, module, kind, config.for_layer(name))
        else:
            rows, columns = kind.weight(module).shape
            left_alone.append(
                LayerReport(name=name, kind=kind.name, rows=rows, columns=columns, status="skipped", reason=reason)
            )
    left_alone += _not_supported(model)
    _warn_unmatched(config, [name for name, _, _ in _supported(model)])
    if not targets:
        raise ConfigError(
            f"nothing to quantise: {type(model).__name__} has no nn.Linear or Conv1D that skip={config.skip!r} leaves; change skip"
        )
    _check_weights(targets)
    return Preparation(config, targets, left_alone)


def store(model: nn.Module, preparation: Preparation) -> None:
    """Leave ``preparation`` on the model."""
    setattr(model, _ATTRIBUTE, preparation)


def is_prepared(model: nn.Module) -> bool:
    """Whether the model was prepared and not yet converted."""
    return _ATTRIBUTE in vars(model)


def fetch(model: nn.Module, verb: str) -> Preparation:
    """What ``prepare`` left on the model.

    Raises:
        StateError: the model was not prepared.
    """
    if not is_prepared(model):
        raise StateError(f"{verb} needs a prepared model; call prepare(model, config) first")
    preparation: Preparation = vars(model)[_ATTRIBUTE]
    return preparation


def remove(model: nn.Module) -> None:
    """Undo :func:`store`, observers included."""
    fetch(model, "unprepare").detach()
    delattr(model, _ATTRIBUTE)


def _supported(model: nn.Module) -> Iterator[tuple[str, nn.Module, LayerKind]]:
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            yield name, module, kind


def _reason_to_skip(name: str, module: nn.Module, config: QuantConfig, shared: set[int]) -> str | None:
    if config.skips(name):
        return "skip in the configuration"
    if any(id(parameter) in shared for parameter in module.parameters(recurse=False)):
        reason = "its weight is tied to another module's"
        warnings.warn(
            f"{name} stays in full precision: {reason}; add it to skip to say that this is intended",
            SkippedLayerWarning,
            stacklevel=4,
        )
        return reason
    return None


def _not_supported(model: nn.Module) -> Iterator[LayerReport]:
    for name, module in unsupported(model):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2:
                kind = type(module).__name__
                yield LayerReport(
                    name=f"{name}.{parameter_name}".lstrip("."),
                    kind=kind,
                    rows=parameter.shape[0],
                    columns=parameter[0].numel(),
                    status="not supported",
                    reason=f"{kind} layers are not quantised by this version",
                )


def _warn_unmatched(config: QuantConfig, names: list[str]) -> None:
    for pattern in explicit_patterns(config):
        if not any(matches(pattern, name) for name in names):
            shown = ", ".join(repr(name) for name in names[:3])
            warnings.warn(
                f"pattern {pattern!r} matches none of the {len(names)} layers ({shown}, …); correct or remove it",
                UnmatchedPatternWarning,
                stacklevel=4,
            )


def _check_weights(targets: dict[str, Target]) -> None:
    """No meta tensors, no NaN or inf; one device-to-host copy for each device."""
    by_device: dict[torch.device, list[Target]] = {}
    for target in targets.values():
        weight = target.weight
        if weight.is_meta:
            raise LayerError(
                f"{target.name}: its weight is on the meta device and has no values; load the weights first"
            )
        if not weight.is_floating_point():
            raise LayerError(
                f"{target.name}: its weight is {weight.dtype}; give a floating-point model, or add the layer to skip"
            )
        by_device.setdefault(weight.device, []).append(target)
    for group in by_device.values():
        finite = to_host(*(torch.isfinite(target.weight).all() for target in group))
        for target, all_finite in zip(group, finite, strict=True):
            if not all_finite:
                raise LayerError(
                    f"{target.name}: its weight holds NaN or inf; repair the checkpoint, or add the layer to skip"
                )
