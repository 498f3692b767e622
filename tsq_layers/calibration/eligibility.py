"""Decide which layers of a model can be quantised, and name the reason for the others."""

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tsq_layers.calibration.coverage import is_matrix
from tsq_layers.calibration.targets import Target
from tsq_layers.config.patterns import matches
from tsq_layers.config.quant_config import QuantConfig, explicit_patterns
from tsq_layers.errors import (
    LayerError,
    LostZerosWarning,
    SkippedLayerWarning,
    UnmatchedPatternWarning,
)
from tsq_layers.layers import LayerKind, rows_of, unsupported, why_not
from tsq_layers.layers.offloading import is_offloaded, present
from tsq_layers.numerics.memory import memory_extent
from tsq_layers.numerics.sync import to_host
from tsq_layers.reports import LayerReport

_DENSE = 0.95  # share of weights that are not zero, of a layer that was not pruned


def reasons_to_skip(
    modules: Mapping[str, nn.Module], candidates: Mapping[str, LayerKind], config: QuantConfig
) -> tuple[dict[str, str], dict[str, str]]:
    """Return why layers are left alone, and the layers that share the weight of another one."""
    reasons: dict[str, str] = {}
    for name, kind in candidates.items():
        reason = _own_reason(name, kind, modules, config)
        if reason:
            reasons[name] = reason
    tied: dict[str, str] = {}
    for names in _holders(modules):
        if len(names) < 2 or not any(name in candidates for name in names):
            continue
        first, problem = _one_weight(names, modules, candidates, reasons)
        if not problem:
            tied |= {name: first for name in names if name != first}
            continue
        partners = [name for name in names if name in candidates and name not in reasons]
        reasons |= dict.fromkeys(partners, problem)
        if partners:
            warnings.warn(
                f"{', '.join(partners)} stays in full precision: {problem}; add it to skip to say "
                "that this is intended",
                SkippedLayerWarning,
                stacklevel=5,
            )
    return reasons, tied


