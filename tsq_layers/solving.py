"""From statistics to solved layers: same-input layers as one stack, and what it says of each."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tsq_layers.errors import FewTokensWarning
from tsq_layers.preparation import Solved, Target
from tsq_layers.records import LayerStatistics
from tsq_layers.report import LayerReport
from tsq_layers.solver import SolverResult, TwoStageGroupQuantizer
from tsq_layers.sync import to_host

_TOKENS_PER_COLUMN = 16  # fewer tokens than this many times K: H is noisy, and refinement fits the noise


def solve(
    targets: Sequence[Target], statistics: LayerStatistics | None, held_out: LayerStatistics | None = None
) -> dict[str, Solved]:
    """Quantise layers that share their input.

    Layers with equal configurations are stacked and solved in one run: they share H, and rows are
    independent.

    Args:
        targets: the layers.
        statistics: of their common input; ``None`` where no method needs any.
        held_out: statistics of tokens that are not fitted, for reporting only.
    """
    solved: dict[str, Solved] = {}
    remaining = list(targets)
    while remaining:
        stack = [target for target in remaining if target.config == remaining[0].config]
        remaining = [target for target in remaining if target not in stack]
        name = ", ".join(target.name for target in stack)
        weight = torch.cat([target.weight.to(torch.float32) for target in stack]) if len(stack) > 1 else stack[0].weight
        needed = statistics if stack[0].config.needs_calibration else None
        result = TwoStageGroupQuantizer(weight, needed, stack[0].config, name=name).run(held_out if needed else None)
        solved.update(_split(stack, result, statistics))
    return {target.name: solved[target.name] for target in targets}


def warn_few_tokens(solved: Mapping[str, Solved]) -> None:
    """One warning for all layers that saw too few tokens, naming the worst."""
    few = [
        (entry.name, entry.tokens, entry.columns)
        for entry in (layer.report for layer in solved.values())
        if entry.tokens is not None and entry.tokens < _TOKENS_PER_COLUMN * entry.columns
    ]
    if few:
        name, tokens, columns = max(few, key=lambda entry: entry[2] / entry[1])
        warnings.warn(
            f"{len(few)} layers saw fewer than {_TOKENS_PER_COLUMN} tokens for each of their input columns; the worst is {name}: "
            f"{tokens} tokens, {columns} columns, {_TOKENS_PER_COLUMN * columns} tokens wanted; calibrate with more data",
            FewTokensWarning,
            stacklevel=3,
        )


def _split(stack: Sequence[Target], result: SolverResult, statistics: LayerStatistics | None) -> dict[str, Solved]:
    rows = [target.weight.shape[0] for target in stack]
    weights = result.weight.split(rows)
    tables = {"losses": result.losses, "held_out_losses": result.held_out_losses, "objective": result.objective}
    numbers = [(table, step, values) for table, steps in tables.items() for step, values in steps.items()]
    sums = _sums([values for _, _, values in numbers], rows)
    signal = _sums([result.signal], rows)[0] if result.signal is not None else [1.0] * len(stack)
    tokens = None if statistics is None else int(to_host(statistics.count)[0])
    solved: dict[str, Solved] = {}
    for index, (target, weight) in enumerate(zip(stack, weights, strict=True)):
        found: dict[str, dict[str, float]] = {table: {} for table in tables}  # what each step did to this layer
        for (table, step, _), layer_sums in zip(numbers, sums, strict=True):
            found[table][step] = layer_sums[index] / signal[index] if signal[index] > 0 else 0.0
        report = dataclasses.replace(
            _entry(target),
            tokens=tokens,
            damping=result.damping,
            seconds=_share(result, rows, index),
            **cast("dict[str, Any]", found),
        )
        others = tuple(other.name for other in stack if other is not target)
        solved[target.name] = Solved(
            weight, dataclasses.replace(report, bits_per_weight=weight.bits_per_weight, shared_with=others)
        )
    return solved


def _entry(target: Target) -> LayerReport:
    rows, columns = target.weight.shape
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
        deviation=config.deviation if config.uses_deviation else "none",
    )


def _share(result: SolverResult, rows: list[int], index: int) -> dict[str, float]:
    """A layer's part of the stack's time, by rows."""
    return {step: seconds * rows[index] / sum(rows) for step, seconds in result.seconds.items()}


def _sums(values: list[Tensor], rows: list[int]) -> list[list[float]]:
    """Sums of row values (N,) over each layer of the stack, all read with one copy."""
    if not values:
        return []
    flat = to_host(*(part.sum() for value in values for part in torch.split(value, rows)))
    return [flat[start : start + len(rows)] for start in range(0, len(flat), len(rows))]
