"""Write a plan as plain text."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from tsq_layers.calibration.solving import TOKENS_PER_COLUMN
from tsq_layers.planning.stage_plan import StagePlan
from tsq_layers.reports import LayerReport, format_bytes
from tsq_layers.reports.table import aligned

_MAX_NAMES = 5  # in a line of the summary
_BLANK = "–"


def stages(stage_plans: Sequence[StagePlan]) -> str:
    """Return one aligned line for every stage, under a line of titles."""
    has_offload = any(stage.offloaded for stage in stage_plans)
    columns = []
    for title, cell in _COLUMNS.items():
        if title != "offloaded" or has_offload:
            columns.append([title, *map(cell, stage_plans)])
    return "\n".join(aligned(columns, _LEFT))


def peak_line(stage: StagePlan | None, *, peak: int, model: int, batches: int, threads: int) -> str:
    """Return the peak of memory and where it is; all numbers are bytes.

    Args:
        stage: where the peak is; ``None`` if that is the recording pass.
        peak: the most that is held beside the model.
        model: the float model.
        batches: all batches.
        threads: buffers of the passes' threads.
    """
    where = "in the recording pass"
    if stage is not None:
        where = f"while {stage.busiest} {_abbreviate(stage.names)}"
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
    bits = _BLANK
    if bits_per_weight is not None:
        bits = f"{bits_per_weight:.3f}"
    count = sum(layer.is_quantized for layer in layers)
    return (
        f"model: {format_bytes(before)} → {format_bytes(after)}; {count} of {len(layers)} layers, "
        f"{coverage:.1%} of the parameters; {bits} bits per weight"
    )


def time_line(seconds: Mapping[str, float]) -> str:
    """Return the time of the whole run and of its parts, estimates in seconds."""
    total = _seconds(sum(seconds.values()))
    parts = ", ".join(f"{name} {_seconds(value)}" for name, value in seconds.items())
    return f"time: about {total}: {parts}"


def notes(
    not_counted: Sequence[str],
    few_tokens: Sequence[StagePlan],
    experts: Sequence[str],
    left_alone: Sequence[LayerReport],
) -> list[str]:
    """Return the findings that a user should look at, a line each.

    Args:
        not_counted: fields of the configuration whose costs the plan leaves out.
        few_tokens: stages whose layers see fewer than 16 tokens for each column, fewest first.
        experts: names of layers that share the statistics of all experts.
        left_alone: layers that will not be quantised.
    """
    lines = []
    if not_counted:
        lines.append(f"not counted: time and memory for {', '.join(not_counted)}")
    if few_tokens:
        lines.append(_few_tokens(few_tokens))
    if experts:
        lines.append(
            f"shared statistics: {len(experts)} layers of experts see too few tokens and share "
            f"those of all experts: {_enumerate(experts)}"
        )
    names_by_reason: dict[str, list[str]] = defaultdict(list)
    for layer in left_alone:
        reason: str = layer.status
        if layer.reason:
            reason = f"{layer.status}: {layer.reason}"
        names_by_reason[reason].append(layer.name)
    for reason, names in names_by_reason.items():
        lines.append(f"not quantised ({reason}): {_enumerate(names)}")
    return lines


def _few_tokens(stage_plans: Sequence[StagePlan]) -> str:
    """Return the line about layers that see few tokens; the first stage sees the fewest."""
    names: list[str] = []
    for stage in stage_plans:
        names.extend(stage.names)
    count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    worst = stage_plans[0]
    return (
        f"few tokens: {count} will see fewer than {TOKENS_PER_COLUMN} for each input column: "
        f"{_enumerate(names)}; the worst is {worst.names[0]}: {worst.tokens} tokens, "
        f"{worst.columns} columns, {TOKENS_PER_COLUMN * worst.columns} tokens wanted"
    )


def _enumerate(names: Sequence[str]) -> str:
    """Return the first names, and the number of the rest."""
    text = ", ".join(names[:_MAX_NAMES])
    rest = len(names) - _MAX_NAMES
    if rest > 0:
        text += f" and {rest} more"
    return text


def _abbreviate(names: Sequence[str]) -> str:
    """Return the names of a stage: the first in full, a few more by their last part."""
    texts = [names[0] or "(model)"]
    for name in names[1:_MAX_NAMES]:
        texts.append(name.rpartition(".")[2])
    rest = len(names) - _MAX_NAMES
    if rest > 0:
        texts.append(f"+{rest}")
    return ", ".join(texts)


def _seconds(seconds: float) -> str:
    """Return a time in a unit that suits it."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


_LEFT = ("layers", "at most while")  # titles of columns that are aligned on the left
_COLUMNS: dict[str, Callable[[StagePlan], str]] = {
    "layers": lambda stage: _abbreviate(stage.names),
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
