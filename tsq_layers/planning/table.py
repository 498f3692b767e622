"""A plan as plain text."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tsq_layers.reports import format_bytes
from tsq_layers.reports.table import aligned

if TYPE_CHECKING:
    from tsq_layers.planning.plan import Plan, StagePlan

_SHOWN = 5  # names in a line of the summary
_BLANK = "–"


def summary(plan: "Plan") -> str:
    """Peak, model and time in a line each, and what is to be seen to."""
    return "\n".join([_peak(plan), _model(plan), _time(plan), *_notes(plan)])


def stages(plan: "Plan") -> str:
    """One aligned line for every stage, under a line of titles."""
    columns = [[title, *map(cell, plan.stages)] for title, cell in _COLUMNS.items()]
    if not any(stage.offloaded for stage in plan.stages):
        columns = [column for column in columns if column[0] != "offloaded"]
    return "\n".join(aligned(columns, (columns[0][0], columns[-1][0])))


def _peak(plan: "Plan") -> str:
    worst = plan.peak_stage
    where = (
        "in the recording pass" if worst is None else f"while {worst.busiest} {_first(worst.names)}"
    )
    threads = (
        f", {format_bytes(plan.thread_bytes)} of buffers of the passes' threads"
        if plan.thread_bytes
        else ""
    )
    return (
        f"peak: {format_bytes(plan.peak)} on top of the model's {format_bytes(plan.size_before)}, {where}; "
        f"with {format_bytes(plan.batch_bytes)} of batches{threads}"
    )


def _model(plan: "Plan") -> str:
    bits = _BLANK if plan.bits_per_weight is None else f"{plan.bits_per_weight:.3f}"
    quantized = sum(layer.is_quantized for layer in plan.layers)
    return (
        f"model: {format_bytes(plan.size_before)} → {format_bytes(plan.size_after)}; {quantized} of {len(plan.layers)} layers, "
        f"{plan.coverage:.1%} of the parameters; {bits} bits per weight"
    )


def _time(plan: "Plan") -> str:
    parts = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in plan.seconds.items())
    batches = f"{plan.batches} batches, {'paired passes' if plan.paired else 'one pass'}"
    held_out = f", {plan.held_out} held out" if plan.held_out else ""
    measured = (
        "without a pass" if plan.measured_by == "no pass" else f"measured by a {plan.measured_by}"
    )
    reason = f" ({plan.reason})" if plan.reason else ""
    return f"time: about {_seconds(sum(plan.seconds.values()))}: {parts}; {batches}{held_out}; {measured}{reason}"


def _notes(plan: "Plan") -> list[str]:
    lines = (
        [f"not counted: time and memory for {', '.join(plan.not_counted)}"]
        if plan.not_counted
        else []
    )
    lines += [_few_tokens(plan)] if plan.few_tokens else []
    if plan.experts:
        few = f"{len(plan.experts)} layers of experts see too few tokens and share those of all experts"
        lines.append(f"shared statistics: {few}: {_some(plan.experts)}")
    by_reason: dict[str, list[str]] = defaultdict(list)
    for layer in plan.left_alone():
        by_reason[f"{layer.status}: {layer.reason}" if layer.reason else layer.status].append(
            layer.name
        )
    return lines + [
        f"not quantised ({reason}): {_some(names)}" for reason, names in by_reason.items()
    ]


def _few_tokens(plan: "Plan") -> str:
    worst = plan.few_tokens[0]
    names = [name for stage in plan.few_tokens for name in stage.names]
    count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    return (
        f"few tokens: {count} will see fewer than 16 for each input column: {_some(names)}; the worst is {worst.names[0]}: "
        f"{worst.tokens} tokens, {worst.columns} columns, {16 * worst.columns} tokens wanted"
    )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _first(names: Sequence[str]) -> str:
    """The names of a stage, short: the others by their last part."""
    others = [name.rpartition(".")[2] for name in names[1:_SHOWN]]
    more = f", +{len(names) - _SHOWN}" if len(names) > _SHOWN else ""
    return ", ".join([names[0] or "(model)", *others]) + more


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


_COLUMNS: dict[str, Callable[["StagePlan"], str]] = {
    "layers": lambda stage: _first(stage.names),
    "shape": lambda stage: f"{stage.rows}×{stage.columns}",
    "tokens": lambda stage: f"{stage.tokens:,d}",
    "a pass holds": lambda stage: format_bytes(stage.held),
    "waiting": lambda stage: format_bytes(stage.waiting),
    "offloaded": lambda stage: format_bytes(stage.offloaded),
    "statistics": lambda stage: format_bytes(stage.statistics),
    "solver": lambda stage: format_bytes(stage.solver),
    "packed": lambda stage: format_bytes(stage.packed),
    "total": lambda stage: format_bytes(stage.total),
    "at most while": lambda stage: stage.busiest,
}
