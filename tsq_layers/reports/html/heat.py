"""A map of the loss of every layer: names of layers from top to bottom, blocks from left to right."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tsq_layers.reports import series
from tsq_layers.reports.layer import LayerReport

LEVELS = 9

_MOST_ROWS = 48
_FEWEST_COLUMNS = 3
# This part of the fields shares the lowest shade: a few tiny losses must not take most of the shades.
_LOWEST = 0.05


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One field: place, shade (0 is the lowest loss, ``LEVELS`` - 1 the highest), and the layer it stands for."""

    row: int
    column: int
    level: int
    layer: int
    layers: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Names of rows and columns, the fields, and the range of losses that the shades span; some lie below it."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    low: float
    high: float


def heat_map(layers: Sequence[LayerReport]) -> HeatMap | None:
    """Return the map of the final losses, or ``None`` for a model not made of blocks of several layers.

    The first number in a layer's name is its column, the rest of the name its row. Layers that
    differ only in a later number (experts, say) share a field, which shows the highest loss.

    Args:
        layers: all layers of a report; a :class:`Cell` gives the index of its layer among them.
    """
    fields = _fields(layers)
    rows = list(dict.fromkeys(row for row, _ in fields))
    columns = sorted({column for _, column in fields}, key=int)
    if not 2 <= len(rows) <= _MOST_ROWS or len(columns) < _FEWEST_COLUMNS:
        return None
    if len(fields) < 2 * len(rows):
        return None
    highest = {place: max(layers_there) for place, layers_there in fields.items()}
    losses = sorted(loss for loss, _ in highest.values())
    low = losses[int(_LOWEST * len(losses))]
    high = losses[-1]
    cells = []
    for (row, column), (loss, index) in highest.items():
        cell = Cell(
            row=rows.index(row),
            column=columns.index(column),
            level=_level(loss, low, high),
            layer=index,
            layers=len(fields[row, column]),
            loss=loss,
        )
        cells.append(cell)
    labels = tuple(_labels(rows))
    return HeatMap(rows=labels, columns=tuple(columns), cells=tuple(cells), low=low, high=high)


def _fields(layers: Sequence[LayerReport]) -> dict[tuple[str, str], list[tuple[float, int]]]:
    """Return row and column → final loss and index of each layer there."""
    fields: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for index, layer in enumerate(layers):
        place = _place(layer.name)
        loss = series.positive(series.final_loss(layer))
        if place is not None and loss is not None:
            fields.setdefault(place, []).append((loss, index))
    return fields


def _place(name: str) -> tuple[str, str] | None:
    """Return row and column of a layer: its name with a star for each number, and the first number."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdecimal()]
    if not numbers:
        return None
    row = ".".join("*" if part.isdecimal() else part for part in parts)
    return row, numbers[0]


def _level(loss: float, low: float, high: float) -> int:
    if loss <= low:
        return 0
    return min(int(LEVELS * math.log(loss / low) / math.log(high / low)), LEVELS - 1)


def _labels(rows: Sequence[str]) -> Sequence[str]:
    """Return rows without what stands up to the first star, if they can still be told apart."""
    labels = []
    for row in rows:
        _, _, tail = row.partition("*")
        labels.append(tail.lstrip(".") or row)
    return labels if len(set(labels)) == len(labels) else rows
