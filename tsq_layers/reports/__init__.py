"""Tell what happened to every layer: as data, as JSON, as a table of plain text, as a picture and as a page."""

from tsq_layers.reports.layer import STEPS, LayerReport, Status
from tsq_layers.reports.model import report_of
from tsq_layers.reports.parameter import ParameterReport
from tsq_layers.reports.report import SCHEMA_VERSION, Report
from tsq_layers.reports.table import format_bytes

__all__ = [
    "SCHEMA_VERSION",
    "STEPS",
    "LayerReport",
    "ParameterReport",
    "Report",
    "Status",
    "format_bytes",
    "report_of",
]
