"""Measure how much of a model was quantised, and group the rest by the reason."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tsq_layers.reports.layer import LayerReport
from tsq_layers.reports.parameter import ParameterReport

Kept = tuple[str, int, str]  # name, entries that were kept, reason

_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Parameters or layers that were not quantised for one reason.

    Args:
        reason: the reason; where a number differs from one parameter to the next, an ellipsis.
        kind: ``"parameters"``, or ``"layers"`` in a report that lists no parameters.
        names: of these, largest first.
        entries: how many of their entries were kept.
        share: the same as a part, 0 to 1, of all entries of the model.
    """

    reason: str
    kind: str
    names: tuple[str, ...]
    entries: int
    share: float

    @property
    def place(self) -> str:
        """The name of a single one, or in how many."""
        return self.names[0] if len(self.names) == 1 else f"in {len(self.names)} {self.kind}"


def share_of_entries(parameters: Sequence[ParameterReport]) -> float:
    """Quantised entries as a part, 0 to 1, of all entries; 0 if there are none."""
    total = sum(parameter.numel for parameter in parameters)
    return sum(parameter.quantized for parameter in parameters) / total if total else 0.0


def share_of_bytes(parameters: Sequence[ParameterReport]) -> float:
    """Bytes of the float model whose entries were quantised, as a part of all; 0 if there are none."""
    total = sum(parameter.bytes for parameter in parameters)
    return (
        sum(parameter.quantized * parameter.itemsize for parameter in parameters) / total
        if total
        else 0.0
    )


def largest(parameters: Sequence[ParameterReport], count: int) -> tuple[ParameterReport, ...]:
    """The ``count`` parameters with most entries that were not quantised, most first."""
    partial = [parameter for parameter in parameters if parameter.kept]
    return tuple(sorted(partial, key=lambda parameter: -parameter.kept)[:count])


def by_reason(layers: Sequence[LayerReport], parameters: Sequence[ParameterReport]) -> list[Gap]:
    """Group what was not quantised by its reason, largest first; layers if there are no parameters.

    Example:
        >>> parameters = [
        ...     ParameterReport(
        ...         name=f"{n}.experts", shape=(4, 2), dtype="float32", quantized=2 * n,
        ...         reason=f"{4 - n} of 4 unused",
        ...     )
        ...     for n in (1, 2)
        ... ]
        >>> by_reason([], parameters)
        [Gap(reason='… of 4 unused', kind='parameters', names=('1.experts', '2.experts'), entries=10, share=0.625)]
    """
    if parameters:
        kind = "parameters"
        total = sum(parameter.numel for parameter in parameters)
        items = [(item.name, item.kept, item.reason) for item in parameters if item.kept]
    else:
        kind = "layers"
        total = sum(layer.weights for layer in layers)
        others = [layer for layer in layers if not layer.is_quantized and layer.weights]
        items = [(layer.name, layer.weights, layer.reason or layer.status) for layer in others]
    gaps = [_gap(group, kind, total) for group in grouped(items)]
    return sorted(gaps, key=lambda gap: -gap.entries)


def _gap(items: list[Kept], kind: str, total: int) -> Gap:
    items = sorted(items, key=lambda item: -item[1])
    entries = sum(count for _, count, _ in items)
    reason, names = common([reason for _, _, reason in items]), tuple(name for name, _, _ in items)
    return Gap(reason=reason, kind=kind, names=names, entries=entries, share=entries / total)


def grouped(items: Iterable[Kept]) -> list[list[Kept]]:
    """Items whose reasons are the same but for numbers in them."""
    groups: dict[tuple[str, ...], list[Kept]] = defaultdict(list)
    for item in items:
        groups[without_numbers(item[2])].append(item)
    return list(groups.values())


def without_numbers(reason: str) -> tuple[str, ...]:
    """Return a reason without its numbers: the same for reasons that differ in numbers only."""
    return tuple(_NUMBER.split(reason)[::2])


def common(reasons: Sequence[str]) -> str:
    """Reasons that differ in their numbers only, as one; an ellipsis stands where they differ."""
    parts = zip(*(_NUMBER.split(reason) for reason in reasons), strict=True)
    return "".join(part[0] if len(set(part)) == 1 else "…" for part in parts)
