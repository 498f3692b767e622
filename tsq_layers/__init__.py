"""Weights of any PyTorch model in 2, 3 or 4 bits: observers attach, a calibration runs, layers are swapped."""

from tsq_layers.config import QuantConfig
from tsq_layers.evaluation import perplexity
from tsq_layers.formats import export, import_checkpoint
from tsq_layers.formats.tsq import load, save
from tsq_layers.layers import Composite, LayerKind, register, unregister
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.observer import HessianObserver
from tsq_layers.planning import Plan, plan
from tsq_layers.reports import LayerReport, Report, report
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.warmup import warmup
from tsq_layers.solver import SolverResult, TwoStageGroupQuantizer
from tsq_layers.workflow.conversion import convert
from tsq_layers.workflow.folding import fold_scaling
from tsq_layers.workflow.pipeline import calibrate, prepare, quantize, unprepare
from tsq_layers.workflow.refinement import refine

__all__ = [
    "Composite",
    "HessianObserver",
    "LayerKind",
    "LayerReport",
    "LayerStatistics",
    "Plan",
    "QuantConfig",
    "QuantLinear",
    "QuantizedWeight",
    "Report",
    "SolverResult",
    "TwoStageGroupQuantizer",
    "calibrate",
    "convert",
    "export",
    "fold_scaling",
    "import_checkpoint",
    "load",
    "perplexity",
    "plan",
    "prepare",
    "quantize",
    "refine",
    "register",
    "report",
    "save",
    "unprepare",
    "unregister",
    "warmup",
]