def _holders(modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return, for every matrix among the parameters, the names of the modules that hold it."""
    holders: dict[object, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if is_matrix(parameter_name, parameter):
                holders[memory_extent(parameter)].append(name)
    return list(holders.values())


def _own_reason(
    name: str, kind: LayerKind, modules: Mapping[str, nn.Module], config: QuantConfig
) -> str | None:
    if config.skips(name):
        return "skip in the configuration"
    if kind.inputs is None and not config.embeddings:
        return "embeddings=False in the configuration"
    weight = kind.weight(modules[name])
    if is_traceable_wrapper_subclass(weight):
        return (
            f"its weight is of type {type(weight).__name__}, no plain tensor: another library has "
            "quantised or sharded it"
        )
    parts = name.split(".")
    for end in range(len(parts)):
        parent = modules.get(".".join(parts[:end]))
        if (
            parent is not None
            and "base_layer" in parent._modules
            and _is_adapter(parent, parts[end])
        ):
            return f"part of an adapter on {'.'.join([*parts[:end], 'base_layer'])}"
    return None


def _is_adapter(parent: nn.Module, child: str) -> bool:
    """Return whether a child stands beside ``base_layer`` as what PEFT trains.

    A network's own layers may be called that, too.
    """
    return child.startswith("lora_") or child in getattr(parent, "adapter_layer_names", ())


def _one_weight(
    names: list[str],
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, LayerKind],
    reasons: Mapping[str, str],
) -> tuple[str, str]:
    """Choose the layer that stands for all modules that hold one parameter.

    Returns:
        its name, and an empty text; or an empty name, and why there is none.
    """
    others = [name for name in names if name not in candidates]
    if others:
        kind = type(modules[others[0]]).__name__
        return "", f"its weight is tied to {others[0] or 'the model itself'}, a {kind}"
    skipped = [name for name in names if name in reasons]
    if skipped:
        return "", f"its weight is tied to {skipped[0]}, which stays ({reasons[skipped[0]]})"
    first = candidates[names[0]].weight(modules[names[0]])
    for name in names:
        matrix = candidates[name].weight(modules[name])
        if matrix.shape != first.shape or matrix.stride() != first.stride():
            return "", f"its weight is tied to {names[0]}, which uses it in another way"
    # A table of an embedding has no inputs to learn from: a layer that multiplies stands for it.
    multiplying = [name for name in names if candidates[name].inputs is not None]
    biases = [getattr(modules[name], "bias", None) for name in multiplying]
    if len(multiplying) > 1 and any(bias is not None for bias in biases):
        return "", f"the weight of {' and '.join(multiplying)} is tied, their biases are not"
    return (multiplying or names)[0], ""


def not_supported(modules: Mapping[str, nn.Module]) -> Iterator[LayerReport]:
    """An entry for every matrix in a module of no known kind."""
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


def warn_unmatched(config: QuantConfig, names: list[str]) -> None:
    """Warn of every pattern of the user that matches no layer."""
    for pattern in explicit_patterns(config):
        if not any(matches(pattern, name) for name in names):
            examples = ", ".join(repr(name) for name in names[:3])
            warnings.warn(
                f"pattern {pattern!r} matches none of the {len(names)} layers ({examples}, …); correct or remove it",
                UnmatchedPatternWarning,
                stacklevel=4,
            )


def check_inputs(targets: Mapping[str, Target]) -> None:
    """Inputs can be rounded where the layer is given rows, not where it makes them, as a convolution does its patches.

    Raises:
        LayerError: a layer that makes its rows is to have rounded inputs.
    """
    wrong = [
        target
        for target in targets.values()
        if target.config.activation_bits is not None and target.kind.inputs not in (None, rows_of)
    ]
    if wrong:
        first, others = wrong[0], [target.name for target in wrong[1:]]
        raise LayerError(
            f"{first.name}: inputs of a {first.kind.name} cannot be rounded to "
            f"{first.config.activation_bits} bits by token; "
            f"give it overrides={{{first.name!r}: {{'activation_bits': None}}}}, or add it to skip"
            + (f"; and so for {len(others)} more: {', '.join(others)}" if others else "")
        )


def check_weights(targets: Mapping[str, Target]) -> set[str]:
    """No meta tensors, no NaN or inf; one device-to-host copy for each device.

    Returns:
        the layers with so many weights of exactly zero that they must have been pruned.

    Raises:
        LayerError: a weight that is not floating point, has no values, or holds NaN or inf.
    """
    checks: dict[torch.device, list[tuple[Target, Tensor, Tensor]]] = defaultdict(list)
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
            checks[weight.device].append(
                (target, torch.isfinite(weight).all(), weight.count_nonzero() / weight.numel())
            )
    pruned: set[str] = set()
    for group in checks.values():
        values = to_host(*(flag for _, flag, _ in group), *(share for _, _, share in group))
        for (target, _, _), all_finite, share in zip(
            group, values, values[len(group) :], strict=False
        ):
            if not all_finite:
                raise LayerError(
                    f"{target.name}: its weight holds NaN or inf; repair the checkpoint, or add the layer to skip"
                )
            if share < _DENSE:
                pruned.add(target.name)
    return pruned


def warn_lost_zeros(targets: Mapping[str, Target], pruned: Collection[str]) -> None:
    """Warn of pruned layers whose zeros will be filled."""
    names = [
        name for name in targets if name in pruned and targets[name].config.keep_zeros is not False
    ]
    names = [name for name in names if not targets[name].config.holds_zero]
    if names:
        warnings.warn(
            f"{len(names)} layers look pruned, {names[0]} first, and their zeros will be filled: a "
            "rotation, float zero points or tables "
            "cannot hold them; leave these out, or set keep_zeros=False to say that this is intended",
            LostZerosWarning,
            stacklevel=5,
        )
