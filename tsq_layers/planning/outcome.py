"""Convert a model on tensors without values, for the report as it will be."""

from collections.abc import Sequence

import torch
from torch import nn

from tsq_layers.calibration.preparation import Preparation
from tsq_layers.calibration.targets import Solved, Target
from tsq_layers.planning.course import Course
from tsq_layers.reports import LayerReport, Report
from tsq_layers.workflow.conversion import convert


def outcome(model: nn.Module, preparation: Preparation, course: Course, *, paired: bool) -> Report:
    """Convert a prepared model whose tensors have no values, with what a calibration will solve.

    Args:
        model: changed; to be done inside of ``restored``.
        preparation: of the model.
        course: which layers are solved, and what they see.
        paired: for the report.
    """
    stacks = {name: solve.names for solve in course.solves for name in solve.names}
    with torch.no_grad():
        preparation.solved = {
            name: _solved(target, course, stacks[name])
            for name, target in preparation.targets.items()
            if name in course.solved
        }
        preparation.paired = paired
        converted = convert(model)
    report = converted.tsq_report
    assert isinstance(report, Report)
    return report


def sees_too_few(target: Target, course: Course) -> bool:
    """Return whether a layer is an expert's that will be solved with the statistics of all experts."""
    minimum = (
        target.shape[1]
        if target.config.min_expert_tokens is None
        else target.config.min_expert_tokens
    )
    return (
        target.pool is not None
        and target.observed
        and target.name in course.solved
        and course.tokens[target.name] < minimum
    )


def _solved(target: Target, course: Course, stack: Sequence[str]) -> Solved:
    config, (rows, columns) = target.config, target.shape
    matrix = target.empty_matrix("meta")
    tokens = course.tokens[target.name] if target.observed else None
    few = sees_too_few(target, course)
    entry = LayerReport(
        name=target.name,
        kind=target.kind.name,
        rows=rows,
        columns=columns,
        status="fallback" if few else "quantized",
        reason=f"about {tokens} tokens of its own for {columns} columns: statistics of all experts"
        if few
        else "",
        method=config.method,
        bits=config.bits,
        group_size=matrix.group_size,
        symmetric=config.symmetric,
        bits_per_weight=matrix.bits_per_weight,
        tokens=tokens,
        deviation=config.option("deviation") if target.uses_deviation else "none",
        shared_with=tuple(name for name in stack if name != target.name),
    )
    return Solved(matrix, entry)
