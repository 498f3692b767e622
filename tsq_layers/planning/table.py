"""Write a plan as plain text."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from tsq_layers.planning.stage_plan import StagePlan
from tsq_layers.reports import LayerReport, format_bytes
from tsq_layers.reports.table import aligned

_SHOWN = 5  # names in a line of the summary
_BLANK = "–"


def stages(stage_plans: Sequence[StagePlan]) -> str:
    """Return one aligned line for every stage, under a line of titles."""
    columns = [[title, *map(cell, stage_plans)] for title, cell in _COLUMNS.items()]
    if not any(stage.offloaded for stage in stage_plans):
        columns = [column for column in columns if column[0] != "offloaded"]
    return "\n".join(aligned(columns, (columns[0][0], columns[-1][0])))


def peak_line(stage: StagePlan | None, *, peak: int, model: int, batches: int, threads: int) -> str:
    """Return the peak of memory and where it is; all numbers are bytes.

    Args:
        stage: where the peak is; ``None`` if that is the recording pass.
        peak: beside the model.
        model: of the float model.
        batches: of all batches.
        threads: of the buffers of the passes' threads.
    """
    where = "in the recording pass"
    if stage is not None:
        where = f"while {stage.busiest} {_first(stage.names)}"
    line = (
        f"peak: {format_bytes(peak)} on top of the model's {format_bytes(model)}, {where}; "
        f"with {format_bytes(batches)} of batches"
    )
    if threads:
        line += f", {format_bytes(threads)} of buffers of the passes' threads"
    return line


def model_line(
    layers: Sequence[LayerReport],
    *,
    before: int,
    after: int,
    coverage: float,
    bits_per_weight: float | None,
) -> str:
    """Return the sizes of the model, in bytes, and how much of it will be quantised."""
    bits = _BLANK if bits_per_weight is None else f"{bits_per_weight:.3f}"
    count = sum(layer.is_quantized for layer in layers)
    return (
        f"model: {format_bytes(before)} → {format_bytes(after)}; {count} of {len(layers)} layers, "
        f"{coverage:.1%} of the parameters; {bits} bits per weight"
    )


def time_line(seconds: Mapping[str, float]) -> str:
    """Return the time of the whole run and of its parts."""
    parts = ", ".join(f"{name} {_seconds(value)}" for name, value in seconds.items())
    return f"time: about {_seconds(sum(seconds.values()))}: {parts}"


def notes(
    not_counted: Sequence[str],
    few_tokens: Sequence[StagePlan],
    experts: Sequence[str],
    left_alone: Sequence[LayerReport],
) -> list[str]:
    """Return what a user should look at, a line each."""
    lines = []
    if not_counted:
        lines.append(f"not counted: time and memory for {', '.join(not_counted)}")
    if few_tokens:
        lines.append(_few_tokens(few_tokens))
    if experts:
        few = f"{len(experts)} layers of experts see too few tokens and share those of all experts"
        lines.append(f"shared statistics: {few}: {_some(experts)}")
    by_reason: dict[str, list[str]] = defaultdict(list)
    for layer in left_alone:
        reason = f"{layer.status}: {layer.reason}" if layer.reason else layer.status
        by_reason[reason].append(layer.name)
    for reason, names in by_reason.items():
        lines.append(f"not quantised ({reason}): {_some(names)}")
    return lines


def _few_tokens(stage_plans: Sequence[StagePlan]) -> str:
    worst = stage_plans[0]
    names = [name for stage in stage_plans for name in stage.names]
    count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    return (
        f"few tokens: {count} will see fewer than 16 for each input column: {_some(names)}; the "
        f"worst is {worst.names[0]}: "
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


_COLUMNS: dict[str, Callable[[StagePlan], str]] = {
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
