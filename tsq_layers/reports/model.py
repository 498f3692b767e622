"""Find the report of a model."""

from torch import nn

from tsq_layers.errors import StateError
from tsq_layers.reports.report import Report


def report_of(model: nn.Module) -> Report:
    """Return the report of a model that :func:`tsq_layers.convert` or :func:`tsq_layers.load` returned.

    It is ``model.tsq_report``, with an error that says what to do where there is none.

    Raises:
        StateError: the model was not converted.

    Example:
        >>> from tsq_layers.config import QuantConfig
        >>> model = nn.Linear(16, 8)
        >>> model.tsq_report = Report(
        ...     layers=(), config=QuantConfig(), size_before=544, size_after=544, paired=False, seconds=0.0
        ... )
        >>> report_of(model).size_before
        544
    """
    value = getattr(model, "tsq_report", None)
    if not isinstance(value, Report):
        raise StateError(
            f"{type(model).__name__} has no report: it was not converted. Call tsq.quantize(model, "
            "config, batches), or tsq.convert(model) "
            "after prepare and calibrate, and pass the model that was converted, not a part or a copy of its parts"
        )
    return value
