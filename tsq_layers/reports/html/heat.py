"""The loss of every layer as a map: what a layer is called from top to bottom, its block from left to right."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tsq_layers.reports import series
from tsq_layers.reports.layer import LayerReport

LEVELS = 9

_MOST_ROWS = 48
_FEWEST_COLUMNS = 3
_LOWEST = 0.05  # this part of the fields shares the lowest shade: a few tiny losses must not take most of the shades


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
    """The map of the final losses, or ``None`` for a model that is not made of blocks of several layers.

    The first number in a layer's name is its column, the rest of the name its row. Layers that
    differ only in a later number (experts, say) share a field, which shows the highest loss.

    Args:
        layers: all layers of a report; a :class:`Cell` gives the index of its layer among them.
    """
    fields: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for index, layer in enumerate(layers):
        place, loss = _place(layer.name), series.positive(series.final_loss(layer))
        if place is not None and loss is not None:
            fields.setdefault(place, []).append((loss, index))
    rows = list(dict.fromkeys(row for row, _ in fields))
    columns = sorted({column for _, column in fields}, key=int)
    if (
        not 2 <= len(rows) <= _MOST_ROWS
        or len(columns) < _FEWEST_COLUMNS
        or len(fields) < 2 * len(rows)
    ):
        return None
    worst = {place: max(place_losses) for place, place_losses in fields.items()}
    losses = sorted(loss for loss, _ in worst.values())
    low, high = losses[int(_LOWEST * len(losses))], losses[-1]
    cells = [
        Cell(
            row=rows.index(row),
            column=columns.index(column),
            level=_level(loss, low, high),
            layer=index,
            layers=len(fields[row, column]),
            loss=loss,
        )
        for (row, column), (loss, index) in worst.items()
    ]
    return HeatMap(
        rows=tuple(_labels(rows)), columns=tuple(columns), cells=tuple(cells), low=low, high=high
    )


def _place(name: str) -> tuple[str, str] | None:
    """Row and column of a layer: its name with a star for each number, and the first number."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdecimal()]
    return (
        (".".join("*" if part.isdecimal() else part for part in parts), numbers[0])
        if numbers
        else None
    )


def _level(loss: float, low: float, high: float) -> int:
    if loss <= low:
        return 0
    return min(int(LEVELS * math.log(loss / low) / math.log(high / low)), LEVELS - 1)


def _labels(rows: Iterable[str]) -> list[str]:
    """Rows without what stands up to the first star, if they can still be told apart."""
    rows = list(rows)
    short = [row.split("*", 1)[1].lstrip(".") or row for row in rows]
    return short if len(set(short)) == len(short) else rows
