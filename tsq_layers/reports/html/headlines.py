"""The upper part of the page: the headline numbers, the bars of size and of coverage."""

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsq_layers.reports import gaps as coverage
from tsq_layers.reports import series, table

if TYPE_CHECKING:
    from tsq_layers.reports.report import Report

_SLICES = 7  # of the bar of coverage, the quantised one not counted
_BLANK = table.BLANK


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A headline number: what it is, the number, and a line below it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a bar: its name, its share of the bar (0 to 1), what stands beside the name, and its CSS class."""

    label: str
    share: float
    note: str
    style: str


def how(report: "Report") -> str:
    """The configuration in a line."""
    config = report.config
    group = (
        f"groups of {config.group_size}" if config.group_size is not None else "one group per row"
    )
    if config.tables is not None:
        kind = "with look-up tables"
    elif config.has_offsets:
        kind = "with float offsets"
    else:
        kind = "symmetric" if config.symmetric else "with zero points"
    exceptions = (
        f"{len(config.overrides)} overrides" if len(config.overrides) != 1 else "1 override"
    )
    parts = [
        config.method,
        f"{config.bits} bits",
        group,
        kind,
        *([exceptions] if config.overrides else []),
    ]
    return " · ".join(parts)


def tiles(report: "Report") -> list[Tile]:
    """Size, bits, coverage, error and time."""
    smaller = f"{report.size_before / report.size_after:.2f}×" if report.size_after else _BLANK
    sizes = f"{table.format_bytes(report.size_before)} → {table.format_bytes(report.size_after)}"
    bits = sorted({layer.bits for layer in report.quantized if layer.bits is not None})
    codes = (
        f"codes of {', '.join(map(str, bits))} bits, with their scales"
        if bits
        else "no layer was quantised"
    )
    stored = f"{report.bits_per_weight:.2f}" if report.bits_per_weight is not None else _BLANK
    layers = f"{len(report.quantized)} of {len(report.layers)} layers"
    share = table.share(report.coverage)
    covered = "of all parameters" if report.parameters else "of the layers' weights"
    solver = sum(map(series.seconds, report.layers))
    passes = "paired passes" if report.paired else "one pass"
    return [
        Tile(label="Smaller", value=smaller, note=sizes),
        Tile(label="Bits per weight", value=stored, note=codes),
        Tile(label="Quantised", value=share, note=f"{covered}, {layers}"),
        _error_tile(report),
        Tile(
            label="Time",
            value=duration(report.seconds),
            note=f"{passes}; {duration(solver)} in the solver",
        ),
    ]


def _error_tile(report: "Report") -> Tile:
    losses = [loss for loss in map(series.final_loss, report.quantized) if loss is not None]
    if not losses:
        return Tile(label="Output error", value=_BLANK, note="not measured")
    note = f"median of {len(losses)} layers; worst {short(max(losses))}"
    return Tile(label="Output error", value=short(statistics.median(losses)), note=note)


def sizes(report: "Report") -> list[tuple[str, int, list[Part]]]:
    """Before and after: label, bytes, and what they hold, as shares of the larger."""
    whole = max(report.size_before, report.size_after, 1)
    replaced = sum(item.quantized * item.itemsize for item in report.parameters)
    if report.parameters:  # what was not replaced is still there
        packed = max(report.size_after - (report.size_before - replaced), 0)
    else:
        packed = round(
            sum(layer.weights * (layer.bits_per_weight or 0.0) / 8 for layer in report.quantized)
        )
    bars = []
    for label, total, quantized, name in (
        ("before", report.size_before, replaced, "to be quantised"),
        ("after", report.size_after, packed, "packed"),
    ):
        inside = min(quantized, total)
        parts = [(name, inside, "quantized"), ("as it was", total - inside, "gap-0")]
        found = [
            Part(label=text, share=size / whole, note=table.format_bytes(size), style=style)
            for text, size, style in parts
            if size
        ]
        bars.append((label, total, found))
    return bars


def coverage_parts(report: "Report") -> list[Part]:
    """What was quantised, and what was not, by reason."""
    gaps = coverage.by_reason(report)
    parts = (
        [Part(label="quantised", share=report.coverage, note="", style="quantized")]
        if report.coverage
        else []
    )
    for index, gap in enumerate(gaps[:_SLICES]):
        parts.append(Part(label=gap.reason, share=gap.share, note=gap.place, style=f"gap-{index}"))
    rest = gaps[_SLICES:]
    if rest:
        names = sum(len(gap.names) for gap in rest)
        label = f"{len(rest)} other reasons"
        parts.append(
            Part(
                label=label,
                share=sum(gap.share for gap in rest),
                note=f"in {names}",
                style="gap-rest",
            )
        )
    return parts


def short(value: float | None) -> str:
    """Three digits, or a dash for what is missing."""
    return f"{value:.3g}" if value is not None and math.isfinite(value) else _BLANK


def duration(seconds: float) -> str:
    """Seconds as a person would say them.

    Example:
        >>> duration(0.042), duration(75.0), duration(5025.0)
        ('0.04 s', '75 s', '1 h 24 min')
    """
    if not math.isfinite(seconds):
        return _BLANK
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
