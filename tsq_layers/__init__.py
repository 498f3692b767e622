"""Quantise the weights of any PyTorch model to 2, 3 or 4 bits.

Observers attach (:func:`prepare`), a calibration runs (:func:`calibrate`), layers are replaced
(:func:`convert`); :func:`quantize` is the three in one call. Layers of other kinds are registered
with :mod:`tsq_layers.layers`.
"""

import warnings
from typing import Any

from tsq_layers import layers, reports, solver
from tsq_layers.config import QuantConfig
from tsq_layers.config.versions import VERSION as __version__
from tsq_layers.errors import TSQDeprecationWarning
from tsq_layers.evaluation import perplexity
from tsq_layers.formats import export_checkpoint, import_checkpoint
from tsq_layers.formats.tsq import load, save
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.observer import HessianObserver
from tsq_layers.planning import Plan, plan
from tsq_layers.reports import Report
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.warmup import warmup
from tsq_layers.solver import TwoStageGroupQuantizer
from tsq_layers.workflow.conversion import convert
from tsq_layers.workflow.folding import fold_scaling
from tsq_layers.workflow.pipeline import calibrate, prepare, quantize, unprepare
from tsq_layers.workflow.refinement import refine

__all__ = [
    "HessianObserver",
    "LayerStatistics",
    "Plan",
    "QuantConfig",
    "QuantLinear",
    "QuantizedWeight",
    "Report",
    "TwoStageGroupQuantizer",
    "__version__",
    "calibrate",
    "convert",
    "export_checkpoint",
    "fold_scaling",
    "import_checkpoint",
    "layers",
    "load",
    "perplexity",
    "plan",
    "prepare",
    "quantize",
    "refine",
    "save",
    "unprepare",
    "warmup",
]

# Names of version 0.1, and where each of them is now. They go with version 0.3.
_MOVED: dict[str, tuple[Any, str]] = {
    "Composite": (layers.Composite, "tsq_layers.layers.Composite"),
    "LayerKind": (layers.LayerKind, "tsq_layers.layers.LayerKind"),
    "LayerReport": (reports.LayerReport, "tsq_layers.reports.LayerReport"),
    "SolverResult": (solver.SolverResult, "tsq_layers.solver.SolverResult"),
    "export": (export_checkpoint, "tsq_layers.export_checkpoint"),
    "register": (layers.register, "tsq_layers.layers.register"),
    "report": (reports.report_of, "model.tsq_report"),
    "unregister": (layers.unregister, "tsq_layers.layers.unregister"),
}


def __getattr__(name: str) -> Any:
    """Give names of version 0.1, with a warning that names the new one."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value, place = _MOVED[name]
    warnings.warn(
        f"tsq_layers.{name} is {place} now, and goes with version 0.3",
        TSQDeprecationWarning,
        stacklevel=2,
    )
    return value
