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
from tsq_layers.numerics.weight import out_of_range, stacked
from tsq_layers.reports import LayerReport
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.solver import SolverResult, TwoStageGroupQuantizer, selection
from tsq_layers.solver.basis_change import rebase

TOKENS_PER_COLUMN = (
    16  # fewer tokens than this many times K: H is noisy, and refinement fits the noise
)


@dataclass(frozen=True)
class Shortfall:
    """Why a layer is solved with statistics that are not its own.

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
    solved: dict[str, Solved] = {}
    remaining = list(targets)
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(present(target.module))
        while remaining:
            first = remaining[0]
            alike = [
                target for target in remaining if target is first or _rows_may_stack(target, first)
            ]
            remaining = [target for target in remaining if target not in alike]
            solved |= _solve_alike(alike, statistics, held_out, shortfall, validation)
    return {target.name: solved[target.name] for target in targets}


def _rows_may_stack(target: Target, other: Target) -> bool:
    """Whether each layer is solved as by itself. Outliers are those of one layer: they are not chosen row by row."""
    return (
        not target.format.has_outliers
        and target.config == other.config
        and (target.given is None) == (other.given is None)
    )


def _solve_alike(
    targets: Sequence[Target],
    statistics: LayerStatistics | None,
    held_out: LayerStatistics | None,
    shortfall: Shortfall | None,
    validation: LayerStatistics | None,
) -> dict[str, Solved]:
    name, config = ", ".join(target.name for target in targets), targets[0].config
    weights = [target.weight for target in targets]
    weight = (
        torch.cat([part.to(torch.float32) for part in weights]) if len(weights) > 1 else weights[0]
    )
    if targets[0].kind.inputs is None:
        statistics, held_out, validation = _no_information(weight), None, None
    seen = [part.count for part in (statistics, validation) if part is not None]
    needed = statistics if config.needs_calibration else None
    if needed is None:
        held_out = validation = None
    changed = (
        rebase(weight, needed, held_out, config, validation)
        if targets[0].kind.inputs is not None
        else None
    )
    if changed is not None:
        weight, needed, held_out, validation = (
            changed.weight,
            changed.statistics,
            changed.held_out,
            changed.validation,
        )
    if needed is not None:
        config = selection.settle(config, weight, needed, validation, name)
        needed = needed if validation is None else needed + validation
    given = [target.given for target in targets if target.given is not None]
    start = stacked(given).to(weight.device) if given else None
    result = TwoStageGroupQuantizer(weight, needed, config, name=name).run(held_out, start)
    if changed is not None:
        result = dataclasses.replace(
            result, weight=dataclasses.replace(result.weight, basis=changed.basis)
        )
    beyond = out_of_range(result.weight, weight)
    tokens = int(sum(to_host(*seen))) if seen and targets[0].kind.inputs is not None else None
    return _split(targets, result, tokens, shortfall, config, beyond)


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
            f"{len(few)} layers saw fewer than {TOKENS_PER_COLUMN} tokens for each of their input columns; the worst is {name or '(model)'}: "
            f"{tokens} tokens, {columns} columns, {TOKENS_PER_COLUMN * columns} tokens wanted; calibrate with more data",
            FewTokensWarning,
            stacklevel=3,
        )
    shared = [entry.name for entry in reports if entry.status == "fallback"]
    if shared:
        shown = ", ".join(shared[:5]) + (", …" if len(shared) > 5 else "")
        warnings.warn(
            f"{len(shared)} layers of experts saw too few tokens and were solved with statistics of all experts: {shown}; "
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
    beyond: Tensor,
) -> dict[str, Solved]:
    rows = [target.shape[0] for target in stack]
    weights = result.weight.split(rows)
    tables = {
        "losses": result.losses,
        "held_out_losses": result.held_out_losses,
        "objective": result.objective,
    }
    numbers = [
        (table, step, values) for table, steps in tables.items() for step, values in steps.items()
    ]
    known = {
        "losses": result.signal,
        "held_out_losses": result.held_out_signal,
        "objective": result.signal,
    }
    signals = {table: values for table, values in known.items() if values is not None}
    *sums, lost = _sums([*(values for _, _, values in numbers), *signals.values(), beyond], rows)
    signal = dict(zip(signals, sums[len(numbers) :], strict=True))
    _warn_of_range(stack, lost)
    solved: dict[str, Solved] = {}
    for index, (target, weight) in enumerate(zip(stack, weights, strict=True)):
        found: dict[str, dict[str, float]] = {
            table: {} for table in tables
        }  # what each step did to this layer
        for (table, step, _), layer_sums in zip(numbers, sums[: len(numbers)], strict=True):
            found[table][step] = (
                layer_sums[index] / signal[table][index] if signal[table][index] > 0 else 0.0
            )
        _, strength, ridge = settled.settled() if target.uses_deviation else (None, None, None)
        report = dataclasses.replace(
            _entry(target),
            status="quantized" if shortfall is None else "fallback",
            reason="" if shortfall is None else shortfall.reason,
            tokens=tokens if shortfall is None else shortfall.tokens,
            damping=result.damping,
            deviation_strength=strength,
            deviation_damping=ridge,
            seconds=_share(result, rows, index),
            **cast("dict[str, Any]", found),
        )
        others = tuple(other.name for other in stack if other is not target)
        matrix = QuantLinear.from_quantized(
            weight,
            dtype=target.weight.dtype,
            activation_bits=target.format.activation_bits,
        )
        solved[target.name] = Solved(
            matrix,
            dataclasses.replace(report, bits_per_weight=matrix.bits_per_weight, shared_with=others),
        )
    return solved


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
    found = [
        f"{target.name} ({int(rows)} of {target.shape[0]} rows)"
        for target, rows in zip(stack, lost, strict=True)
        if rows
    ]
    if found:
        dtype = stack[0].config.scale_dtype
        other = "float32" if dtype == "bfloat16" else "bfloat16' or 'float32"
        warnings.warn(
            f"scale_dtype={dtype!r} cannot hold the scales of {', '.join(found)}, whose weights are too large or too small for it; set scale_dtype='{other}'",
            ScaleRangeWarning,
            stacklevel=3,
        )


def _sums(values: list[Tensor], rows: list[int]) -> list[list[float]]:
    """Sums of row values (N,) over each layer of the stack, all read with one copy."""
    if not values:
        return []
    flat = to_host(*(part.sum() for value in values for part in torch.split(value, rows)))
    return [flat[start : start + len(rows)] for start in range(0, len(flat), len(rows))]
