"""Prepare a model: find its target layers, and keep them with their observers until `convert`."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tsq_layers.calibration.coverage import Ownership, ownership
from tsq_layers.calibration.eligibility import (
    check_inputs,
    check_weights,
    not_supported,
    reasons_to_skip,
    warn_lost_zeros,
    warn_unmatched,
)
from tsq_layers.calibration.guidance import Watched
from tsq_layers.calibration.targets import Solved, Target
from tsq_layers.config import QuantConfig
from tsq_layers.errors import ConfigError, LayerError, StateError
from tsq_layers.layers import LayerKind, composite_of, kind_of, packed, replace, split_of
from tsq_layers.layers.composites import take_over_mode
from tsq_layers.layers.pools import expert_pool
from tsq_layers.observer import HessianObserver
from tsq_layers.reports import LayerReport

_ATTRIBUTE = "_tsq_preparation"


@dataclass(eq=False)
class Preparation:
    """The state between ``prepare`` and ``convert``; lives on the model, outside its state_dict.

    Attributes:
        config: what was asked for.
        modules: name → module of the model, composites split.
        targets: the layers that are to be quantised.
        left_alone: those that are not, with the reason.
        splits: original → split module, for every composite with a target inside.
        parameters: of the float model, each once, with the layers that they belong to.
        observers: of the targets, by name.
        solved: what :func:`tsq_layers.calibrate` found.
        distances: of the two models' outputs, for each epoch of distillation.
    """

    config: QuantConfig
    modules: dict[str, nn.Module]
    targets: dict[str, Target]
    left_alone: list[LayerReport]
    splits: dict[nn.Module, nn.Module]
    parameters: tuple[Ownership, ...]
    observers: dict[str, HessianObserver] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    solved: dict[str, Solved] | None = None
    paired: bool = False
    seconds: float = 0.0
    distances: tuple[float, ...] = ()

    def attach(self) -> None:
        """Hook the observers to their layers, and to those that share their weight."""
        for name, observer in self.observers.items():
            target = self.targets[name]
            for module in (target.module, *map(self.modules.__getitem__, target.tied)):
                if kind_of(module) is target.kind:
                    hook = functools.partial(_observe_call, target, observer)
                    self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Take the observers off their layers; what they saw stays."""
        while self.handles:
            self.handles.pop().remove()


