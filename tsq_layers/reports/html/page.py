"""The report as one HTML file: what the template is filled with. Needs jinja2."""

import base64
import hashlib
import importlib.resources
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsq_layers.config import QuantConfig
from tsq_layers.reports import gaps as coverage
from tsq_layers.reports import series, table
from tsq_layers.reports.extras import required
from tsq_layers.reports.html import headlines
from tsq_layers.reports.html.charts import bar_charts, loss_chart
from tsq_layers.reports.html.frame import WIDTH
from tsq_layers.reports.html.heat import LEVELS, heat_map
from tsq_layers.reports.html.listing import listing
from tsq_layers.reports.layer import LayerReport
from tsq_layers.reports.parameter import ParameterReport
from tsq_layers.reports.totals import Totals

_WORST = 10
_KEPT = 200  # rows of the list of parameters that were not quantised
_CHIPS = 12
_BLANK = table.BLANK


@dataclass(frozen=True, kw_only=True)
class KeptParameters:
    """Parameters of one shape that were not quantised: name, number, bytes of all, and how much of them was kept."""

    name: str
    count: int
    shape: str
    dtype: str
    size: int
    share: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of a page."""

    totals: Totals
    layers: Sequence[LayerReport]
    parameters: Sequence[ParameterReport]
    config: QuantConfig


def write(contents: Contents, path: str | os.PathLike[str], title: str) -> None:
    """Write the page; :meth:`tsq_layers.Report.to_html` says how, and what it raises."""
    Path(path).write_text(render(contents, title), encoding="utf-8")


def render(contents: Contents, title: str) -> str:
    """Return the page. Names and reasons are escaped; the only script that a browser may run is the page's own."""
    jinja2 = required("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": table.format_bytes,
        "percent": table.share,
        "short": headlines.short,
    }
    script = _source("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("page.html").render(
        title=title,
        script=script,
        script_digest=digest,
        style=_source("page.css"),
        **_context(contents),
    )
    return str(page)


def _source(name: str) -> str:
    return (
        importlib.resources.files("tsq_layers.reports.html")
        .joinpath("templates", name)
        .read_text(encoding="utf-8")
    )


def _context(contents: Contents) -> dict[str, Any]:
    """Return the variables of the template."""
    totals, layers, parameters = contents.totals, contents.layers, contents.parameters
    columns = [index for index, layer in enumerate(layers) if layer.is_quantized]
    quantized = [layer for layer in layers if layer.is_quantized]
    gaps = kept_parameters(parameters)
    return {
        "layers": layers,
        "parameters": parameters,
        "versions": totals.versions,
        "width": WIDTH,
        "levels": LEVELS,
        "how": headlines.how(contents.config),
        "tiles": headlines.tiles(totals, layers, parameters),
        "sizes": headlines.sizes(totals, layers, parameters),
        "parts": headlines.coverage_parts(totals, layers, parameters),
        "notes": _notes(layers),
        "worst": _worst(layers),
        "losses": loss_chart(quantized),
        "bars": bar_charts(quantized),
        "columns": " ".join(map(str, columns)),
        "heat": heat_map(layers),
        "chips": _chips(layers),
        "statuses": list(dict.fromkeys(layer.status for layer in layers)),
        "listing": listing(layers),
        "kept": gaps[:_KEPT],
        "more_kept": len(gaps[_KEPT:]),
        "settings": _settings(contents.config),
        "overrides": _overrides(contents.config),
    }


def _notes(layers: Sequence[LayerReport]) -> list[tuple[str, int, str]]:
    """Status, number and reason of the layers that did not get what was asked for."""
    incomplete = [layer for layer in layers if layer.status in ("fallback", "never called")]
    notes: list[tuple[str, int, str]] = []
    for status in dict.fromkeys(layer.status for layer in incomplete):
        items = [
            (layer.name, layer.weights, layer.reason)
            for layer in incomplete
            if layer.status == status
        ]
        notes += [
            (status, len(group), coverage.common([reason for _, _, reason in group]))
            for group in coverage.grouped(items)
        ]
    return notes


def _worst(layers: Sequence[LayerReport]) -> list[tuple[int, LayerReport, float, float]]:
    """Index, layer, loss, and loss as a share of the highest, for the layers with the highest."""
    losses = [
        (loss, index)
        for index, loss in enumerate(map(series.final_loss, layers))
        if loss is not None
    ]
    highest = sorted(losses, reverse=True)[:_WORST]
    return [
        (index, layers[index], loss, loss / highest[0][0] if highest[0][0] else 0.0)
        for loss, index in highest
    ]


def _chips(layers: Sequence[LayerReport]) -> list[tuple[str, int]]:
    """Last parts of names that several layers have, and how many."""
    tails = Counter(layer.name.rpartition(".")[2] for layer in layers)
    return [(tail, count) for tail, count in tails.items() if count > 1 and not tail.isdecimal()][
        :_CHIPS
    ]


def kept_parameters(parameters: Sequence[ParameterReport]) -> list[KeptParameters]:
    """Return parameters that were not quantised, largest first.

    Those whose names differ in numbers only are one row.
    """
    groups: dict[tuple[object, ...], list[ParameterReport]] = {}
    for item in parameters:
        if item.kept:
            name = ".".join("*" if part.isdecimal() else part for part in item.name.split("."))
            groups.setdefault(
                (name, item.shape, item.dtype, coverage.without_numbers(item.reason)), []
            ).append(item)
    rows = [
        KeptParameters(
            name=items[0].name if len(items) == 1 else str(name),
            count=len(items),
            shape="×".join(map(str, items[0].shape)) or "scalar",
            dtype=items[0].dtype,
            size=sum(item.bytes for item in items),
            share=sum(item.kept for item in items) / sum(item.numel for item in items),
            reason=coverage.common([item.reason for item in items]),
        )
        for (name, *_), items in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.size * row.share)


def _settings(config: QuantConfig) -> list[tuple[str, str, bool]]:
    """Every field of the configuration, its value, and whether it is not the default."""
    default = QuantConfig(method=config.method).values() | {"method": QuantConfig().method}
    values = config.values()
    del values["overrides"]
    return [(name, _setting(value), value != default[name]) for name, value in values.items()]


def _overrides(config: QuantConfig) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every pattern with the fields that it changes."""
    patterns = config.overrides.items()
    return [
        (pattern, [(name, _setting(value)) for name, value in changes.items()])
        for pattern, changes in patterns
    ]


def _setting(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or _BLANK
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
