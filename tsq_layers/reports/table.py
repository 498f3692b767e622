"""Write the report as aligned plain text. Numbers that are missing or not finite show as a dash."""

import functools
import math
from collections.abc import Callable, Collection, Sequence

from tsq_layers.reports import gaps as coverage
from tsq_layers.reports.layer import STEPS, LayerReport
from tsq_layers.reports.parameter import ParameterReport
from tsq_layers.reports.totals import Totals

BLANK = "–"

_GAPS = 3  # reasons that the summary names


def summary(
    totals: Totals, layers: Sequence[LayerReport], parameters: Sequence[ParameterReport]
) -> str:
    """Return a few lines: what was quantised, what was not and why, and what that saved."""
    ratio = BLANK
    if totals.size_after:
        ratio = _format(totals.size_before / totals.size_after, ".2f")
    before = format_bytes(totals.size_before)
    after = format_bytes(totals.size_after)
    passes = "paired passes" if totals.paired else "one pass"
    run = [f"{_format(totals.seconds, '.1f')} s, {passes}"]
    if totals.versions:
        run.append(
            ", ".join(f"{package} {version}" for package, version in totals.versions.items())
        )
    lines = [
        _counts(totals, layers),
        *_coverage(totals, layers, parameters),
        f"model: {before} → {after} ({ratio}× smaller)",
        "; ".join(run),
    ]
    return "\n".join(lines)


def _counts(totals: Totals, layers: Sequence[LayerReport]) -> str:
    count = sum(layer.is_quantized for layer in layers)
    fallbacks = sum(layer.status == "fallback" for layer in layers)
    less = f" ({fallbacks} with less than asked)" if fallbacks else ""
    return (
        f"{count} of {len(layers)} layers quantised{less}, {totals.share_quantized:.1%} of their weights; "
        f"{_format(totals.bits_per_weight, '.3f')} bits per weight"
    )


def _coverage(
    totals: Totals, layers: Sequence[LayerReport], parameters: Sequence[ParameterReport]
) -> list[str]:
    """Return nothing for a report that lists no parameters: the line above says it for the layers."""
    if not parameters:
        return []
    total = sum(parameter.numel for parameter in parameters)
    entries = f"{share(totals.coverage)} of {total:,} parameters"
    lines = [f"coverage: {entries}, {share(totals.byte_coverage)} of their bytes"]
    gaps = coverage.by_reason(layers, parameters)
    if gaps:
        texts = [f"{share(gap.share)} {gap.place} ({gap.reason})" for gap in gaps[:_GAPS]]
        rest = sum(gap.share for gap in gaps[_GAPS:])
        if rest > 0:
            texts.append(f"{share(rest)} for other reasons")
        lines.append(f"not quantised: {', '.join(texts)}")
    return lines


def share(part: float) -> str:
    """Format a share in percent; what is not nothing is not shown as 0%, what is not all not as 100%.

    Example:
        >>> share(0.25), share(0.0001), share(0.0), share(0.9999), share(1.0)
        ('25.0%', '<0.1%', '0.0%', '>99.9%', '100.0%')
    """
    if 0 < part < 0.0005:
        return "<0.1%"
    if 0.9995 <= part < 1:
        return ">99.9%"
    return f"{part:.1%}"


def layers(rows: Sequence[LayerReport]) -> str:
    """Return one aligned line for every layer, under a line of titles.

    Columns that would be empty are left out.
    """
    columns = []
    for title, cell in _COLUMNS.items():
        texts = [cell(layer) for layer in rows]
        if any(text not in ("", BLANK) for text in texts):
            columns.append([title, *texts])
    return "\n".join(aligned(columns, _LEFT))


def _format(value: float | None, spec: str) -> str:
    if value is None or not math.isfinite(value):
        return BLANK
    return format(value, spec)


def format_bytes(count: int) -> str:
    """Format a number of bytes in decimal units, for example ``"1.23 MB"``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def aligned(columns: Sequence[Sequence[str]], left: Collection[str]) -> list[str]:
    """Return the lines of a table.

    Args:
        columns: each begins with its title.
        left: titles of those whose texts stand on the left.

    Example:
        >>> aligned([["layer", "up"], ["bits", "4"]], ["layer"])
        ['layer  bits', 'up        4']
    """
    padded = []
    for column in columns:
        title = column[0]
        width = max(map(len, column))
        pad = str.ljust if title in left else str.rjust
        padded.append([pad(text, width) for text in column])
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _loss(step: str, layer: LayerReport) -> str:
    return _format(layer.losses.get(step), ".3g")


def _last_held_out(layer: LayerReport) -> float | None:
    losses = list(layer.held_out_losses.values())
    return losses[-1] if losses else None


def _all_seconds(layer: LayerReport) -> float | None:
    return sum(layer.seconds.values()) if layer.seconds else None


_LEFT = ("layer", "kind", "status", "method", "reason")
_COLUMNS: dict[str, Callable[[LayerReport], str]] = {
    "layer": lambda layer: layer.name or "(model)",
    "kind": lambda layer: layer.kind,
    "shape": lambda layer: f"{layer.rows}×{layer.columns}",
    "status": lambda layer: layer.status,
    "method": lambda layer: layer.method or BLANK,
    "bits": lambda layer: _format(layer.bits, "d"),
    "group": lambda layer: _format(layer.group_size, "d"),
    "bits/weight": lambda layer: _format(layer.bits_per_weight, ".3f"),
    "tokens": lambda layer: _format(layer.tokens, ",d"),
    "damping": lambda layer: _format(layer.damping, ".2g"),
    **{step: functools.partial(_loss, step) for step in STEPS},
    "held out": lambda layer: _format(_last_held_out(layer), ".3g"),
    "seconds": lambda layer: _format(_all_seconds(layer), ".2f"),
    "reason": lambda layer: layer.reason,
}
