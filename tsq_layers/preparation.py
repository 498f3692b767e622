"""What `prepare` leaves on a model: which layers are to be quantised, and their observers."""

import functools
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tsq_layers.config import QuantConfig, explicit_patterns
from tsq_layers.coverage import Ownership, is_matrix, ownership
from tsq_layers.errors import ConfigError, LayerError, SkippedLayerWarning, StateError, UnmatchedPatternWarning
from tsq_layers.guidance import groups_of
from tsq_layers.layers import (
    LayerKind,
    composite_behind,
    composite_of,
    kind_of,
    packed,
    replace,
    rows_of,
    split_of,
    unsupported,
    why_not,
)
from tsq_layers.layers.offloading import is_offloaded, present
from tsq_layers.layers.pools import Pool, expert_pool
from tsq_layers.linear import QuantLinear
from tsq_layers.observer import HessianObserver
from tsq_layers.patterns import matches
from tsq_layers.rebasing import rounded_rows
from tsq_layers.report import LayerReport, memory_extent
from tsq_layers.sync import to_host

_ATTRIBUTE = "_tsq_preparation"


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that is to be quantised.

    Attributes:
        name: dotted name in the model, composites split.
        module: the layer.
        kind: how it shows itself.
        config: what to do with it, overrides applied.
        shape: (N, K) of its matrix.
        tied: names of other layers whose weight is the very same parameter.
        pool: its place among its fellow experts; ``None`` for other layers.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    config: QuantConfig
    shape: tuple[int, int]
    tied: tuple[str, ...] = ()
    pool: Pool | None = None

    @property
    def weight(self) -> Tensor:
        """The full-precision weight matrix (N, K); on the meta device if it is offloaded."""
        return self.kind.weight(self.module)

    @property
    def blocks(self) -> int:
        """Blocks of rows that have inputs of their own."""
        return self.kind.blocks(self.module)

    @property
    def observed(self) -> bool:
        """Whether statistics of the layer's inputs are needed."""
        return self.config.needs_calibration and self.kind.inputs is not None

    @property
    def uses_deviation(self) -> bool:
        """Whether R is used. Not for experts: the two streams route tokens differently."""
        return self.observed and self.config.uses_deviation and self.pool is None

    def rows(self, x: Tensor) -> Tensor:
        """The inputs of a call as rows (…, K), or (T, B, K)."""
        assert self.kind.inputs is not None
        return self.kind.inputs(self.module, x)

    @property
    def guidance(self) -> int:
        """Groups of output channels with Hessians of their own; 0 without guidance.

        Only layers that are called once for each token, with an output (…, N), are guided.
        """
        plain = self.kind.inputs is rows_of and self.pool is None and not self.tied
        return groups_of(self.shape[0], self.config.guidance) if plain and self.config.guidance else 0

    @property
    def additions(self) -> dict[str, Any]:
        """What its packed matrix has beside codes, scales and zero points, by the names of ``QuantLinear``."""
        config, (rows, columns) = self.config, self.shape
        found: dict[str, Any] = {"offsets": config.has_offsets, "tables": config.tables}
        if config.method == "quantease" and config.outlier_columns:
            found["outlier_columns"] = min(config.outlier_columns, columns)
        elif config.method == "quantease" and config.outliers:
            found["outliers"] = max(1, round(config.outliers * rows * columns))
        if self.kind.inputs is None:
            return found
        basis = {"rotation": config.rotation, "channel_scaling": config.channel_scaling}
        return found | basis | {"activation_bits": config.activation_bits}

    def rounded(self, rows: Tensor) -> Tensor:
        """Rows of inputs as the layer will see them: what 8 bits leave of them, if ``activation_bits`` says so.

        They are rounded in the rotated basis, where the quantised layer will round them, in at least float32.
        Column scales are chosen only when the layer is solved. Until then they are taken to be 1: the error that
        the statistics contain is that of inputs which are rotated but not scaled, usually the larger one.
        """
        if self.config.activation_bits is None or self.kind.inputs is None:
            return rows
        return rounded_rows(rows, self.config.rotation)

    def observer(self, *, guided: bool = False) -> HessianObserver:
        """An empty observer of the layer's inputs."""
        return HessianObserver(self.shape[1], blocks=self.guidance or self.blocks if guided else self.blocks)


