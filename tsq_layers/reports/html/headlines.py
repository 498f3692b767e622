"""Upper part of the page: the headline numbers, the bars of size and of coverage."""

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
    group = "one group per row"
    if config.group_size is not None:
        group = f"groups of {config.group_size}"
    if config.tables is not None:
        kind = "with look-up tables"
    elif config.has_offsets:
        kind = "with float offsets"
    else:
        kind = "symmetric" if config.symmetric else "with zero points"
    parts = [config.method, f"{config.bits} bits", group, kind]
    count = len(config.overrides)
    if count:
        parts.append("1 override" if count == 1 else f"{count} overrides")
    return " · ".join(parts)


def tiles(
    totals: Totals, layers: Sequence[LayerReport], parameters: Sequence[ParameterReport]
) -> list[Tile]:
    """Return size, bits, coverage, error and time."""
    packed_layers = [layer for layer in layers if layer.is_quantized]
    base = "of all parameters" if parameters else "of the layers' weights"
    counts = f"{len(packed_layers)} of {len(layers)} layers"
    solver = sum(map(series.seconds, layers))
    passes = "paired passes" if totals.paired else "one pass"
    time_note = f"{passes}; {duration(solver)} in the solver"
    return [
        _size_tile(totals),
        _bits_tile(totals, packed_layers),
        Tile(label="Quantised", value=table.share(totals.coverage), note=f"{base}, {counts}"),
        _error_tile(packed_layers),
        Tile(label="Time", value=duration(totals.seconds), note=time_note),
    ]


def _size_tile(totals: Totals) -> Tile:
    ratio = _BLANK
    if totals.size_after:
        ratio = f"{totals.size_before / totals.size_after:.2f}×"
    before = table.format_bytes(totals.size_before)
    after = table.format_bytes(totals.size_after)
    return Tile(label="Smaller", value=ratio, note=f"{before} → {after}")


def _bits_tile(totals: Totals, packed_layers: Sequence[LayerReport]) -> Tile:
    bits = sorted({layer.bits for layer in packed_layers if layer.bits is not None})
    note = "no layer was quantised"
    if bits:
        note = f"codes of {', '.join(map(str, bits))} bits, with their scales"
    value = _BLANK
    if totals.bits_per_weight is not None:
        value = f"{totals.bits_per_weight:.2f}"
    return Tile(label="Bits per weight", value=value, note=note)


def _error_tile(packed_layers: Sequence[LayerReport]) -> Tile:
    losses = [loss for loss in map(series.final_loss, packed_layers) if loss is not None]
    if not losses:
        return Tile(label="Output error", value=_BLANK, note="not measured")
    note = f"median of {len(losses)} layers; worst {short(max(losses))}"
    return Tile(label="Output error", value=short(statistics.median(losses)), note=note)


def sizes(
    totals: Totals, layers: Sequence[LayerReport], parameters: Sequence[ParameterReport]
) -> list[tuple[str, int, list[Part]]]:
    """Return before and after: label, bytes, and what they hold, as shares of the larger."""
    length = max(totals.size_before, totals.size_after, 1)
    float_bytes = sum(item.quantized * item.itemsize for item in parameters)
    if parameters:
        # What was not replaced is still there, and the rest of the model is packed.
        packed_bytes = max(totals.size_after - (totals.size_before - float_bytes), 0)
    else:
        packed_layers = [layer for layer in layers if layer.is_quantized]
        packed_bytes = round(
            sum(layer.weights * (layer.bits_per_weight or 0.0) / 8 for layer in packed_layers)
        )
    before = _size_parts("to be quantised", float_bytes, totals.size_before, length)
    after = _size_parts("packed", packed_bytes, totals.size_after, length)
    return [("before", totals.size_before, before), ("after", totals.size_after, after)]


def _size_parts(label: str, size: int, total: int, length: int) -> list[Part]:
    """Return the two parts of a bar of ``total`` bytes, in which ``length`` bytes are all the width."""
    size = min(size, total)
    parts = []
    for text, count, style in ((label, size, "quantized"), ("as it was", total - size, "gap-0")):
        if count:
            note = table.format_bytes(count)
            parts.append(Part(label=text, share=count / length, note=note, style=style))
    return parts


def coverage_parts(
    totals: Totals, layers: Sequence[LayerReport], parameters: Sequence[ParameterReport]
) -> list[Part]:
    """Return what was quantised, and what was not, by reason."""
    gaps = coverage.by_reason(layers, parameters)
    parts = []
    if totals.coverage:
        parts.append(Part(label="quantised", share=totals.coverage, note="", style="quantized"))
    for index, gap in enumerate(gaps[:_SLICES]):
        parts.append(Part(label=gap.reason, share=gap.share, note=gap.place, style=f"gap-{index}"))
    rest = gaps[_SLICES:]
    if rest:
        part = Part(
            label=f"{len(rest)} other reasons",
            share=sum(gap.share for gap in rest),
            note=f"in {sum(len(gap.names) for gap in rest)}",
            style="gap-rest",
        )
        parts.append(part)
    return parts


def short(value: float | None) -> str:
    """Format a number with three digits; a dash stands for what is missing."""
    if value is None or not math.isfinite(value):
        return _BLANK
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format seconds as a person would say them.

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