def _observe_call(
    target: Target,
    observer: HessianObserver,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    # The layers have one argument, by position or by name.
    observer(module, (target.rounded(target.rows((args or tuple(kwargs.values()))[0])),))


def inspect(
    model: nn.Module, config: QuantConfig, only: Collection[str] | None = None
) -> Preparation:
    """Sort the layers of a model into targets and those that stay. Nothing is attached.

    Args:
        model: a float model.
        config: what is done with each layer.
        only: names of the layers that are looked at; ``None`` is all.

    Raises:
        StateError, ConfigError, LayerError: as ``prepare`` says.
    """
    _check_state(model, config)
    modules, splits = _split(model)
    # Before any offloaded weight is brought: from then on it is another object.
    parameters = ownership(model, modules)
    candidates = _candidates(modules, only)
    reasons, tied = reasons_to_skip(modules, candidates, config)
    targets: dict[str, Target] = {}
    left_alone: list[LayerReport] = []
    for name, kind in candidates.items():
        if name in tied:
            continue  # it is quantised as part of another layer, or named with it
        if name in reasons:
            left_alone.append(_skipped(name, kind, modules[name], reasons[name]))
            continue
        partners = tuple(other for other, first in tied.items() if first == name)
        rows, columns = kind.weight(modules[name]).shape
        targets[name] = Target(
            name,
            modules[name],
            kind,
            config.for_layer(name),
            (rows, columns),
            partners,
            expert_pool(name, modules),
        )
    left_alone += not_supported(modules)
    warn_unmatched(config, list(candidates))
    if not targets:
        raise ConfigError(
            f"nothing to quantise: {type(model).__name__} has no layer of a known kind that "
            f"skip={config.skip!r} leaves; change skip"
        )
    targets = _keeping_zeros(targets, check_weights(targets))
    check_inputs(targets)
    used_splits = _used_splits(model, splits, targets)
    return Preparation(config, modules, targets, left_alone, used_splits, parameters)


def _check_state(model: nn.Module, config: QuantConfig) -> None:
    """Refuse what is no float model, or no configuration."""
    if not isinstance(model, nn.Module):
        raise StateError(f"the model is a {type(model).__name__}; give an nn.Module")
    if not isinstance(config, QuantConfig):
        raise ConfigError(f"config is a {type(config).__name__}; give a QuantConfig")
    if is_prepared(model):
        raise StateError(
            "the model is already prepared; call convert(model), or unprepare(model) to start again"
        )
    if any(packed(model)):
        raise StateError(
            "the model is already converted: it holds QuantLinear layers; start from the "
            "full-precision model"
        )


def _candidates(
    modules: Mapping[str, nn.Module], only: Collection[str] | None
) -> dict[str, LayerKind]:
    """Return the kind of every layer that could be quantised, by name."""
    candidates: dict[str, LayerKind] = {}
    for name, module in modules.items():
        if only is not None and name not in only:
            continue
        kind = kind_of(module)
        if kind is not None and kind.weight(module).numel():
            candidates[name] = kind
    return candidates


def _skipped(name: str, kind: LayerKind, module: nn.Module, reason: str) -> LayerReport:
    """Return the report of a layer that stays as it is."""
    rows, columns = kind.weight(module).shape
    return LayerReport(
        name=name, kind=kind.name, rows=rows, columns=columns, status="skipped", reason=reason
    )


def _used_splits(
    model: nn.Module, splits: Mapping[nn.Module, nn.Module], targets: Mapping[str, Target]
) -> dict[nn.Module, nn.Module]:
    """Return the composites of which a part is a target layer: original → split module."""
    target_modules = {target.module for target in targets.values()}
    used: dict[nn.Module, nn.Module] = {}
    for original, split in splits.items():
        if _is_used(original, split, target_modules):
            used[original] = split
    if model in used:
        raise LayerError(
            f"the model is itself a {type(model).__name__}, whose parts cannot be replaced in "
            "place; wrap it, for example in nn.Sequential(model)"
        )
    return used


def store(model: nn.Module, preparation: Preparation) -> None:
    """Leave ``preparation`` on the model, with its composites split."""
    replace(model, preparation.splits)
    # Not by setattr: a compiled model would pass it on to the one inside.
    vars(model)[_ATTRIBUTE] = preparation


def is_prepared(model: nn.Module) -> bool:
    """Return whether the model is prepared and not yet converted."""
    return _ATTRIBUTE in vars(model)


def fetch(model: nn.Module, verb: str) -> Preparation:
    """Return the preparation that ``prepare`` left on the model.

    Raises:
        StateError: the model was not prepared.
    """
    if not is_prepared(model):
        raise StateError(f"{verb} needs a prepared model; call prepare(model, config) first")
    preparation: Preparation = vars(model)[_ATTRIBUTE]
    return preparation


def remove(model: nn.Module) -> None:
    """Undo :func:`store`, observers included."""
    preparation = fetch(model, "unprepare")
    preparation.detach()
    replace(model, _originals(preparation.splits))
    del vars(model)[_ATTRIBUTE]


def finish(model: nn.Module, preparation: Preparation, converted: Collection[nn.Module]) -> None:
    """Take the preparation off the model, and put composites back of which no part is converted."""
    preparation.detach()
    unused = {
        original: split
        for original, split in preparation.splits.items()
        if not _is_used(original, split, converted)
    }
    replace(model, _originals(unused))
    del vars(model)[_ATTRIBUTE]


def guided_layers(preparation: Preparation) -> dict[str, Watched]:
    """The layers whose tokens are weighted by gradients of the loss."""
    targets = preparation.targets.items()
    return {
        name: Watched(target.module, target.guidance) for name, target in targets if target.guidance
    }


def _originals(splits: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, nn.Module]:
    """Split module → its original, which takes over a change of device, dtype or mode that it has missed."""
    for original, split in splits.items():
        take_over_mode(original, split)
        old, new = next(original.parameters()), next(split.parameters())
        if (old.device, old.dtype) != (new.device, new.dtype):
            original.to(device=new.device, dtype=new.dtype)
    return {split: original for original, split in splits.items()}


def _keeping_zeros(targets: Mapping[str, Target], pruned: Collection[str]) -> dict[str, Target]:
    """The targets with ``keep_zeros`` settled."""
    warn_lost_zeros(targets, pruned)
    settled: dict[str, Target] = {}
    for name, target in targets.items():
        config = target.config
        keep = config.holds_zero and (
            name in pruned if config.keep_zeros is None else config.keep_zeros
        )
        settled[name] = replace_fields(target, config=replace_fields(config, keep_zeros=keep))
    return settled


def _split(model: nn.Module) -> tuple[dict[str, nn.Module], dict[nn.Module, nn.Module]]:
    """All modules by name, with the parts of every composite in the place of it; and the composites."""
    modules: dict[str, nn.Module] = {}
    splits: dict[nn.Module, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        composite = composite_of(module)
        if composite is None or any(parameter.is_meta for parameter in module.parameters()):
            modules[name] = module
            continue
        splits[module] = split = split_of(composite, module)
        modules.update(split.named_modules(prefix=name))
        inside = (*inside, f"{name}." if name else "")
    return modules, splits


def _is_used(original: nn.Module, split: nn.Module, layers: Collection[nn.Module]) -> bool:
    """Return whether a split module must stay in the place of its original."""
    composite = composite_of(original)
    return (composite is not None and composite.always) or any(
        module in layers for module in split.modules()
    )
