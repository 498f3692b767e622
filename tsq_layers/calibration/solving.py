"""From statistics to solved layers: same-input layers as one stack, and what it says of each."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tsq_layers.calibration.targets import Solved, Target
from tsq_layers.config import QuantConfig
from tsq_layers.errors import FewTokensWarning, ScaleRangeWarning
from tsq_layers.layers.offloading import present
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.sync import to_host
from tsq_layers.numerics.weight import QuantizedWeight, out_of_range, stacked
from tsq_layers.reports import LayerReport
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.solver import SolverResult, TwoStageGroupQuantizer, selection
from tsq_layers.solver.basis_change import change_basis

TOKENS_PER_COLUMN = (
    16  # fewer tokens than this many times K: H is noisy, and refinement fits the noise
)


@dataclass(frozen=True)
class Shortfall:
    """A layer that is solved with statistics that are not its own.

    Attributes:
        tokens: how many it saw itself.
        reason: for the report.
    """

    tokens: int
    reason: str


@torch.inference_mode(False)
@torch.no_grad()
def solve(
    targets: Sequence[Target],
    statistics: LayerStatistics | None,
    held_out: LayerStatistics | None = None,
    shortfall: Shortfall | None = None,
    validation: LayerStatistics | None = None,
) -> dict[str, Solved]:
    """Quantise layers that share their input.

    Layers with equal configurations are stacked and solved in one run: they share H, and rows are
    independent. What is stored are no inference tensors, whatever mode the caller is in.

    Args:
        targets: the layers.
        statistics: of their common input; ``None`` where no method needs any.
        held_out: statistics of tokens that are not fitted, for reporting only.
        shortfall: what is the matter, if these are not the statistics that were asked for.
        validation: statistics of other tokens, on which what the configuration leaves open is chosen; then
            they are fitted too.
    """
    layers_by_name: dict[str, Solved] = {}
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(present(target.module))
        for layers in stacks(targets):
            layers_by_name |= _solve_stack(layers, statistics, held_out, shortfall, validation)
    return {target.name: layers_by_name[target.name] for target in targets}


def stacks(targets: Sequence[Target]) -> list[list[Target]]:
    """Sort layers that share their input into those that are solved as one matrix."""
    groups: list[list[Target]] = []
    for target in targets:
        for group in groups:
            if _may_stack(target, group[0]):
                group.append(target)
                break
        else:
            groups.append([target])
    return groups


def _may_stack(target: Target, other: Target) -> bool:
    """Return whether each of two layers is solved in a stack as it is by itself."""
    if target.format.has_outliers:
        return False  # outliers are chosen over a whole layer, not row by row
    return target.config == other.config and (target.given is None) == (other.given is None)


def _solve_stack(
    targets: Sequence[Target],
    statistics: LayerStatistics | None,
    held_out: LayerStatistics | None,
    shortfall: Shortfall | None,
    validation: LayerStatistics | None,
) -> dict[str, Solved]:
    """Solve layers of equal configuration as one matrix; arguments are those of :func:`solve`."""
    first, config = targets[0], targets[0].config
    name = ", ".join(target.name for target in targets)
    weight = _stacked_weight(targets)
    has_inputs = first.kind.inputs is not None
    if not has_inputs:
        statistics, held_out, validation = _no_information(weight), None, None
    counts = [sums.count for sums in (statistics, validation) if sums is not None]
    if statistics is None or not config.needs_calibration:
        statistics, held_out, validation = None, None, None

    basis = None
    if has_inputs:
        problem = change_basis(weight, statistics, held_out, config, validation)
        if problem is not None:
            weight, basis = problem.weight, problem.basis
            statistics, held_out = problem.statistics, problem.held_out
            validation = problem.validation
    if statistics is not None:
        config = selection.settle(config, weight, statistics, validation, name)
        if validation is not None:
            # What was held out to choose options is fitted too, once they are chosen.
            statistics = statistics + validation

    start = _stacked_start(targets, weight.device)
    result = TwoStageGroupQuantizer(weight, statistics, config, name=name).run(held_out, start)
    if basis is not None:
        in_basis = dataclasses.replace(result.weight, basis=basis)
        result = dataclasses.replace(result, weight=in_basis)
    lost_rows = out_of_range(result.weight, weight)
    # Counts are read last: reading them waits until the device has solved the layers.
    tokens = int(sum(to_host(*counts))) if has_inputs and counts else None
    return _split(targets, result, tokens, shortfall, config, lost_rows)


def _stacked_weight(targets: Sequence[Target]) -> Tensor:
    """Return the weights of layers on top of each other, float32; that of one layer as it is."""
    weights = [target.weight for target in targets]
    if len(weights) == 1:
        return weights[0]
    return torch.cat([weight.to(torch.float32) for weight in weights])


def _stacked_start(targets: Sequence[Target], device: torch.device) -> QuantizedWeight | None:
    """Return the codes and grids that the layers start from; ``None`` if they start from nothing."""
    weights = [target.given for target in targets if target.given is not None]
    return stacked(weights).to(device) if weights else None


def _no_information(weight: Tensor) -> LayerStatistics:
    """H = I: every column matters alike."""
    return LayerStatistics(
        torch.eye(weight.shape[1], device=weight.device),
        torch.ones((), dtype=torch.int64, device=weight.device),
    )


def warn_few_tokens(solved: Mapping[str, Solved]) -> None:
    """One warning for all layers that saw too few tokens, naming the worst; one for experts that share statistics."""
    reports = [layer.report for layer in solved.values()]
    few = [
        (entry.name, entry.tokens, entry.columns)
        for entry in reports
        if entry.status == "quantized"
        and entry.tokens
        and entry.tokens < TOKENS_PER_COLUMN * entry.columns
    ]
    if few:
        name, tokens, columns = max(few, key=lambda entry: entry[2] / entry[1])
        warnings.warn(
            f"{len(few)} layers saw fewer than {TOKENS_PER_COLUMN} tokens for each of their input "
            f"columns; the worst is {name or '(model)'}: "
            f"{tokens} tokens, {columns} columns, {TOKENS_PER_COLUMN * columns} tokens wanted; "
            "calibrate with more data",
            FewTokensWarning,
            stacklevel=3,
        )
    experts = [entry.name for entry in reports if entry.status == "fallback"]
    if experts:
        examples = ", ".join(experts[:5]) + (", …" if len(experts) > 5 else "")
        warnings.warn(
            f"{len(experts)} layers of experts saw too few tokens and were solved with statistics "
            f"of all experts: {examples}; "
            "calibrate with more data, or see min_expert_tokens",
            FewTokensWarning,
            stacklevel=3,
        )


def _split(
    stack: Sequence[Target],
    result: SolverResult,
    tokens: int | None,
    shortfall: Shortfall | None,
    settled: QuantConfig,
    lost_rows: Tensor,
) -> dict[str, Solved]:
    """Cut the result of a stack into its layers, and say of each what was done.

    Args:
        stack: the layers.
        result: of all their rows.
        tokens: that were fitted; ``None`` if none were.
        shortfall: see :func:`solve`.
        settled: the configuration that was solved, with no option left to choose.
        lost_rows: bool (N,), rows with scales that their dtype cannot hold.
    """
    rows = [target.shape[0] for target in stack]
    losses, layers_lost = _relative_losses(result, lost_rows, rows)
    _warn_of_range(stack, layers_lost)
    layers: dict[str, Solved] = {}
    for index, (target, weight) in enumerate(zip(stack, result.weight.split(rows), strict=True)):
        matrix = QuantLinear.from_quantized(
            weight,
            dtype=target.weight.dtype,
            activation_bits=target.format.activation_bits,
        )
        strength = ridge = None
        if target.uses_deviation:
            _, strength, ridge = settled.settled()
        report = dataclasses.replace(
            _entry(target),
            tokens=tokens,
            damping=result.damping,
            deviation_strength=strength,
            deviation_damping=ridge,
            seconds=_share(result, rows, index),
            bits_per_weight=matrix.bits_per_weight,
            shared_with=tuple(other.name for other in stack if other is not target),
            **cast("dict[str, Any]", losses[index]),
        )
        if shortfall is not None:
            report = dataclasses.replace(
                report, status="fallback", reason=shortfall.reason, tokens=shortfall.tokens
            )
        layers[target.name] = Solved(matrix, report)
    return layers


def _relative_losses(
    result: SolverResult, lost_rows: Tensor, rows: list[int]
) -> tuple[list[dict[str, dict[str, float]]], list[float]]:
    """Return losses of each layer relative to its outputs' energy, and its number of lost rows.

    Everything is read from the device with one copy.

    Args:
        result: of the stack.
        lost_rows: bool (N,).
        rows: of each layer.

    Returns:
        for each layer, field of the report → step → loss; and for each layer, the lost rows.
    """
    fields = {
        "losses": (result.losses, result.signal),
        "held_out_losses": (result.held_out_losses, result.held_out_signal),
        "objective": (result.objective, result.signal),
    }
    row_values: dict[tuple[str, str], Tensor] = {}
    for field, (steps, energy) in fields.items():
        for step, values in steps.items():
            row_values[field, step] = values
        if energy is not None:
            row_values[field, "energy"] = energy
    row_values["lost", "rows"] = lost_rows
    sums = dict(zip(row_values, _sums(list(row_values.values()), rows), strict=True))
    layers: list[dict[str, dict[str, float]]] = []
    for index in range(len(rows)):
        layer: dict[str, dict[str, float]] = {}
        for field, (steps, _) in fields.items():
            layer[field] = {}
            for step in steps:
                whole = sums[field, "energy"][index]
                layer[field][step] = sums[field, step][index] / whole if whole > 0 else 0.0
        layers.append(layer)
    return layers, sums["lost", "rows"]


def _entry(target: Target) -> LayerReport:
    rows, columns = target.shape
    config = target.config
    return LayerReport(
        name=target.name,
        kind=target.kind.name,
        rows=rows,
        columns=columns,
        status="quantized",
        method=config.method,
        bits=config.bits,
        group_size=min(config.group_size or columns, columns),
        symmetric=config.symmetric,
        deviation=config.option("deviation") if target.uses_deviation else "none",
    )


def _share(result: SolverResult, rows: list[int], index: int) -> dict[str, float]:
    """A layer's part of the stack's time, by rows."""
    return {step: seconds * rows[index] / sum(rows) for step, seconds in result.seconds.items()}


def _warn_of_range(stack: Sequence[Target], lost: Sequence[float]) -> None:
    names = [
        f"{target.name} ({int(rows)} of {target.shape[0]} rows)"
        for target, rows in zip(stack, lost, strict=True)
        if rows
    ]
    if names:
        dtype = stack[0].config.scale_dtype
        other = "float32" if dtype == "bfloat16" else "bfloat16' or 'float32"
        warnings.warn(
            f"scale_dtype={dtype!r} cannot hold the scales of {', '.join(names)}, whose weights "
            f"are too large or too small for it; set scale_dtype='{other}'",
            ScaleRangeWarning,
            stacklevel=3,
        )


def _sums(values: list[Tensor], rows: list[int]) -> list[list[float]]:
    """Sums of row values (N,) over each layer of the stack, all read with one copy."""
    if not values:
        return []
    flat = to_host(*(part.sum() for value in values for part in torch.split(value, rows)))
    return [flat[start : start + len(rows)] for start in range(0, len(flat), len(rows))]
