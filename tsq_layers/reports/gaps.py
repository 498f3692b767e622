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
        """Return the name of a single one, or the number of several."""
        return self.names[0] if len(self.names) == 1 else f"in {len(self.names)} {self.kind}"


def share_of_entries(parameters: Sequence[ParameterReport]) -> float:
    """Return quantised entries as a part, 0 to 1, of all entries; 0 if there are none."""
    total = sum(parameter.numel for parameter in parameters)
    quantized = sum(parameter.quantized for parameter in parameters)
    return quantized / total if total else 0.0


def share_of_bytes(parameters: Sequence[ParameterReport]) -> float:
    """Return bytes of the float model whose entries were quantised, as a part of all; 0 if there are none."""
    total = sum(parameter.bytes for parameter in parameters)
    quantized = sum(parameter.quantized * parameter.itemsize for parameter in parameters)
    return quantized / total if total else 0.0


def largest(parameters: Sequence[ParameterReport], count: int) -> tuple[ParameterReport, ...]:
    """Return the ``count`` parameters with most entries that were not quantised, most first."""
    partial = [parameter for parameter in parameters if parameter.kept]
    partial.sort(key=lambda parameter: parameter.kept, reverse=True)
    return tuple(partial[:count])


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
    items: list[Kept] = []
    if parameters:
        kind = "parameters"
        total = sum(parameter.numel for parameter in parameters)
        for parameter in parameters:
            if parameter.kept:
                items.append((parameter.name, parameter.kept, parameter.reason))
    else:
        kind = "layers"
        total = sum(layer.weights for layer in layers)
        for layer in layers:
            if not layer.is_quantized and layer.weights:
                items.append((layer.name, layer.weights, layer.reason or layer.status))
    gaps = [_gap(group, kind, total) for group in grouped(items)]
    return sorted(gaps, key=lambda gap: gap.entries, reverse=True)


def _gap(items: list[Kept], kind: str, total: int) -> Gap:
    items = sorted(items, key=lambda item: item[1], reverse=True)
    entries = sum(count for _, count, _ in items)
    return Gap(
        reason=common([reason for _, _, reason in items]),
        kind=kind,
        names=tuple(name for name, _, _ in items),
        entries=entries,
        share=entries / total,
    )


def grouped(items: Iterable[Kept]) -> list[list[Kept]]:
    """Group items whose reasons are the same but for numbers in them."""
    groups: dict[tuple[str, ...], list[Kept]] = defaultdict(list)
    for item in items:
        _, _, reason = item
        groups[without_numbers(reason)].append(item)
    return list(groups.values())


def without_numbers(reason: str) -> tuple[str, ...]:
    """Return a reason without its numbers: the same for reasons that differ in numbers only."""
    return tuple(_NUMBER.split(reason)[::2])


def common(reasons: Sequence[str]) -> str:
    """Return reasons that differ in their numbers only, as one; an ellipsis stands where they differ."""
    columns = zip(*map(_NUMBER.split, reasons), strict=True)
    parts = []
    for variants in columns:
        same = len(set(variants)) == 1
        parts.append(variants[0] if same else "…")
    return "".join(parts)
