"""Print the results of commands: lines for readers, and JSON for programs."""

import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from tsq_layers.reports import STEPS, report_of


def write(line: str = "") -> None:
    """Write one line of result on stdout, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def write_summary(model: nn.Module) -> None:
    """Write the first lines of a model's report."""
    for line in str(report_of(model)).split("\n\n")[0].splitlines():
        write(line)


def write_json(values: Any) -> None:
    """Write a JSON object."""
    write(json.dumps(values, ensure_ascii=False, allow_nan=False))


def summary(model: nn.Module, out: Path, form: str) -> dict[str, Any]:
    """Return what programs are told about a model that was written."""
    report = report_of(model)
    losses = {}
    for step in STEPS:
        values = [layer.losses[step] for layer in report.quantized if step in layer.losses]
        if values:
            losses[step] = sum(values) / len(values)
    return {
        "out": str(out),
        "format": form,
        "layers": len(report.layers),
        "quantized": len(report.quantized),
        "coverage": report.coverage,
        "bits_per_weight": report.bits_per_weight,
        "size_before": report.size_before,
        "size_after": report.size_after,
        "seconds": report.seconds,
        "mean_losses": losses,
    }
