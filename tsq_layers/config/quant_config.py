"""`QuantConfig`: what to do with every layer. Frozen, checked when made, JSON both ways."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch

from tsq_layers.config.checks import check_values
from tsq_layers.config.patterns import check_pattern, checked_patterns, matches
from tsq_layers.errors import ConfigError

SCHEMA_VERSION = 1

# Why the deviation enters the target with strength 0.5: perplexity of SmolLM2-135M at 2 bits, groups of 64,
# calibrated on 32,768 tokens of State of the Union addresses up to 1999; on those from 2000 on / on a novel.
#
#                               10 of 30 layers quantised     all 30 layers
#     none                         35.4 / 53.6
#     in the target, 0.25          28.7 / 44.2                 46.4 / 101.7
#     in the target, 0.5           27.5 / 44.4                 45.4 /  94.4
#     in the target, 0.75          27.9 / 43.6                 49.8 / 134.2
#     in stage 2 only, 0.5         30.9 / 47.3
#
# (10 layers: four windows of 1024 tokens of each text; all layers: eight.)

Method = Literal["rtn", "gptq", "quantease", "cdquant", "lnq", "two-stage", "best"]
GridMetric = Literal["feedback", "blocks"]
Deviation = Literal["target", "refine", "none"]
DescentStart = Literal["gptq", "nearest"]
Refine = Literal["exact", "descent", "none"]
Auto = Literal["auto"]
ZeroPoints = Literal["integer", "float"]
Codebook = Literal["row", "group"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("rtn", "gptq", "quantease", "cdquant", "lnq", "two-stage", "best"),
    "grid_metric": ("feedback", "blocks"),
    "deviation": ("target", "refine", "none"),
    "descent_start": ("gptq", "nearest"),
    "refine": ("exact", "descent", "none"),
    "zero_points": ("integer", "float"),
    "codebook": ("row", "group"),
    "scale_dtype": ("float16", "bfloat16", "float32"),
}
_DEFAULT_SKIP = ("lm_head",)

# What the method "best" changes in "two-stage", where the user does not give a field. benchmarks/README.md
# has the table that decided it.
BEST: dict[str, Any] = {
    "deviation_strength": 1.0,
    "deviation_damping": "auto",
    "damping": "auto",
    "joint_rounds": 2,
    "zero_points": "float",
    "rotation": 64,
}
_MODEL_WIDE = ("embeddings", "distill_epochs", "distill_rate", "skip", "overrides")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What to do with the layers of a model.

    Args:
        bits: width of a code, 1 to 8.
        group_size: input columns that share a scale; ``None`` is one group for the whole row. It
            need not divide the layer's width: the last group is then short.
        symmetric: codes are centred on zero and no zero points are stored.
        method: ``"rtn"`` rounds to the nearest code of a min-max grid and needs no calibration;
            ``"gptq"`` is GPTQ (arXiv 2210.17323) on static grids with weight-MSE clipping;
            ``"quantease"`` (arXiv 2309.01885) and ``"cdquant"`` (arXiv 2406.17542) are cyclic and greedy
            coordinate descent on the codes of these grids; ``"lnq"`` (arXiv 2505.07004) replaces grids by look-up
            tables; ``"two-stage"`` is arXiv 2602.02126; ``"best"`` is two-stage with what was measured to
            generalise best, and is replaced by that: fields of :data:`BEST` that are not given take its values.
            With ``zero_points="integer"`` and ``rotation=None`` other software can load what it makes.
        damping: λ; λ·mean(diag H) is added to the diagonal of H. Multiplied by ten, with a
            :class:`~tsq_layers.errors.DampingWarning`, while the factorisation fails. ``"auto"`` chooses it
            for each layer, on a fifth of the calibration tokens that is held out for that. Where none can be, for
            fused experts and in ``convert`` without ``calibrate``, it is 0.01 (``deviation_strength`` 0.5,
            ``deviation_damping`` 0.1).
        act_order: process columns by descending H_jj. Costs nothing at run time: grids are static.
        grid_metric: what stage 1 minimises (two-stage only); ``"feedback"`` is the rounding error that
            GPTQ's error feedback will leave, ``"blocks"`` the paper's group-wise reconstruction loss
            with the diagonal blocks of H.
        deviation: where the error of earlier layers, R = E[(x − x̃)xᵀ], enters (two-stage, quantease,
            cdquant and lnq): ``"target"`` in every step, ``"refine"`` in stage 2 (the two-stage paper) or the
            descent only, ``"none"``.
        deviation_strength: share of R that is used, 0 to 1, or ``"auto"``, as with ``damping``.
        deviation_damping: as ``damping``, where R is brought into the target. It is the ridge of a regression of
            the full-precision outputs on the inputs, which needs more of it than GPTQ does, and how much
            differs from layer to layer: ``"auto"`` chooses.
        descent_start: codes from which quantease and cdquant start: those of GPTQ, or the nearest.
        descent_sweeps: passes of quantease over the columns.
        descent_relax: leave some sweeps of quantease unrounded, as its authors do, and keep the best
            codes of each row.
        greedy_steps: moves of cdquant that a row may make at most, as a multiple of its columns.
        greedy_pairs: let cdquant go on with pairs of codes.
        refine: stage 2; ``"exact"`` solves for all scales of a row at once, ``"descent"`` is the
            paper's coordinate descent over groups, ``"none"`` stops after GPTQ.
        refine_ridge: weight, relative to the curvature of each scale, of a pull of stage 2 towards
            the scales of stage 1. Regularises scales that the calibration data hardly determine.
        refine_sweeps: sweeps of ``refine="descent"``.
        joint_rounds: how often, after stage 2, the codes are improved by coordinate descent and the
            scales refined again (two-stage only).
        joint_sweeps: passes over the columns in each of these rounds.
        zero_points: ``"integer"`` ones are codes, as most formats hold them; ``"float"`` ones are any
            number in ``scale_dtype``: ``weight = scale · code + offset`` (two-stage only, where not symmetric).
        codebook: whose levels lnq fits: one table for each row, or for each group of each row.
        codebook_rounds: how often lnq fits its tables and improves its codes in turn.
        codebook_sweeps: passes over the columns in each of these rounds.
        outliers: share of the weights that are kept apart, in full precision, as a sparse part (quantease only,
            which then leaves no sweeps unrounded).
        outlier_columns: number of whole input columns that are kept apart instead (quantease only).
        guidance: groups of output channels whose Hessians are weighted by the gradients of the loss
            (GuidedQuant, arXiv 2505.07004), tempered so that few tokens do not decide alone; 0 is off.
        keep_zeros: whether weights that are exactly zero stay so; ``None``: in layers with many of them (over 5 %), that
            is, pruned ones. Integer zero points can hold a zero exactly; a rotation, offsets, tables and outliers cannot.
        rotation: largest block of input columns that is rotated by a Hadamard matrix, a power of two;
            ``None`` is off. The input is rotated at run time.
        channel_scaling: scale input columns so that those with large inputs are rounded more finely
            (AWQ, arXiv 2306.00978). The input is scaled at run time, or by what stands before the layer.
        distill_epochs: how often, after all layers are solved, the scales of all layers together are trained on
            the calibration batches for the quantised model's output to be that of the full-precision one.
        distill_rate: learning rate of that, relative to the size of a scale.
        activation_bits: 8 quantises the layer's input too, symmetrically, by token, at run time.
        scale_dtype: dtype in which scales are stored; the solver accounts for its rounding.
        min_expert_tokens: experts that saw fewer calibration tokens than this are quantised with the
            statistics of all experts of their module together, and named in the report; ``None``: as
            many tokens as the layer has input columns.
        embeddings: quantise the tables of ``nn.Embedding`` too (from their weights alone; a table that is
            tied to an output layer goes with that, if the layer is not skipped).
        skip: patterns of layers that stay as they are.
        overrides: pattern → changed fields, for the layers that it matches; later patterns win.

    A pattern is a glob, or a regular expression after ``re:``. It is compared with the full dotted
    name of the module and with every dotted tail of it, so ``"lm_head"`` also matches
    ``"model.lm_head"``, and ``"mlp.*"`` every layer in any ``mlp``.

    Raises:
        ConfigError: a value that is not allowed; the message names field, value and what is allowed.

    Example:
        >>> config = QuantConfig(bits=2, group_size=64, overrides={"*.down_proj": {"bits": 4}})
        >>> config.for_layer("model.layers.0.mlp.down_proj").bits
        4
        >>> QuantConfig.from_json(config.to_json()) == config
        True
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    method: Method = "two-stage"
    damping: float | Auto = 0.01
    act_order: bool = True
    grid_metric: GridMetric = "feedback"
    deviation: Deviation = "target"
    deviation_strength: float | Auto = 0.5
    deviation_damping: float | Auto = 0.01
    descent_start: DescentStart = "gptq"
    descent_sweeps: int = 5
    descent_relax: bool = False
    greedy_steps: float = 1.0
    greedy_pairs: bool = False
    refine: Refine = "exact"
    refine_ridge: float = 0.01
    refine_sweeps: int = 4
    joint_rounds: int = 0
    joint_sweeps: int = 1
    zero_points: ZeroPoints = "integer"
    codebook: Codebook = "row"
    codebook_rounds: int = 3
    codebook_sweeps: int = 4
    outliers: float = 0.0
    outlier_columns: int = 0
    guidance: int = 0
    keep_zeros: bool | None = None
    rotation: int | None = None
    channel_scaling: bool = False
    activation_bits: int | None = None
    distill_epochs: int = 0
    distill_rate: float = 3e-3
    scale_dtype: ScaleDtype = "float16"
    min_expert_tokens: int | None = None
    embeddings: bool = False
    skip: tuple[str, ...] = _DEFAULT_SKIP
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method == "best":  # of dataclasses.replace, which gives every field
            for name, value in self._preset().items():
                object.__setattr__(self, name, value)
        check_values({f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, _CHOICES)
        object.__setattr__(self, "skip", checked_patterns(self.skip))
        object.__setattr__(self, "overrides", self._checked_overrides())

    def _checked_overrides(self) -> dict[str, dict[str, Any]]:
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(
                f"overrides={self.overrides!r}: give a mapping of pattern to changed fields"
            )
        checked: dict[str, dict[str, Any]] = {}
        for pattern, changes in self.overrides.items():
            check_pattern(pattern)
            if not isinstance(changes, Mapping):
                raise ConfigError(
                    f"overrides[{pattern!r}]={changes!r}: give a mapping of field to value"
                )
            allowed = [f.name for f in dataclasses.fields(self) if f.name not in _MODEL_WIDE]
            unknown = [key for key in changes if key not in allowed]
            if unknown:
                raise ConfigError(
                    f"overrides[{pattern!r}] has unknown field {unknown[0]!r}; allowed are {', '.join(allowed)}"
                )
            try:
                self.changed(overrides={}, **changes)
            except ConfigError as error:
                raise ConfigError(f"overrides[{pattern!r}]: {error}") from None
            checked[pattern] = dict(changes)
        return checked

    def skips(self, name: str) -> bool:
        """Whether the layer called ``name`` is to stay as it is."""
        return any(matches(pattern, name) for pattern in self.skip)

    def for_layer(self, name: str) -> "QuantConfig":
        """The configuration of the layer called ``name``: overrides applied, none left in it."""
        changes: dict[str, Any] = {}
        for pattern, fields in self.overrides.items():
            if matches(pattern, name):
                changes.update(fields)
        return self.changed(overrides={}, **changes)

    def changed(self, **changes: Any) -> "QuantConfig":
        """As ``dataclasses.replace``, but ``method="best"`` leaves all fields alone that are among the changes.

        Raises:
            ConfigError: a value that is not allowed.

        Example:
            >>> QuantConfig(bits=3).changed(method="best", zero_points="integer").zero_points
            'integer'
        """
        if changes.get("method") == "best":
            changes = {**self._preset(), **changes, "method": "two-stage"}
        return dataclasses.replace(self, **changes)

    def _preset(self) -> dict[str, Any]:
        """What "best" makes of the fields that are at their defaults."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        found = {
            name: value for name, value in BEST.items() if getattr(self, name) == defaults[name]
        }
        return {**found, "method": "two-stage"}

    @property
    def uses_deviation(self) -> bool:
        """Whether the method of this configuration makes use of R, that is of paired passes."""
        return (
            self.method not in ("rtn", "gptq")
            and self.deviation != "none"
            and self.deviation_strength != 0
        )

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be chosen on held-out tokens."""
        return "auto" not in (self.damping, self.deviation_strength, self.deviation_damping)

    def settled(self) -> tuple[float, float, float]:
        """Damping, strength and damping of the deviation, as numbers.

        Raises:
            ConfigError: one is still to be chosen.
        """
        damping, strength, ridge = self.damping, self.deviation_strength, self.deviation_damping
        if isinstance(damping, str) or isinstance(strength, str) or isinstance(ridge, str):
            raise ConfigError(
                f"damping={damping!r}, deviation_strength={strength!r}, deviation_damping={ridge!r}: calibrate() chooses what is 'auto'; give numbers here"
            )
        return damping, strength, ridge

    @property
    def has_offsets(self) -> bool:
        """Whether grids are scales and offsets that are any number, and not scales and zero points."""
        return self.method == "two-stage" and self.zero_points == "float" and not self.symmetric

    @property
    def holds_zero(self) -> bool:
        """Whether a weight of exactly zero can be stored as that."""
        apart = self.method == "quantease" and (self.outliers > 0 or self.outlier_columns > 0)
        return not (apart or self.has_offsets or self.tables or self.rotation)

    @property
    def tables(self) -> Codebook | None:
        """Whose look-up tables there are, where these take the place of grids; ``None`` where there are grids."""
        return self.codebook if self.method == "lnq" else None

    @property
    def needs_calibration(self) -> bool:
        """Whether the method of this configuration needs statistics of the layer's inputs."""
        return self.method != "rtn" or self.channel_scaling

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """``scale_dtype`` as a ``torch.dtype``."""
        dtype: torch.dtype = getattr(torch, self.scale_dtype)
        return dtype

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, with a ``schema_version``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["skip"] = list(self.skip)
        values["overrides"] = {
            pattern: dict(changes) for pattern, changes in self.overrides.items()
        }
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`. Unknown keys and versions raise :class:`ConfigError`."""
        values = dict(values)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"schema_version={version!r}: this version of tsq_layers reads {SCHEMA_VERSION}"
            )
        allowed = [f.name for f in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in allowed]
        if unknown:
            raise ConfigError(f"unknown field {unknown[0]!r}; allowed are {', '.join(allowed)}")
        if isinstance(values.get("skip"), list):
            values["skip"] = tuple(values["skip"])
        return cls(**values)

    def to_json(self) -> str:
        """The configuration as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a JSON object: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"not a JSON object but {type(values).__name__}")
        return cls.from_dict(values)


def _with_preset(init: Callable[..., None]) -> Callable[..., None]:
    """Let ``method="best"`` leave fields alone that are given, even if it is with their default values."""

    @functools.wraps(init)
    def wrapped(self: QuantConfig, *args: Any, **given: Any) -> None:
        if given.get("method") == "best" and len(given) < len(dataclasses.fields(QuantConfig)):
            given = {**BEST, **given, "method": "two-stage"}
        init(self, *args, **given)

    return wrapped


QuantConfig.__init__ = _with_preset(QuantConfig.__init__)  # type: ignore[method-assign]


def explicit_patterns(config: QuantConfig) -> list[str]:
    """The patterns that the user gave: every override, and every skip but the default ones."""
    return [pattern for pattern in config.skip if pattern not in _DEFAULT_SKIP] + list(
        config.overrides
    )
