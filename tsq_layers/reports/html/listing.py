"""Table of layers of the page: columns that differ, values to sort by, and what is the same for all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from tsq_layers.reports import series
from tsq_layers.reports.layer import STEPS, LayerReport
from tsq_layers.reports.table import BLANK, format_bytes

Value = str | float | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, what stands in it, and how.

    Args:
        title: the title.
        value: text or number of a layer, by which the column is sorted; ``None`` shows as a dash.
        spec: format of a number.
        text: what is shown instead of the formatted value.
        shared: left out where it is the same for all quantised layers.
        bar: whether a bar behind the number shows where it lies, on a logarithmic scale.
    """

    title: str
    value: Callable[[LayerReport], Value]
    spec: str = ""
    text: Callable[[LayerReport], str] | None = None
    shared: bool = False
    bar: bool = False

    @property
    def key(self) -> str:
        """Return the title as a CSS class."""
        return self.title.replace(" ", "-").replace("/", "-")


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of the table.

    Attributes are its text, the value to sort by (``None``: the text, or nothing where that is a
    dash), and the length of its bar (0 to 1).
    """

    text: str
    order: float | None
    bar: float | None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Columns, rows of fields, and title and text of what is the same for all quantised layers."""

    columns: tuple[Column, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[Field, ...], ...]
    common: tuple[tuple[str, str], ...]


def listing(layers: Sequence[LayerReport]) -> Listing:
    """Return the table. Columns without any value are left out."""
    rows_with_codes = [layer for layer in layers if layer.is_quantized]
    columns = []
    common = []
    fields = []
    numeric = []
    for column in _COLUMNS:
        values = [column.value(layer) for layer in layers]
        if all(value in (None, "") for value in values):
            continue
        texts = {_text(column, layer) for layer in rows_with_codes}
        if column.shared and len(rows_with_codes) > 1 and len(texts) == 1:
            common.append((column.title, texts.pop()))
            continue
        columns.append(column)
        numeric.append(any(isinstance(value, (int, float)) for value in values))
        fields.append(_fields(column, layers, values))
    rows = tuple(zip(*fields, strict=True)) if fields else ()
    return Listing(columns=tuple(columns), numeric=tuple(numeric), rows=rows, common=tuple(common))


def _fields(column: Column, layers: Sequence[LayerReport], values: Sequence[Value]) -> list[Field]:
    heights = _bar_heights(values) if column.bar else [None] * len(values)
    fields = []
    for layer, value, height in zip(layers, values, heights, strict=True):
        order = float(value) if _is_finite(value) else None
        fields.append(Field(text=_text(column, layer), order=order, bar=height))
    return fields


def _bar_heights(values: Sequence[Value]) -> list[float | None]:
    """Return how far the bar behind each number reaches, 0 to 1, on a logarithmic scale."""
    places = [_loggable(value) for value in values]
    numbers = series.positives(places)
    if not numbers:
        return [None] * len(values)
    low = math.log(min(numbers))
    # All bars are short where all values are equal; the 1.0 keeps the division possible.
    span = math.log(max(numbers)) - low or 1.0
    heights: list[float | None] = []
    for place in places:
        if place is None:
            heights.append(None)
        else:
            heights.append(0.06 + 0.94 * (math.log(place) - low) / span)
    return heights


def _is_finite(value: Value) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _loggable(value: Value) -> float | None:
    return series.positive(value) if isinstance(value, (int, float)) else None


def _text(column: Column, layer: LayerReport) -> str:
    if column.text is not None:
        return column.text(layer)
    value = column.value(layer)
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return BLANK
    return format(value, column.spec)


def _size(layer: LayerReport) -> float | None:
    if layer.bits_per_weight is None:
        return None
    return layer.weights * layer.bits_per_weight / 8


def _size_text(layer: LayerReport) -> str:
    size = _size(layer)
    return BLANK if size is None else format_bytes(round(size))


def _loss(step: str) -> Column:
    return Column(title=step, value=lambda layer: layer.losses.get(step), spec=".3g", bar=True)


_COLUMNS = (
    Column(title="layer", value=lambda layer: layer.name or "(model)"),
    Column(title="kind", value=lambda layer: layer.kind),
    Column(
        title="shape",
        value=lambda layer: layer.weights,
        text=lambda layer: f"{layer.rows}×{layer.columns}",
    ),
    Column(title="status", value=lambda layer: layer.status),
    Column(title="method", value=lambda layer: layer.method, shared=True),
    Column(title="bits", value=lambda layer: layer.bits, spec="d"),
    Column(title="group", value=lambda layer: layer.group_size, spec="d", shared=True),
    Column(title="bits/weight", value=lambda layer: layer.bits_per_weight, spec=".3f"),
    Column(
        title="size",
        value=_size,
        text=_size_text,
    ),
    Column(title="tokens", value=lambda layer: layer.tokens, spec=",d", shared=True),
    Column(title="damping", value=lambda layer: layer.damping, spec=".2g", shared=True),
    Column(title="deviation", value=lambda layer: layer.deviation, shared=True),
    Column(
        title="its share", value=lambda layer: layer.deviation_strength, spec=".2g", shared=True
    ),
    Column(
        title="its damping", value=lambda layer: layer.deviation_damping, spec=".2g", shared=True
    ),
    *map(_loss, STEPS),
    Column(title="held out", value=series.final_held_out, spec=".3g", bar=True),
    Column(
        title="seconds",
        value=lambda layer: series.seconds(layer) if layer.seconds else None,
        spec=".2f",
    ),
)
