"""Report a conversion as a frozen value: layers, totals, and JSON both ways."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from tsq_layers.config import QuantConfig
from tsq_layers.config.json_fields import checked_fields, json_object, read_config
from tsq_layers.errors import CheckpointError
from tsq_layers.reports import figure, table
from tsq_layers.reports import gaps as coverage
from tsq_layers.reports.html import page
from tsq_layers.reports.layer import LayerReport
from tsq_layers.reports.parameter import ParameterReport
from tsq_layers.reports.totals import Totals

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report of what a conversion did to a model. Printing it gives a summary and a table of layers.

    Args:
        layers: one entry for every layer that could have been quantised, in model order.
        config: the configuration that was asked for.
        size_before: bytes of all parameters and buffers of the float model; see :func:`model_bytes`.
        size_after: the same of the converted model.
        paired: whether every batch was passed through the float model as well, so that R is known.
        seconds: wall-clock seconds of the whole run.
        versions: package → version; see :func:`library_versions`.
        parameters: one entry for every parameter of the float model, in model order; empty in
            reports of versions that did not list them.
        distances: mean distance between the outputs of the two models in each epoch of distillation, in the
            unit of its distance function; empty without one.

    Example:
        >>> layer = LayerReport(
        ...     name="fc", kind="Linear", rows=8, columns=16, status="quantized", bits=2, bits_per_weight=2.5
        ... )
        >>> result = Report(
        ...     layers=(layer,), config=QuantConfig(), size_before=512, size_after=40, paired=True, seconds=1.0
        ... )
        >>> result.bits_per_weight, Report.from_json(result.to_json()) == result
        (2.5, True)
    """

    layers: tuple[LayerReport, ...]
    config: QuantConfig
    size_before: int
    size_after: int
    paired: bool
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)
    parameters: tuple[ParameterReport, ...] = ()
    distances: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "distances", tuple(self.distances))
        object.__setattr__(self, "versions", dict(self.versions))

    @property
    def quantized(self) -> list[LayerReport]:
        """Return the layers that were quantised, those with less than was asked for included."""
        return [layer for layer in self.layers if layer.is_quantized]

    @property
    def bits_per_weight(self) -> float | None:
        """Return stored bits per weight over all quantised layers; ``None`` if there are none."""
        weights = 0
        bits = []
        for layer in self.quantized:
            if layer.bits_per_weight is not None:
                weights += layer.weights
                bits.append(layer.weights * layer.bits_per_weight)
        # From Python 3.12 `sum` compensates the rounding errors of floats; a running total would not.
        return sum(bits) / weights if weights else None

    @property
    def share_quantized(self) -> float:
        """Return the share, 0 to 1, of the weights of the listed layers that were quantised."""
        total = sum(layer.weights for layer in self.layers)
        quantized = sum(layer.weights for layer in self.quantized)
        return quantized / total if total else 0.0

    @property
    def coverage(self) -> float:
        """Return the share, 0 to 1, of all entries of all parameters that were quantised.

        It is :attr:`share_quantized` if no parameters are listed.
        """
        if not self.parameters:
            return self.share_quantized
        return coverage.share_of_entries(self.parameters)

    @property
    def byte_coverage(self) -> float:
        """Return :attr:`coverage` of the bytes of the float model's parameters."""
        if not self.parameters:
            return self.share_quantized
        return coverage.share_of_bytes(self.parameters)

    def gaps(self, count: int = 5) -> tuple[ParameterReport, ...]:
        """Return the ``count`` parameters with most entries that were not quantised, most first."""
        return coverage.largest(self.parameters, count)

    @property
    def totals(self) -> Totals:
        """Return the figures of the whole model."""
        return Totals(
            size_before=self.size_before,
            size_after=self.size_after,
            paired=self.paired,
            seconds=self.seconds,
            versions=self.versions,
            bits_per_weight=self.bits_per_weight,
            share_quantized=self.share_quantized,
            coverage=self.coverage,
            byte_coverage=self.byte_coverage,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, with a ``schema_version``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {
            "layers": [layer.to_dict() for layer in self.layers],
            "config": self.config.to_dict(),
            "versions": dict(self.versions),
            "parameters": [parameter.to_dict() for parameter in self.parameters],
            "distances": list(self.distances),
        }
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the report that :meth:`to_dict` has written.

        Raises:
            CheckpointError: another schema version, an unknown or missing key, or a value of the wrong type.
        """
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            advice = (
                "upgrade tsq_layers"
                if isinstance(version, int) and version > SCHEMA_VERSION
                else "this is not a report of tsq_layers"
            )
            raise CheckpointError(
                f"report: schema_version={version!r}, this version of tsq_layers reads {SCHEMA_VERSION}; {advice}"
            )
        rest = {key: value for key, value in values.items() if key != "schema_version"}
        checked = checked_fields(cls, rest, "the report")
        checked["layers"] = tuple(LayerReport.from_dict(layer) for layer in checked["layers"])
        checked["parameters"] = tuple(map(ParameterReport.from_dict, checked.get("parameters", ())))
        checked["config"] = read_config(checked["config"], "the report")
        return cls(**checked)

    def to_json(self) -> str:
        """Return the report as a JSON object."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the report that :meth:`to_json` has written; raises as :meth:`from_dict` does."""
        return cls.from_dict(json_object(text, "the report"))

    def table(self) -> str:
        """Return one aligned line of text for every layer. Columns that would be empty are left out."""
        return table.layers(self.layers)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw loss, bits and seconds of every quantised layer into a PNG, SVG or PDF file, by its suffix.

        Raises:
            ConfigError: another suffix.
            MissingExtraError: matplotlib is not installed.
            OSError: the file cannot be written.

        Example:
            >>> import tempfile
            >>> layer = LayerReport(
            ...     name="fc", kind="Linear", rows=8, columns=16, status="quantized", losses={"refine": 0.01}
            ... )
            >>> result = Report(
            ...     layers=(layer,), config=QuantConfig(), size_before=512, size_after=40, paired=True, seconds=1.0
            ... )
            >>> result.plot(f"{tempfile.mkdtemp()}/report.svg")
        """
        figure.draw(self.layers, self.bits_per_weight, path)

    def to_html(self, path: str | os.PathLike[str], *, title: str = "Quantised model") -> None:
        """Write the report as one HTML file that needs nothing else: pictures, and a table to sort and filter.

        Args:
            path: the file.
            title: its heading, for example the name of the model.

        Raises:
            MissingExtraError: jinja2 is not installed.
            OSError: the file cannot be written.

        Example:
            >>> import pathlib, tempfile
            >>> layer = LayerReport(
            ...     name="fc", kind="Linear", rows=8, columns=16, status="quantized", losses={"refine": 0.01}
            ... )
            >>> result = Report(
            ...     layers=(layer,), config=QuantConfig(), size_before=512, size_after=40, paired=True, seconds=1.0
            ... )
            >>> path = pathlib.Path(tempfile.mkdtemp(), "report.html")
            >>> result.to_html(path, title="One layer")
            >>> "<h1>One layer</h1>" in path.read_text(encoding="utf-8")
            True
        """
        contents = page.Contents(
            totals=self.totals, layers=self.layers, parameters=self.parameters, config=self.config
        )
        page.write(contents, path, title)

    def __str__(self) -> str:
        summary = table.summary(self.totals, self.layers, self.parameters)
        return f"{summary}\n\n{self.table()}".rstrip()
