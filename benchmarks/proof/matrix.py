"""Models × methods × what configurations add × ways of calibrating: the cases of the table."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

import tsq_layers as tsq
from benchmarks.proof.artefacts import record_files, record_model, record_plan, record_state
from benchmarks.proof.case import Case
from benchmarks.proof.library import configured
from benchmarks.proof.models import MODELS, Model
from benchmarks.proof.record import Record

IN_FULL = ("llama", "t5", "vision", "mixtral")
"""Models of the whole table; the others take part in other cases."""

TRAITS: dict[str, dict[str, Any]] = {
    "symmetric": {"bits": 4, "symmetric": True},
    "integer": {"bits": 3},
    "float": {"bits": 2, "zero_points": "float"},
    "tables-row": {"bits": 2, "codebook": "row"},
    "tables-group": {"bits": 3, "codebook": "group"},
    "rotation": {"bits": 3, "rotation": 16},
    "outliers": {"bits": 3, "outliers": 0.02},
    "outlier-columns": {"bits": 3, "outlier_columns": 2},
    "inputs": {"bits": 4, "activation_bits": 8},
}

_PLAIN = ("symmetric", "integer", "rotation", "inputs")

VALID: dict[str, tuple[str, ...]] = {
    "rtn": _PLAIN,
    "gptq": _PLAIN,
    "quantease": (*_PLAIN, "outliers", "outlier-columns"),
    "cdquant": _PLAIN,
    "lnq": ("tables-row", "tables-group", "rotation", "inputs"),
    "two-stage": (*_PLAIN, "float"),
    "best": (*_PLAIN, "float"),
}
"""Method → what it makes use of; the rest it refuses, or accepts and ignores."""

# "best" has offsets and a rotation where nothing else is said.
_BEST_WITHOUT = {"zero_points": "integer", "rotation": None}

_ALL_WAYS = ("paired", "one-pass", "resumed")
_OTHER_WAYS = {"rtn": ("no-data",), "gptq": ("paired", "resumed")}  # what is paired, it ignores

FORMATS: dict[str, tuple[str, ...]] = {
    "symmetric": ("gptq", "gptq-v1", "compressed-tensors", "gguf"),
    "integer": ("gptq", "compressed-tensors"),
}
"""What has files of other engines; version 1 of gptq has no zero points of 0."""


class InterruptedRun(Exception):
    """The end of a calibration before its time."""


def cases() -> Iterator[Case]:
    """List the cases of the table."""
    for name in IN_FULL:
        for method, traits in VALID.items():
            for trait in traits:
                for way in _OTHER_WAYS.get(method, _ALL_WAYS):
                    formats = FORMATS.get(trait, ()) if name == "llama" else ()
                    fields = fields_of(MODELS[name], method, trait)
                    run = functools.partial(
                        record_case,
                        name=name,
                        fields=fields,
                        way=way,
                        formats=formats,
                    )
                    yield Case(f"{name}/{method}/{trait}/{way}", run)


def fields_of(kind: Model, method: str, trait: str) -> dict[str, Any]:
    """Combine a method and a trait to the fields of a configuration."""
    without = _BEST_WITHOUT if method == "best" and trait != "float" else {}
    overrides = {"overrides": kind.overrides} if trait == "inputs" and kind.overrides else {}
    plain = {"method": method, "group_size": kind.group_size}
    return {**plain, **without, **overrides, **TRAITS[trait]}


def record_case(
    record: Record,
    *,
    name: str,
    fields: dict[str, Any],
    way: str,
    formats: tuple[str, ...] = (),
) -> None:
    """Quantise a model in one of the ways, and keep all that comes of it."""
    kind, config = MODELS[name], configured(**fields)
    if way == "resumed":
        # The rest follows from the tensors, which are those of the paired way.
        record_state(record, resumed(record, kind, config, record.folder / "journal"))
        return
    batches = [] if way == "no-data" else kind.batches()
    example, paired = next(iter(batches), None), way == "paired"
    if _is_planned(fields["method"], way):
        plan = tsq.plan(kind.build(), config, example, len(batches), paired=paired)
        record_plan(record, plan)
    if way == "no-data":
        model = tsq.quantize(kind.build(), config)
    else:
        others = kind.batches(1, seed=2)
        model = tsq.quantize(kind.build(), config, batches, held_out=others, paired=paired)
    if way == "one-pass":
        record_state(record, model)
        return
    record_model(record, model, kind.batches(1)[0])
    record_files(record, model, kind, formats)


def _is_planned(method: str, way: str) -> bool:
    """Leave out plans that say nothing new: methods that need the same have the same plan."""
    if way == "one-pass":
        return method == "two-stage"
    return method in ("rtn", "quantease", "lnq", "two-stage", "best")


def resumed(record: Record, kind: Model, config: tsq.QuantConfig, folder: Path) -> nn.Module:
    """Break a calibration off half way, begin again with a new model, and go on to the end."""
    first = tsq.prepare(kind.build(), config)
    handle = _break_off(first.get_submodule(kind.halfway))
    try:
        tsq.calibrate(first, kind.batches(), paired=True, checkpoint_dir=folder)
    except InterruptedRun:
        handle.remove()
    else:
        raise AssertionError("the calibration was not broken off")
    kept = sum(path.is_file() for path in folder.rglob("*"))
    second = tsq.prepare(kind.build(), config)
    tsq.calibrate(second, kind.batches(), paired=True, checkpoint_dir=folder)
    whole = sum(path.is_file() for path in folder.rglob("*"))
    assert 1 < kept < whole, "nothing was kept, or everything"
    record.values("journal", {"kept": kept, "whole": whole})
    return tsq.convert(second)


def _break_off(module: nn.Module) -> Any:
    """Let the second call of a module fail: the first is that of the recording pass."""
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise InterruptedRun

    return module.register_forward_pre_hook(hook)
