"""`tsq inspect`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from tsq_layers.cli import models, options
from tsq_layers.cli.output import write
from tsq_layers.errors import ConfigError
from tsq_layers.formats.tsq.description import DESCRIPTION_FILE, Description
from tsq_layers.formats.tsq.headers import description_from_headers, is_described, outlined
from tsq_layers.integrations.texts import read_text
from tsq_layers.reports import STEPS, LayerReport, Report, format_bytes, report_of
from tsq_layers.reports.table import BLANK, aligned

_OBJECTIVES = ("assign", "descent", "exact")


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument(
        "model",
        metavar="DIR",
        help="directory that tsq quantize wrote, or a GPTQ or compressed-tensors one",
    )
    options.add_json(command, "the whole report")
    command.add_argument(
        "--html", metavar="FILE.html", help="write the report as a page for a browser"
    )
    command.add_argument(
        "--plot",
        metavar="FILE.png",
        help="draw loss, bits and seconds of every layer; or .svg, .pdf",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read the report, and show it."""
    report = _report(Path(arguments.model))
    files = _report_files(report, arguments)
    if arguments.json:
        write(report.to_json())
        return
    for line in str(report).split("\n\n")[0].splitlines():
        write(line)
    write()
    for line in files or _layer_table(report.layers):
        write(line)


def _report(directory: Path) -> Report:
    if models.is_foreign(directory):
        return report_of(models.load(directory))
    path = directory / DESCRIPTION_FILE
    if is_described(directory):
        report = Description.from_json(read_text(path)).report
    else:
        outline = outlined(directory)
        if outline is None:
            raise ConfigError(
                f"{directory} holds no {DESCRIPTION_FILE} that describes its tensors: give a "
                "directory that tsq quantize or tsq.save wrote"
            )
        report = description_from_headers(directory, outline).report
    if report is None:
        raise ConfigError(
            f"{path} holds no report: the model was not made by tsq.quantize or tsq.convert"
        )
    return report


def _report_files(report: Report, arguments: argparse.Namespace) -> list[str]:
    """Write the page and the picture that were asked for; return a line about each."""
    title = Path(arguments.model).resolve().name
    writers = {
        "page": (arguments.html, lambda file: report.to_html(file, title=title)),
        "picture": (arguments.plot, report.plot),
    }
    lines = []
    for kind, (file, writer) in writers.items():
        if file is None:
            continue
        try:
            writer(file)
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror or error}") from error
        lines.append(f"{kind}: {file}")
    return lines


def _layer_table(layers: Sequence[LayerReport]) -> list[str]:
    """Return one aligned line a layer.

    It shows bits, size, the loss after each step, and the objective of stage 2 by either solver.
    """
    steps = [step for step in STEPS if any(step in layer.losses for layer in layers)]
    solvers = []
    for solver in _OBJECTIVES:
        if any(solver in layer.objective for layer in layers):
            solvers.append(solver)
    titles = ["layer", "shape", "method", "bits", "group", "bits/weight", "size"]
    titles += [f"{step} loss" for step in steps]
    titles += [f"{solver} objective" for solver in solvers]
    rows = [[*titles, "status"]]
    for layer in layers:
        values = [
            layer.name or "(model)",
            f"{layer.rows}×{layer.columns}",
            layer.method,
            layer.bits,
            layer.group_size,
            layer.bits_per_weight,
            _size(layer),
            *map(layer.losses.get, steps),
            *map(layer.objective.get, solvers),
        ]
        status = f"{layer.status}: {layer.reason}" if layer.reason else layer.status
        rows.append([*map(_cell, values), status])
    return aligned(list(zip(*rows, strict=True)), ("layer", "status"))


def _size(layer: LayerReport) -> str | None:
    if layer.bits_per_weight is None:
        return None
    return format_bytes(round(layer.weights * layer.bits_per_weight / 8))


def _cell(value: object) -> str:
    if value is None:
        return BLANK
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else BLANK
    return str(value)
