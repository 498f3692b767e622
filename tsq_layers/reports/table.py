"""The report as aligned plain text. Numbers that are missing or not finite show as a dash."""

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
    ratio = _format(totals.size_before / totals.size_after, ".2f") if totals.size_after else BLANK
    size = (
        f"{format_bytes(totals.size_before)} → {format_bytes(totals.size_after)} ({ratio}× smaller)"
    )
    run = f"{_format(totals.seconds, '.1f')} s, {'paired passes' if totals.paired else 'one pass'}"
    versions = ", ".join(f"{package} {version}" for package, version in totals.versions.items())
    how = "; ".join(filter(None, (run, versions)))
    return "\n".join(
        [_counts(totals, layers), *_coverage(totals, layers, parameters), f"model: {size}", how]
    )


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
    lines = [
        f"coverage: {share(totals.coverage)} of {total:,} parameters, {share(totals.byte_coverage)} of their bytes"
    ]
    gaps = coverage.by_reason(layers, parameters)
    if gaps:
        texts = [f"{share(gap.share)} {gap.place} ({gap.reason})" for gap in gaps[:_GAPS]]
        rest = sum(gap.share for gap in gaps[_GAPS:])
        lines.append(
            f"not quantised: {', '.join(texts + [f'{share(rest)} for other reasons'] * (rest > 0))}"
        )
    return lines


def share(part: float) -> str:
    """A share in percent; what is not nothing is not shown as 0%, what is not all not as 100%.

    Example:
        >>> share(0.25), share(0.0001), share(0.0), share(0.9999), share(1.0)
        ('25.0%', '<0.1%', '0.0%', '>99.9%', '100.0%')
    """
    if 0 < part < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= part < 1 else f"{part:.1%}"


def layers(rows: Sequence[LayerReport]) -> str:
    """One aligned line for every layer, under a line of titles. Columns that would be empty are left out."""
    cells = {title: [cell(layer) for layer in rows] for title, cell in _COLUMNS.items()}
    columns = {
        title: column
        for title, column in cells.items()
        if any(text not in ("", BLANK) for text in column)
    }
    return "\n".join(aligned([[title, *column] for title, column in columns.items()], _LEFT))


def _format(value: float | None, spec: str) -> str:
    return format(value, spec) if value is not None and math.isfinite(value) else BLANK


def format_bytes(count: int) -> str:
    """A number of bytes in decimal units, for example ``"1.23 MB"``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def aligned(columns: Sequence[Sequence[str]], left: Collection[str]) -> list[str]:
    """Lines of a table.

    Args:
        columns: each begins with its title.
        left: titles of those whose texts stand on the left.

    Example:
        >>> aligned([["layer", "up"], ["bits", "4"]], ["layer"])
        ['layer  bits', 'up        4']
    """
    widths = [max(map(len, column)) for column in columns]
    padded = [
        [text.ljust(width) if column[0] in left else text.rjust(width) for text in column]
        for column, width in zip(columns, widths, strict=True)
    ]
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _loss(step: str, layer: LayerReport) -> str:
    return _format(layer.losses.get(step), ".3g")


def _last_held_out(layer: LayerReport) -> float | None:
    return list(layer.held_out_losses.values())[-1] if layer.held_out_losses else None


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
    "seconds": lambda layer: _format(sum(layer.seconds.values()) if layer.seconds else None, ".2f"),
    "reason": lambda layer: layer.reason,
}
