"""Describe one layer as a frozen value, with JSON both ways."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from tsq_layers.config.json_fields import checked_fields, json_number, read_number
from tsq_layers.config.methods import Deviation, Method
from tsq_layers.errors import CheckpointError

Status = Literal["quantized", "fallback", "skipped", "never called", "not supported"]

STEPS = ("initialize", "assign", "descend", "pairs", "refine", "joint")
"""Steps of the solver that leave a loss, in their order; each method takes some of them."""

_MAPPINGS = ("losses", "held_out_losses", "objective", "seconds")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """A description of what was done to one layer, and how well.

    Args:
        name: full dotted name of the layer in the model; ``""`` if the model is the layer.
        kind: class name of the float module, for example ``"Linear"``.
        rows: N, output features.
        columns: K, input features.
        status: ``"quantized"``, ``"fallback"`` (quantised, but with less than was asked for),
            ``"skipped"`` (the configuration says so), ``"never called"`` (no calibration batch
            reached it) or ``"not supported"``.
        reason: why, when it was not quantised, or with less than was asked for.
        method: the method of the configuration. Like all that follow, ``None`` or empty where it
            does not apply.
        bits: width of a code.
        group_size: columns that share a scale.
        symmetric: whether there are no stored zero points.
        bits_per_weight: stored bits per weight: codes, scales and zero points.
        tokens: calibration tokens that the layer saw.
        damping: λ that was really used, after any raise.
        deviation: where the error of earlier layers entered.
        deviation_strength: the share of it that was used, chosen or given.
        deviation_damping: of the regression that brought it into the target, chosen or given.
        losses: step, of :data:`STEPS` → mean squared output error per
            token, relative to the mean squared target output; on the undamped H.
        held_out_losses: the same on tokens that the solver did not see.
        objective: step (``"assign"``, ``"descent"``, ``"exact"``) → what stage 2 minimises.
        seconds: step → wall-clock seconds.
        shared_with: names of the layers with the same input, solved together with this one.

    Raises:
        ValueError: a status that is not one of the five, or a fallback without a reason.

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
    deviation_strength: float | None = None
    deviation_damping: float | None = None
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
        if self.status == "fallback" and not self.reason:
            raise ValueError(
                f"layer {self.name!r}: status='fallback' without a reason; say what was done instead, and why"
            )
        for name in _MAPPINGS:
            object.__setattr__(self, name, dict(getattr(self, name)))

    @property
    def is_quantized(self) -> bool:
        """Return whether its weight was quantised, in full or by a fallback."""
        return self.status in ("quantized", "fallback")

    @property
    def weights(self) -> int:
        """Return the number of entries of the weight matrix."""
        return self.rows * self.columns

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as plain JSON values."""
        values = dataclasses.asdict(self)
        for name in _MAPPINGS:
            values[name] = {step: json_number(value) for step, value in values[name].items()}
        values["shared_with"] = list(self.shared_with)
        return values

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Return the report that :meth:`to_dict` has written.

        Raises:
            CheckpointError: unknown keys, or values of the wrong type.
        """
        checked = checked_fields(cls, values, "a layer of the report")
        where = f"layer {checked['name']!r} of the report"
        for name in _MAPPINGS:
            if name in checked:
                checked[name] = {
                    step: read_number(value, f"{where}: {name}[{step!r}]")
                    for step, value in checked[name].items()
                }
        checked["shared_with"] = tuple(checked.get("shared_with", ()))
        try:
            return cls(**checked)
        except ValueError as error:
            raise CheckpointError(
                f"{error}; the report was changed by hand or by another program"
            ) from None
