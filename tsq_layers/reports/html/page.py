"""Fill the template of the page, one HTML file, with the contents of a report. Needs jinja2."""

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
    totals = contents.totals
    layers = contents.layers
    parameters = contents.parameters
    columns = [index for index, layer in enumerate(layers) if layer.is_quantized]
    packed_layers = [layers[index] for index in columns]
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
        "losses": loss_chart(packed_layers),
        "bars": bar_charts(packed_layers),
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
    """Return status, number and reason of the layers that did not get what was asked for."""
    by_status: dict[str, list[coverage.Kept]] = {}
    for layer in layers:
        if layer.status in ("fallback", "never called"):
            item = (layer.name, layer.weights, layer.reason)
            by_status.setdefault(layer.status, []).append(item)
    notes = []
    for status, items in by_status.items():
        for group in coverage.grouped(items):
            reason = coverage.common([reason for _, _, reason in group])
            notes.append((status, len(group), reason))
    return notes


def _worst(layers: Sequence[LayerReport]) -> list[tuple[int, LayerReport, float, float]]:
    """Return index, layer, loss, and loss as a share of the highest, for the layers with the highest."""
    losses = []
    for index, layer in enumerate(layers):
        loss = series.final_loss(layer)
        if loss is not None:
            losses.append((loss, index))
    losses.sort(reverse=True)
    rows = []
    for loss, index in losses[:_WORST]:
        highest, _ = losses[0]
        rows.append((index, layers[index], loss, loss / highest if highest else 0.0))
    return rows


def _chips(layers: Sequence[LayerReport]) -> list[tuple[str, int]]:
    """Return last parts of names that several layers have, and how many."""
    tails = Counter(layer.name.rpartition(".")[2] for layer in layers)
    chips = []
    for tail, count in tails.items():
        if count > 1 and not tail.isdecimal():
            chips.append((tail, count))
    return chips[:_CHIPS]


def kept_parameters(parameters: Sequence[ParameterReport]) -> list[KeptParameters]:
    """Return parameters that were not quantised, largest first.

    Those whose names differ in numbers only are one row.
    """
    groups: dict[tuple[object, ...], list[ParameterReport]] = {}
    for item in parameters:
        if item.kept:
            reason = coverage.without_numbers(item.reason)
            key = (_starred(item.name), item.shape, item.dtype, reason)
            groups.setdefault(key, []).append(item)
    rows = [_kept_row(items) for items in groups.values()]
    return sorted(rows, key=lambda row: -row.size * row.share)


def _starred(name: str) -> str:
    """Return a name with a star for each number."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _kept_row(items: Sequence[ParameterReport]) -> KeptParameters:
    first = items[0]
    kept_entries = sum(item.kept for item in items)
    entries = sum(item.numel for item in items)
    return KeptParameters(
        name=first.name if len(items) == 1 else _starred(first.name),
        count=len(items),
        shape="×".join(map(str, first.shape)) or "scalar",
        dtype=first.dtype,
        size=sum(item.bytes for item in items),
        share=kept_entries / entries,
        reason=coverage.common([item.reason for item in items]),
    )


def _settings(config: QuantConfig) -> list[tuple[str, str, bool]]:
    """Return every field of the configuration, its value, and whether it is not the default."""
    # A method brings defaults of its own, which are no choice of the user; the method itself is one.
    default = QuantConfig(method=config.method).values() | {"method": QuantConfig().method}
    values = config.values()
    del values["overrides"]
    return [(name, _setting(value), value != default[name]) for name, value in values.items()]


def _overrides(config: QuantConfig) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return every pattern with the fields that it changes."""
    rows = []
    for pattern, changes in config.overrides.items():
        fields = [(name, _setting(value)) for name, value in changes.items()]
        rows.append((pattern, fields))
    return rows


def _setting(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or _BLANK
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return str(value)