@dataclass(frozen=True, eq=False)
class Solved:
    """A layer that was quantised, not yet swapped in: its packed matrix, without bias."""

    matrix: QuantLinear
    report: LayerReport


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
    target: Target, observer: HessianObserver, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    # The layers have one argument, by position or by name.
    observer(module, (target.rounded(target.rows((args or tuple(kwargs.values()))[0])),))


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
    if any(packed(model)):
        raise StateError(
            "the model is already converted: it holds QuantLinear layers; start from the full-precision model"
        )
    modules, splits = _split(model)
    parameters = ownership(model, modules)  # before any offloaded weight is brought, and is another object from then on
    candidates = {
        name: kind
        for name, module in modules.items()
        if (kind := kind_of(module)) is not None and kind.weight(module).numel()
    }
    reasons, tied = _reasons_to_skip(modules, candidates, config)
    targets: dict[str, Target] = {}
    left_alone: list[LayerReport] = []
    for name, kind in candidates.items():
        module = modules[name]
        rows, columns = kind.weight(module).shape
        if name in tied:
            pass  # quantised as part of another layer, or named with it
        elif name in reasons:
            entry = LayerReport(name=name, kind=kind.name, rows=rows, columns=columns, status="skipped", reason=reasons[name])  # fmt: skip
            left_alone.append(entry)
        else:
            partners = tuple(other for other, first in tied.items() if first == name)
            targets[name] = Target(
                name, module, kind, config.for_layer(name), (rows, columns), partners, expert_pool(name, modules)
            )
    left_alone += _not_supported(modules)
    _warn_unmatched(config, list(candidates))
    if not targets:
        raise ConfigError(
            f"nothing to quantise: {type(model).__name__} has no layer of a known kind that skip={config.skip!r} leaves; change skip"
        )
    _check_weights(targets)
    _check_inputs(targets)
    chosen = {target.module for target in targets.values()}
    used = {original: split for original, split in splits.items() if _is_used(split, chosen)}
    if model in used:
        raise LayerError(
            f"the model is itself a {type(model).__name__}, whose parts cannot be replaced in place; wrap it, for example in nn.Sequential(model)"
        )
    return Preparation(config, modules, targets, left_alone, used, parameters)


def store(model: nn.Module, preparation: Preparation) -> None:
    """Leave ``preparation`` on the model, with its composites split."""
    replace(model, preparation.splits)
    vars(model)[_ATTRIBUTE] = preparation  # not by setattr: a compiled model would pass it on to the one inside


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
    preparation = fetch(model, "unprepare")
    preparation.detach()
    replace(model, _originals(preparation.splits))
    del vars(model)[_ATTRIBUTE]


def finish(model: nn.Module, converted: Collection[nn.Module]) -> None:
    """Forget the preparation before conversion; composites in which nothing was converted are put back."""
    preparation = fetch(model, "convert")
    preparation.detach()
    unused = {original: split for original, split in preparation.splits.items() if not _is_used(split, converted)}
    replace(model, _originals(unused))
    del vars(model)[_ATTRIBUTE]


def _originals(splits: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, nn.Module]:
    """Split module → its original, which takes over a change of device or dtype that it has missed."""
    for original, split in splits.items():
        old, new = next(original.parameters()), next(split.parameters())
        if (old.device, old.dtype) != (new.device, new.dtype):
            original.to(device=new.device, dtype=new.dtype)
    return {split: original for original, split in splits.items()}


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


def _is_used(split: nn.Module, layers: Collection[nn.Module]) -> bool:
    """Whether a split module must stay in the place of its original, given the layers that are quantised."""
    composite = composite_behind(split)
    return (composite is not None and composite.always) or any(module in layers for module in split.modules())


