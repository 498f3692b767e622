"""What the proof asks of the library, by names that exist before and after a renaming."""

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

from torch import nn

import tsq_layers as tsq

# The part of the library with names for layers of other kinds: up to 0.1, the library itself.
extenders: Any = tsq.layers if hasattr(tsq.layers, "register") and "layers" in tsq.__all__ else tsq

_SCHEMA = 1  # of the JSON that every version reads


def configured(**fields: Any) -> tsq.QuantConfig:
    """Build a configuration from fields of schema 1; those not given take its defaults."""
    return tsq.QuantConfig.from_json(json.dumps({"schema_version": _SCHEMA, **fields}))


def write_checkpoint(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Write a quantised model as files of another engine."""
    export = getattr(tsq, "export_checkpoint", None) or tsq.export
    return Path(export(model, folder, **options))


def report_of(model: nn.Module) -> tsq.Report:
    """Find the report of a converted model."""
    found = getattr(model, "tsq_report", None)
    assert isinstance(found, tsq.Report)
    return found


def root() -> Path:
    """Find the directory of the source tree that the library is imported from."""
    assert tsq.__file__ is not None
    return Path(tsq.__file__).resolve().parent.parent


def version() -> str:
    """Name the version of the library."""
    try:
        found = importlib.metadata.version("tsq_layers")
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    return str(getattr(tsq, "__version__", found))


def commit() -> str:
    """Name the commit of the source tree, and say if the library there was changed since."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "tsq_layers")
    return f"{head}, changed" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(root()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else "unknown"
