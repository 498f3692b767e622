"""Hold the needs of a calibration as a frozen value: stages, totals, and JSON both ways."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from tsq_layers.config import QuantConfig
from tsq_layers.config.json_fields import checked_fields, json_object, read_config
from tsq_layers.errors import CheckpointError
from tsq_layers.planning import table
from tsq_layers.planning.stage_plan import StagePlan
from tsq_layers.reports import LayerReport

SCHEMA_VERSION = 1
# Written by to_dict for readers of the file, and computed anew from the other keys when it is read.
_COMPUTED = ("peak", "not_counted")

MeasuredBy = Literal["fake pass", "real pass", "no pass"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of a calibration. Printing it gives a summary and a table of all stages.

    Args:
        config: the configuration that was asked for.
        batches: number of batches that are fitted.
        held_out: number of batches that are not.
        paired: whether every batch runs through the float model as well.
        offload: device to which the activations of waiting passes go; ``None`` leaves them.
        measured_by: ``"fake pass"`` on tensors without values, ``"real pass"`` where the model's course
            depends on values, or ``"no pass"`` where none is needed.
        reason: why the pass was a real one.
        recording: bytes that the first, recording pass holds at most.
        batch_bytes: of all batches.
        thread_bytes: that the matrix library keeps in the threads of the passes; an estimate.
        stages: in the order in which they are reached.
        layers: the expected report of every layer, as in a :class:`~tsq_layers.Report`.
        coverage: share, 0 to 1, of all entries of all parameters that will be quantised.
        size_before: bytes of all parameters and buffers of the float model.
        size_after: the same of the quantised model: what ``tsq.save`` writes, without the file's header.
        bits_per_weight: stored bits per weight over all quantised layers; ``None`` if there are none.
        seconds: ``"passes"``, ``"statistics"`` and ``"solver"`` → estimate, on this machine as it is now.
        experts: layers that will be quantised with the statistics of all experts, because too few
            tokens are routed to them.

    Example:
        >>> numbers = dict.fromkeys(("recording", "batch_bytes", "thread_bytes", "size_before", "size_after"), 0)
        >>> result = Plan(
        ...     config=QuantConfig(), batches=8, paired=True, measured_by="no pass", stages=(), layers=(),
        ...     coverage=0.0, **numbers,
        ... )
        >>> result.peak, Plan.from_json(result.to_json()) == result
        (0, True)
    """

    config: QuantConfig
    batches: int
    held_out: int = 0
    paired: bool
    offload: str | None = None
    measured_by: MeasuredBy
    reason: str = ""
    recording: int
    batch_bytes: int
    thread_bytes: int
    stages: tuple[StagePlan, ...]
    layers: tuple[LayerReport, ...]
    coverage: float
    size_before: int
    size_after: int
    bits_per_weight: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    experts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stages", "layers", "experts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "seconds", dict(self.seconds))

    @property
    def peak(self) -> int:
        """The most bytes that a calibration holds at a time beside the float model, batches included.

        Freed memory that the C library keeps is not counted: see ``benchmarks/plan.py``.
        """
        at_stages = max((stage.total for stage in self.stages), default=0) + self.thread_bytes
        return max(self.recording, at_stages) + self.batch_bytes

    @property
    def peak_stage(self) -> StagePlan | None:
        """The stage at which the peak is reached; ``None`` if that is the recording pass."""
        largest = max(self.stages, key=lambda stage: stage.total, default=None)
        if largest is None or largest.total + self.thread_bytes < self.recording:
            return None
        return largest

    @property
    def not_counted(self) -> tuple[str, ...]:
        """Fields of the configuration, or of its overrides, that cost time and memory beyond the numbers here."""
        configs = [self.config]
        for changes in self.config.overrides.values():
            configs.append(self.config.changed(overrides={}, **changes))
        fields: list[str] = []
        for config in configs:
            fields.extend(_uncounted(config))
        return tuple(dict.fromkeys(fields))

    @property
    def few_tokens(self) -> tuple[StagePlan, ...]:
        """Stages of layers that will see fewer than 16 tokens for each of their columns, fewest first."""
        stages = [stage for stage in self.stages if stage.few_tokens and self._uses_data(stage)]
        return tuple(sorted(stages, key=lambda stage: stage.tokens / stage.columns))

    def left_alone(self) -> tuple[LayerReport, ...]:
        """Return the layers that will not be quantised; their ``reason`` says why."""
        return tuple(layer for layer in self.layers if not layer.is_quantized)

    def _uses_data(self, stage: StagePlan) -> bool:
        """Return whether a layer of the stage is solved with statistics of its inputs."""
        by_name = {layer.name: layer for layer in self.layers}
        return any(name in by_name and by_name[name].tokens is not None for name in stage.names)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, with a ``schema_version``."""
        values: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        for entry in dataclasses.fields(self):
            values[entry.name] = getattr(self, entry.name)
        values["config"] = self.config.to_dict()
        values["stages"] = [stage.to_dict() for stage in self.stages]
        values["layers"] = [layer.to_dict() for layer in self.layers]
        values["seconds"] = dict(self.seconds)
        values["experts"] = list(self.experts)
        values["peak"] = self.peak
        values["not_counted"] = list(self.not_counted)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a plan from plain JSON values; inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: another schema version, an unknown or missing key, or a value of the wrong type.
        """
        if values.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                f"plan: schema_version={values.get('schema_version')!r}, this version of "
                f"tsq_layers reads {SCHEMA_VERSION}; make the plan again"
            )
        ignored = ("schema_version", *_COMPUTED)
        stored_fields = {key: value for key, value in values.items() if key not in ignored}
        arguments = checked_fields(cls, stored_fields, "the plan")
        arguments["stages"] = tuple(map(StagePlan.from_dict, arguments["stages"]))
        arguments["layers"] = tuple(map(LayerReport.from_dict, arguments["layers"]))
        arguments["config"] = read_config(arguments["config"], "the plan")
        return cls(**arguments)

    def to_json(self) -> str:
        """Return the plan as a JSON object."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Make a plan from a JSON object; inverse of :meth:`to_json`, raises as :meth:`from_dict` does."""
        return cls.from_dict(json_object(text, "the plan"))

    def table(self) -> str:
        """Return one aligned line of text for every stage."""
        return table.stages(self.stages)

    def __str__(self) -> str:
        lines = [
            table.peak_line(
                self.peak_stage,
                peak=self.peak,
                model=self.size_before,
                batches=self.batch_bytes,
                threads=self.thread_bytes,
            ),
            table.model_line(
                self.layers,
                before=self.size_before,
                after=self.size_after,
                coverage=self.coverage,
                bits_per_weight=self.bits_per_weight,
            ),
            self._time_line(),
            *table.notes(self.not_counted, self.few_tokens, self.experts, self.left_alone()),
        ]
        return "\n".join([*lines, "", self.table()]).rstrip()

    def _time_line(self) -> str:
        """Return the estimated time, the batches that it is for, and the pass that measured it."""
        batches = f"{self.batches} batches, one pass"
        if self.paired:
            batches = f"{self.batches} batches, paired passes"
        if self.held_out:
            batches += f", {self.held_out} held out"
        measured_by = f"measured by a {self.measured_by}"
        if self.measured_by == "no pass":
            measured_by = "without a pass"
        if self.reason:
            measured_by += f" ({self.reason})"
        return f"{table.time_line(self.seconds)}; {batches}; {measured_by}"


def _uncounted(config: QuantConfig) -> list[str]:
    """Return ``field=value`` of each field that costs time and memory which the plan does not count."""
    names = []
    if config.method in ("quantease", "cdquant", "lnq"):
        names.append("method")
    if config.option("joint_rounds", 0) > 0:
        names.append("joint_rounds")
    # A value is chosen by solving the layer with each candidate.
    for name in ("damping", "deviation_strength", "deviation_damping"):
        if config.option(name) == "auto":
            names.append(name)
    if config.guidance > 0:
        names.append("guidance")
    if config.distill_epochs > 0:
        names.append("distill_epochs")
    values = config.values()
    return [f"{name}={values[name]!r}" for name in names]
