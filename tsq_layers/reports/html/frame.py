"""Columns of a picture of the page, and SVG paths of the marks in them.

Coordinates are those of a drawing ``WIDTH`` wide, which the page scales to fit. Every mark starts
with an M inside its column, by which the page's script finds the column again; only outlines and
levels run over several columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH = 1160
LEFT, RIGHT = 62, 1152  # edges of the plot

_BAR_GAPS = 120  # more bars than this stand side by side without a gap

Height = Callable[[float], float]  # y of a value


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Place of the plot in a drawing: ``count`` columns, ``plot`` high, below ``top``.

    Example:
        >>> frame = Frame(count=4, plot=100)
        >>> frame.dots(lambda value: frame.bottom - 100 * value, [0.5, None, 1.0])
        'M198.25 62h0M743.25 12h0'
    """

    count: int
    plot: int
    top: int = 12

    @property
    def bottom(self) -> int:
        """Return the lower edge of the plot, y."""
        return self.top + self.plot

    @property
    def step(self) -> float:
        """Return the width of a column."""
        return (RIGHT - LEFT) / self.count

    @property
    def dot(self) -> float:
        """Return the diameter of a dot."""
        return min(max(0.95 * self.step, 2.2), 9.0)

    @property
    def bar(self) -> str:
        """Return the CSS classes of bars."""
        return "bar outline" if self.count > _BAR_GAPS else "bar"

    def x(self, index: float) -> float:
        """Return the middle of a column, x."""
        return LEFT + (index + 0.5) * self.step

    def dots(self, y: Height, values: Sequence[float | None]) -> str:
        """Return lines without length, to be drawn with round caps."""
        path = ""
        for i, value in enumerate(values):
            if value is not None:
                path += f"M{_n(self.x(i))} {_n(y(value))}h0"
        return path

    def rings(self, y: Height, values: Sequence[float | None]) -> str:
        """Return circles, half as wide again as dots."""
        radius = _n(0.75 * self.dot)
        diameter = _n(1.5 * self.dot)
        half = f"a{radius} {radius} 0 1 0"
        path = ""
        for i, value in enumerate(values):
            if value is not None:
                start = f"M{_n(self.x(i))} {_n(y(value))}m-{radius} 0"
                path += f"{start}{half} {diameter} 0{half}-{diameter} 0"
        return path

    def stems(self, y: Height, ranges: Sequence[Sequence[float]]) -> str:
        """Return a line from the lowest to the highest value of each column that has several."""
        path = ""
        for i, values in enumerate(ranges):
            if len(values) > 1:
                path += f"M{_n(self.x(i))} {_n(y(min(values)))}V{_n(y(max(values)))}"
        return path

    def levels(self, y: Height, spans: Sequence[tuple[int, int, float]]) -> str:
        """Return a line at a value, over the columns from a start up to an end."""
        return "".join(
            f"M{_n(self.x(a - 0.5))} {_n(y(value))}H{_n(self.x(b - 0.5))}" for a, b, value in spans
        )

    def bars(self, y: Height, bottom: Sequence[float], top: Sequence[float]) -> str:
        """Return a bar for each column; one outline for all, if they are too narrow for gaps."""
        pairs = list(zip(bottom, top, strict=True))
        if all(high <= low for low, high in pairs):
            return ""
        if self.count > _BAR_GAPS:
            return self._outline(y, pairs)
        width = 0.74 * self.step
        path = ""
        for i, (low, high) in enumerate(pairs):
            if high > low:
                left = _n(self.x(i) - width / 2)
                path += f"M{left} {_n(y(low))}V{_n(y(high))}h{_n(width)}V{_n(y(low))}z"
        return path

    def _outline(self, y: Height, pairs: Sequence[tuple[float, float]]) -> str:
        """Return a path along the upper ends of all bars, and back along the lower ones."""
        first_low, _ = pairs[0]
        path = f"M{_n(self.x(-0.5))} {_n(y(first_low))}"
        for i, (_, high) in enumerate(pairs):
            path += f"V{_n(y(high))}H{_n(self.x(i + 0.5))}"
        for i in range(len(pairs) - 1, -1, -1):
            low, _ = pairs[i]
            path += f"V{_n(y(low))}H{_n(self.x(i - 0.5))}"
        return f"{path}z"


def _n(value: float) -> str:
    """Format a number with two decimals at most: a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
