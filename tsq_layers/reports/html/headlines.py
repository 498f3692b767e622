"""The upper part of the page: the headline numbers, the bars of size and of coverage."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tsq_layers.config import QuantConfig
from tsq_layers.reports import gaps as coverage
from tsq_layers.reports import series, table
from tsq_layers.reports.layer import LayerReport
from tsq_layers.reports.parameter import ParameterReport
from tsq_layers.reports.totals import Totals

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


def how(config: QuantConfig) -> str:
    """Return the configuration in a line."""
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


def tiles(
    totals: Totals, layers: Sequence[LayerReport], parameters: Sequence[ParameterReport]
) -> list[Tile]:
    """Return size, bits, coverage, error and time."""
    quantized = [layer for layer in layers if layer.is_quantized]
    smaller = f"{totals.size_before / totals.size_after:.2f}×" if totals.size_after else _BLANK
    sizes = f"{table.format_bytes(totals.size_before)} → {table.format_bytes(totals.size_after)}"
    bits = sorted({layer.bits for layer in quantized if layer.bits is not None})
    codes = (
        f"codes of {', '.join(map(str, bits))} bits, with their scales"
        if bits
        else "no layer was quantised"
    )
    bits_text = f"{totals.bits_per_weight:.2f}" if totals.bits_per_weight is not None else _BLANK
    counts = f"{len(quantized)} of {len(layers)} layers"
    share = table.share(totals.coverage)
    covered = "of all parameters" if parameters else "of the layers' weights"
    solver = sum(map(series.seconds, layers))
    passes = "paired passes" if totals.paired else "one pass"
    return [
        Tile(label="Smaller", value=smaller, note=sizes),
        Tile(label="Bits per weight", value=bits_text, note=codes),
        Tile(label="Quantised", value=share, note=f"{covered}, {counts}"),
        _error_tile(quantized),
        Tile(
            label="Time",
            value=duration(totals.seconds),
            note=f"{passes}; {duration(solver)} in the solver",
        ),
    ]


def _error_tile(quantized: Sequence[LayerReport]) -> Tile:
    losses = [loss for loss in map(series.final_loss, quantized) if loss is not None]
    if not losses:
        return Tile(label="Output error", value=_BLANK, note="not measured")
    note = f"median of {len(losses)} layers; worst {short(max(losses))}"
    return Tile(label="Output error", value=short(statistics.median(losses)), note=note)


def sizes(
    totals: Totals, layers: Sequence[LayerReport], parameters: Sequence[ParameterReport]
) -> list[tuple[str, int, list[Part]]]:
    """Return before and after: label, bytes, and what they hold, as shares of the larger."""
    whole = max(totals.size_before, totals.size_after, 1)
    replaced = sum(item.quantized * item.itemsize for item in parameters)
    if parameters:  # what was not replaced is still there
        packed_bytes = max(totals.size_after - (totals.size_before - replaced), 0)
    else:
        packed_bytes = round(
            sum(
                layer.weights * (layer.bits_per_weight or 0.0) / 8
                for layer in layers
                if layer.is_quantized
            )
        )
    bars = []
    for label, total, quantized, name in (
        ("before", totals.size_before, replaced, "to be quantised"),
        ("after", totals.size_after, packed_bytes, "packed"),
    ):
        inside = min(quantized, total)
        parts = [(name, inside, "quantized"), ("as it was", total - inside, "gap-0")]
        slices = [
            Part(label=text, share=size / whole, note=table.format_bytes(size), style=style)
            for text, size, style in parts
            if size
        ]
        bars.append((label, total, slices))
    return bars


def coverage_parts(
    totals: Totals, layers: Sequence[LayerReport], parameters: Sequence[ParameterReport]
) -> list[Part]:
    """Return what was quantised, and what was not, by reason."""
    gaps = coverage.by_reason(layers, parameters)
    parts = (
        [Part(label="quantised", share=totals.coverage, note="", style="quantized")]
        if totals.coverage
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
