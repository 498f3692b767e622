"""What is looked at of a quantised model: tensors, outputs, report, plan, files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tsq_layers as tsq
from benchmarks.proof.library import report_of, write_checkpoint
from benchmarks.proof.models import Model, output
from benchmarks.proof.record import Record

_ROWS = (1, 8, 40)  # one, the few that are done in one pass over the words, and many

# In float64 the library's own operations for a CPU do not run: the plain path does.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LOSSES = ("losses", "held_out_losses", "objective")


def record_model(record: Record, model: nn.Module, batch: Any, prefix: str = "") -> None:
    """Keep tensors, outputs and report."""
    record_state(record, model, prefix)
    record.tensors(f"{prefix}output", {"output": output(model, batch)})
    record_layers(record, model, prefix)
    record.text(f"{prefix}report/text", str(timeless(report_of(model))))


def record_state(record: Record, model: nn.Module, prefix: str = "") -> None:
    """Keep all tensors and the report."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    record.tensors(f"{prefix}state", state)
    record_report(record, report_of(model), prefix)


def packed(model: nn.Module) -> Iterator[tuple[str, tsq.QuantLinear]]:
    """Find the packed layers."""
    for name, module in model.named_modules():
        if isinstance(module, tsq.QuantLinear):
            yield name, module


def record_layers(record: Record, model: nn.Module, prefix: str = "") -> None:
    """Keep what every packed layer makes of inputs of every dtype, and of a few and many rows."""
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        for rows in _ROWS:
            found = {key: _forward(layer, rows, dtype) for key, layer in packed(model)}
            record.tensors(f"{prefix}forward-{rows}-{name}", found)
        weights = {key: layer.dequantize(dtype) for key, layer in packed(model)}
        record.tensors(f"{prefix}weight-{name}", weights)
    gradients = {key: _gradient(layer) for key, layer in packed(model)}
    record.tensors(f"{prefix}gradient", gradients)


def _inputs(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def _forward(layer: tsq.QuantLinear, rows: int, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        found: Tensor = layer(_inputs(rows, layer.in_features).to(dtype))
    return found


def _gradient(layer: tsq.QuantLinear) -> Tensor | None:
    x = _inputs(3, layer.in_features).requires_grad_()
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    return found


def record_report(record: Record, report: tsq.Report, prefix: str = "") -> None:
    """Keep the report, losses apart from the rest of the layers."""
    values = json.loads(report.to_json())
    for field in _LOSSES:
        found = {layer["name"]: layer.pop(field) for layer in values["layers"]}
        record.values(f"{prefix}report/{field}", found)
    record.values(f"{prefix}report/layers", values.pop("layers"))
    record.values(f"{prefix}report/parameters", values.pop("parameters"))
    record.values(f"{prefix}report/rest", values)


def timeless(report: tsq.Report) -> tsq.Report:
    """Make a report in which nothing took any time, and no version is named."""
    values = json.loads(report.to_json())
    values["seconds"], values["versions"] = 0.0, {}
    for layer in values["layers"]:
        layer["seconds"] = {}
    return tsq.Report.from_json(json.dumps(values))


def record_plan(record: Record, plan: tsq.Plan, prefix: str = "") -> None:
    """Keep a plan: stages, layers, totals, and the table."""
    values = json.loads(plan.to_json())
    record.values(f"{prefix}plan/stages", values.pop("stages"))
    record.values(f"{prefix}plan/layers", values.pop("layers"))
    record.values(f"{prefix}plan/rest", values)
    record.text(f"{prefix}plan/table", plan.table())


def record_files(record: Record, model: nn.Module, kind: Model, formats: tuple[str, ...]) -> None:
    """Keep all files, and what a model computes that was loaded from them."""
    batch, folder = kind.batches(1)[0], record.folder
    tsq.save(model, folder / "save")
    record.files("save", folder / "save")
    loaded = tsq.load(folder / "save", kind.build())
    record.tensors("load/output", {"output": output(loaded, batch)})
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "pretrained")
        record.files("pretrained", folder / "pretrained")
        loaded = tsq.load(folder / "pretrained", kind.build())
        record.tensors("load-pretrained/output", {"output": output(loaded, batch)})
    for form in formats:
        record_export(record, model, folder / "exported" / form, form)


def record_export(
    record: Record,
    model: nn.Module,
    folder: Path,
    form: str,
    **options: Any,
) -> None:
    """Keep the files of one format of another engine."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(model, folder, format=form, **options)
    record.files(f"export-{form}", folder)
