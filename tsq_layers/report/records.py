"""What happened to every layer, as frozen values, and as JSON both ways."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from tsq_layers.config import Deviation, Method, QuantConfig
from tsq_layers.errors import CheckpointError, ConfigError
from tsq_layers.report import table
from tsq_layers.report.fields import checked_fields, json_number, read_number

SCHEMA_VERSION = 1

Status = Literal["quantized", "skipped", "never called", "not supported"]

_MAPPINGS = ("losses", "held_out_losses", "objective", "seconds")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What happened to one layer, and how well it went.

    Args:
        name: full dotted name of the layer in the model; ``""`` if the model is the layer.
        kind: class name of the float module, for example ``"Linear"``.
        rows: N, output features.
        columns: K, input features.
        status: ``"quantized"``, ``"skipped"`` (the configuration says so), ``"never called"`` (no
            calibration batch reached it) or ``"not supported"``.
        reason: why, when it was not quantised.
        method: the method of the configuration. Like all that follow, ``None`` or empty where it
            does not apply.
        bits: width of a code.
        group_size: columns that share a scale.
        symmetric: whether there are no stored zero points.
        bits_per_weight: stored bits per weight: codes, scales and zero points.
        tokens: calibration tokens that the layer saw.
        damping: λ that was really used, after any raise.
        deviation: where the error of earlier layers entered.
        losses: step (``"initialize"``, ``"assign"``, ``"refine"``) → mean squared output error per
            token, relative to the mean squared target output; on the undamped H.
        held_out_losses: the same on tokens that the solver did not see.
        objective: step (``"assign"``, ``"descent"``, ``"exact"``) → what stage 2 minimises.
        seconds: step → wall-clock seconds.
        shared_with: names of the layers with the same input, solved together with this one.

    Raises:
        ValueError: a status that is not one of the four.

    Example:
        >>> LayerReport(name="fc", kind="Linear", rows=8, columns=16, status="skipped", reason="skip").weights
        128
    """

    name: str
    kind: str
    rows: int
    columns: int
    status: Status
    reason: str = ""
    method: Method | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    bits_per_weight: float | None = None
    tokens: int | None = None
    damping: float | None = None
    deviation: Deviation | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    held_out_losses: Mapping[str, float] = field(default_factory=dict)
    objective: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    shared_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(
                f"layer {self.name!r}: status={self.status!r}; give one of {', '.join(map(repr, get_args(Status)))}"
            )
        for name in _MAPPINGS:
            object.__setattr__(self, name, dict(getattr(self, name)))

    @property
    def weights(self) -> int:
        """Number of entries of the weight matrix."""
        return self.rows * self.columns

    def to_dict(self) -> dict[str, Any]:
        """The layer as plain JSON values."""
        values = dataclasses.asdict(self)
        values.update({name: {step: json_number(value) for step, value in values[name].items()} for name in _MAPPINGS})
        return {**values, "shared_with": list(self.shared_with)}

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Inverse of :meth:`to_dict`. Unknown keys and wrong types raise :class:`~tsq_layers.errors.CheckpointError`."""
        checked = checked_fields(cls, values, "a layer of the report")
        where = f"layer {checked['name']!r} of the report"
        for name in _MAPPINGS:
            if name in checked:
                checked[name] = {
                    step: read_number(value, f"{where}: {name}[{step!r}]") for step, value in checked[name].items()
                }
        checked["shared_with"] = tuple(checked.get("shared_with", ()))
        try:
            return cls(**checked)
        except ValueError as error:
            raise CheckpointError(f"{error}; the report was changed by hand or by another program") from None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did to a model. Printing it gives a summary and a table of all layers.

    Args:
        layers: one entry for every layer that could have been quantised, in model order.
        config: the configuration that was asked for.
        size_before: bytes of all parameters and buffers of the float model; see :func:`model_bytes`.
        size_after: the same of the converted model.
        paired: whether every batch was passed through the float model as well, so that R is known.
        seconds: wall-clock seconds of the whole run.
        versions: package → version; see :func:`library_versions`.

    Example:
        >>> layer = LayerReport(name="fc", kind="Linear", rows=8, columns=16, status="quantized", bits=2, bits_per_weight=2.5)
        >>> result = Report(layers=(layer,), config=QuantConfig(), size_before=512, size_after=40, paired=True, seconds=1.0)
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "versions", dict(self.versions))

    @property
    def quantized(self) -> list[LayerReport]:
        """The layers that were quantised."""
        return [layer for layer in self.layers if layer.status == "quantized"]

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight over all quantised layers; ``None`` if there are none."""
        pairs = [
            (layer.weights, layer.bits_per_weight) for layer in self.quantized if layer.bits_per_weight is not None
        ]
        total = sum(weights for weights, _ in pairs)
        return sum(weights * bits for weights, bits in pairs) / total if total else None

    @property
    def share_quantized(self) -> float:
        """Share, 0 to 1, of the weights of the listed layers that were quantised."""
        total = sum(layer.weights for layer in self.layers)
        return sum(layer.weights for layer in self.quantized) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, with a ``schema_version``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {
            "layers": [layer.to_dict() for layer in self.layers],
            "config": self.config.to_dict(),
            "versions": dict(self.versions),
        }
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

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
        try:
            checked["config"] = QuantConfig.from_dict(checked["config"])
        except ConfigError as error:
            raise CheckpointError(f"the report: config: {error}") from None
        return cls(**checked)

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`; raises as :meth:`from_dict` does."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"the report is not a JSON object: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"the report is not a JSON object but {type(values).__name__}")
        return cls.from_dict(values)

    def table(self) -> str:
        """One aligned line of text for every layer. Columns that would be empty are left out."""
        return table.layers(self.layers)

    def __str__(self) -> str:
        return f"{table.summary(self)}\n\n{self.table()}".rstrip()