def _reasons_to_skip(
    modules: Mapping[str, nn.Module], candidates: Mapping[str, LayerKind], config: QuantConfig
) -> tuple[dict[str, str], dict[str, str]]:
    """Why layers are left alone, and which layers share the weight of another one and go with it."""
    reasons = {
        name: reason for name, kind in candidates.items() if (reason := _own_reason(name, kind, modules, config))
    }
    holders: dict[object, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for local, parameter in module.named_parameters(recurse=False):
            if is_matrix(local, parameter):
                holders[memory_extent(parameter)].append(name)
    tied: dict[str, str] = {}
    for names in holders.values():
        if len(names) < 2 or not any(name in candidates for name in names):
            continue
        first, problem = _one_weight(names, modules, candidates, reasons)
        if not problem:
            tied |= {name: first for name in names if name != first}
            continue
        left = [name for name in names if name in candidates and name not in reasons]
        reasons |= dict.fromkeys(left, problem)
        if left:
            warnings.warn(
                f"{', '.join(left)} stays in full precision: {problem}; add it to skip to say that this is intended",
                SkippedLayerWarning,
                stacklevel=5,
            )
    return reasons, tied


def _own_reason(name: str, kind: LayerKind, modules: Mapping[str, nn.Module], config: QuantConfig) -> str | None:
    if config.skips(name):
        return "skip in the configuration"
    if kind.inputs is None and not config.embeddings:
        return "embeddings=False in the configuration"
    parts = name.split(".")
    for end in range(len(parts)):
        parent = modules.get(".".join(parts[:end]))
        if parent is not None and "base_layer" in parent._modules and parts[end] != "base_layer":
            return f"part of an adapter on {'.'.join([*parts[:end], 'base_layer'])}"
    return None


def _one_weight(
    names: list[str],
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, LayerKind],
    reasons: Mapping[str, str],
) -> tuple[str, str]:
    """The layer that stands for all that hold one parameter, or why there is none."""
    others = [name for name in names if name not in candidates]
    if others:
        return "", f"its weight is tied to {others[0] or 'the model itself'}, a {type(modules[others[0]]).__name__}"
    skipped = [name for name in names if name in reasons]
    if skipped:
        return "", f"its weight is tied to {skipped[0]}, which stays ({reasons[skipped[0]]})"
    matrices = [candidates[name].weight(modules[name]) for name in names]
    if any(matrix.shape != matrices[0].shape or matrix.stride() != matrices[0].stride() for matrix in matrices):
        return "", f"its weight is tied to {names[0]}, which uses it in another way"
    multiplied = [name for name in names if candidates[name].inputs is not None]
    if len(multiplied) > 1 and any(getattr(modules[name], "bias", None) is not None for name in multiplied):
        return "", f"the weight of {' and '.join(multiplied)} is tied, their biases are not"
    return next((name for name in names if candidates[name].inputs is not None), names[0]), ""


def _not_supported(modules: Mapping[str, nn.Module]) -> Iterator[LayerReport]:
    for name, module in unsupported(iter(modules.items())):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if is_matrix(parameter_name, parameter):
                yield LayerReport(
                    name=f"{name}.{parameter_name}".lstrip("."),
                    kind=type(module).__name__,
                    rows=parameter.shape[0],
                    columns=parameter[0].numel(),
                    status="not supported",
                    reason=why_not(module),
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


def _check_inputs(targets: Mapping[str, Target]) -> None:
    """Inputs can be rounded where the layer is given rows, not where it makes them, as a convolution does its patches."""
    for name, target in targets.items():
        inputs = target.kind.inputs
        if target.config.activation_bits is not None and inputs is not None and inputs is not rows_of:
            raise LayerError(
                f"{name}: inputs of a {target.kind.name} cannot be rounded to {target.config.activation_bits} bits by token; "
                f"give it overrides={{{name!r}: {{'activation_bits': None}}}}, or add it to skip"
            )


def _check_weights(targets: dict[str, Target]) -> None:
    """No meta tensors, no NaN or inf; one device-to-host copy for each device."""
    finite: dict[torch.device, list[tuple[Target, Tensor]]] = defaultdict(list)
    for target in targets.values():
        weight = target.weight
        if not weight.is_floating_point():
            raise LayerError(
                f"{target.name}: its weight is {weight.dtype}; give a floating-point model, or add the layer to skip"
            )
        if weight.is_meta and not is_offloaded(target.module):
            raise LayerError(
                f"{target.name}: its weight is on the meta device and has no values; load the weights first"
            )
        with present(target.module):
            weight = target.weight
            finite[weight.device].append((target, torch.isfinite(weight).all()))
    for group in finite.values():
        for (target, _), all_finite in zip(group, to_host(*(flag for _, flag in group)), strict=True):
            if not all_finite:
                raise LayerError(
                    f"{target.name}: its weight holds NaN or inf; repair the checkpoint, or add the layer to skip"
                )
