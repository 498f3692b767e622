"""What happened to every layer: as data, as JSON, as a table of plain text, as a picture and as a page."""

from tsq_layers.config.versions import library_versions
from tsq_layers.numerics.memory import memory_extent, model_bytes
from tsq_layers.report.fields import checked_fields
from tsq_layers.report.layer import STEPS, LayerReport, Status
from tsq_layers.report.model import report
from tsq_layers.report.parameter import ParameterReport
from tsq_layers.report.records import SCHEMA_VERSION, Report
from tsq_layers.report.table import format_bytes

__all__ = [
    "SCHEMA_VERSION",
    "STEPS",
    "LayerReport",
    "ParameterReport",
    "Report",
    "Status",
    "checked_fields",
    "format_bytes",
    "library_versions",
    "memory_extent",
    "model_bytes",
    "report",
]
