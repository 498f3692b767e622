"""`QuantConfig`: what to do with every layer. Frozen, checked when made, JSON both ways."""

import dataclasses
import enum
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, Self

import torch

from tsq_layers.config import presets, schema
from tsq_layers.config.checks import check_field
from tsq_layers.config.methods import (
    LNQ,
    OPTIONS,
    RTN,
    Codebook,
    Method,
    Options,
    QuantEase,
    TwoStage,
    option_names,
    readers,
)
from tsq_layers.config.options import check_together, make_options, reads_option
from tsq_layers.config.patterns import check_pattern, checked_patterns, matches
from tsq_layers.errors import ConfigError, TSQDeprecationWarning

ScaleDtype = Literal["float16", "bfloat16", "float32"]

DEFAULT_SKIP = ("lm_head",)
_MODEL_WIDE = ("embeddings", "distill_epochs", "distill_rate", "skip", "overrides")
_NOT_PLAIN = ("method", "options", "skip", "overrides")  # checked in ways of their own


class _Unset(enum.Enum):
    """Marks a field that was not given, where a preset needs to know."""

    UNSET = "unset"


_UNSET: Final = _Unset.UNSET


@dataclass(frozen=True, init=False)
class QuantConfig:
    """A configuration: what is done with the layers of a model.

    Args:
        bits: width of a code, 1 to 8.
        group_size: input columns that share a scale; ``None`` is one group for the whole row. It
            need not divide the layer's width: the last group is then short.
        symmetric: codes are centred on zero and no zero points are stored.
        method: the name of a method, or its options, for example
            ``TwoStage(joint_rounds=2)`` (:mod:`tsq_layers.config.methods`):

            * ``"rtn"`` rounds to the nearest code of a min-max grid and needs no calibration;
            * ``"gptq"`` is GPTQ (arXiv 2210.17323) on static grids with weight-MSE clipping;
            * ``"quantease"`` (arXiv 2309.01885) and ``"cdquant"`` (arXiv 2406.17542) are cyclic
              and greedy coordinate descent on the codes of these grids;
            * ``"lnq"`` (arXiv 2505.07004) replaces grids by look-up tables;
            * ``"two-stage"`` is arXiv 2602.02126;
            * ``"best"`` is the preset :meth:`best`.
        options: options of the method; ``None`` is its defaults.
        scale_dtype: dtype in which scales are stored; the solver accounts for its rounding.
        rotation: largest block of input columns that is rotated by a Hadamard matrix, a power of
            two; ``None`` is off, and the default but for ``method="best"``. The input is rotated
            at run time.
        channel_scaling: scale input columns so that those with large inputs are rounded more
            finely (AWQ, arXiv 2306.00978). The input is scaled at run time, or by what stands
            before the layer.
        activation_bits: 8 quantises the layer's input too, symmetrically, by token, at run time.
        guidance: groups of output channels whose Hessians are weighted by the gradients of the
            loss (GuidedQuant, arXiv 2505.07004), tempered so that few tokens do not decide alone;
            0 is off.
        keep_zeros: whether weights that are exactly zero stay so; ``None``: in layers with many of
            them (over 5 %), that is, pruned ones. Integer zero points can hold a zero exactly; a
            rotation, offsets, tables and outliers cannot.
        min_expert_tokens: experts that saw fewer calibration tokens than this are quantised with
            the statistics of all experts of their module together, and named in the report;
            ``None``: as many tokens as the layer has input columns.
        embeddings: quantise the tables of ``nn.Embedding`` too (from their weights alone; a table
            that is tied to an output layer goes with that, if the layer is not skipped).
        distill_epochs: how often, after all layers are solved, the scales of all layers together
            are trained on the calibration batches for the quantised model's output to be that of
            the full-precision one.
        distill_rate: learning rate of that, relative to the size of a scale.
        skip: patterns of layers that stay as they are.
        overrides: pattern → changed fields or options, for the layers that it matches; later
            patterns win. An override of ``method`` starts from the method's defaults and from the
            options that both methods have; options in other patterns then count in the layers whose
            method has them.
        method_options: options of the method by name, in the place of ``options``:
            ``QuantConfig(method="gptq", damping=0.05)``.

    A pattern is a glob, or a regular expression after ``re:``. It is compared with the full dotted
    name of the module and with every dotted tail of it, so ``"lm_head"`` also matches
    ``"model.lm_head"``, and ``"mlp.*"`` every layer in any ``mlp``.

    Raises:
        ConfigError: a value that is not allowed, or an option that no step of the method reads;
            the message names field, value, what is allowed, and the methods that read the option.

    Example:
        >>> config = QuantConfig(bits=2, group_size=64, overrides={"*.down_proj": {"bits": 4}})
        >>> config.for_layer("model.layers.0.mlp.down_proj").bits
        4
        >>> QuantConfig(method=TwoStage(joint_rounds=2)) == QuantConfig(joint_rounds=2)
        True
        >>> QuantConfig(method="gptq", joint_rounds=2)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        tsq_layers.errors.ConfigError: joint_rounds: no step of method 'gptq' reads it; leave ...
    """

    bits: int
    group_size: int | None
    symmetric: bool
    method: Method
    options: Options
    scale_dtype: ScaleDtype
    rotation: int | None
    channel_scaling: bool
    activation_bits: int | None
    guidance: int
    keep_zeros: bool | None
    min_expert_tokens: int | None
    embeddings: bool
    distill_epochs: int
    distill_rate: float
    skip: tuple[str, ...]
    overrides: Mapping[str, Mapping[str, Any]]

    def __init__(
        self,
        *,
        bits: int = 4,
        group_size: int | None = 128,
        symmetric: bool = False,
        method: Method | Options = "two-stage",
        options: Options | None = None,
        scale_dtype: ScaleDtype = "float16",
        rotation: int | _Unset | None = _UNSET,
        channel_scaling: bool = False,
        activation_bits: int | None = None,
        guidance: int = 0,
        keep_zeros: bool | None = None,
        min_expert_tokens: int | None = None,
        embeddings: bool = False,
        distill_epochs: int = 0,
        distill_rate: float = 3e-3,
        skip: tuple[str, ...] = DEFAULT_SKIP,
        overrides: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        **method_options: Any,
    ) -> None:
        check_field("symmetric", symmetric)
        if method == "best" and options is not None:
            raise ConfigError("method='best' with options: give config.changed(method='best')")
        if method == "best":
            fields = presets.best(symmetric=symmetric)
            preset_rotation = fields.pop("rotation")
            rotation = preset_rotation if isinstance(rotation, _Unset) else rotation
            method, method_options = "two-stage", {**fields, **method_options}
        rotation = None if isinstance(rotation, _Unset) else rotation
        made_options = make_options(method, options, method_options)
        values = {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "method": made_options.method,
            "options": made_options,
            "scale_dtype": scale_dtype,
            "rotation": rotation,
            "channel_scaling": channel_scaling,
            "activation_bits": activation_bits,
            "guidance": guidance,
            "keep_zeros": keep_zeros,
            "min_expert_tokens": min_expert_tokens,
            "embeddings": embeddings,
            "distill_epochs": distill_epochs,
            "distill_rate": distill_rate,
            "skip": skip,
            "overrides": overrides,
        }
        for name, value in values.items():
            if name not in _NOT_PLAIN:
                check_field(name, value)
            object.__setattr__(self, name, value)
        check_together(bits, symmetric, made_options)
        object.__setattr__(self, "skip", checked_patterns(skip))
        object.__setattr__(self, "overrides", self._checked_overrides())

    @classmethod
    def best(cls, **fields: Any) -> Self:
        """Return two-stage with what was measured to generalise best.

        Dampings and the deviation's strength are chosen for each layer on held-out tokens, codes
        and scales are refined jointly, zero points are floats, and inputs are rotated in blocks of
        64 (:data:`tsq_layers.config.presets.BEST`). Other software cannot load what it makes; see
        :meth:`portable`.

        Args:
            fields: of the configuration; those that are given are not changed by the preset.

        Example:
            >>> QuantConfig.best(bits=2, group_size=64).rotation
            64
        """
        return cls(method="best", **fields)

    @classmethod
    def portable(cls, **fields: Any) -> Self:
        """Return :meth:`best` within what the files of other software store.

        Zero points are integers, and inputs are not rotated.

        Args:
            fields: of the configuration; those that are given are not changed by the preset.

        Example:
            >>> config = QuantConfig.portable(bits=4, group_size=128)
            >>> config.rotation, config.options.zero_points, config.options.joint_rounds
            (None, 'integer', 2)
        """
        return cls(method="best", **{**presets.PORTABLE, **fields})

    def _checked_overrides(self) -> dict[str, dict[str, Any]]:
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(
                f"overrides={self.overrides!r}: give a mapping of pattern to changed fields"
            )
        # What an override changes: this configuration, or one that an earlier override has made.
        bases = [self]
        checked: dict[str, dict[str, Any]] = {}
        for pattern, changes in self.overrides.items():
            check_pattern(pattern)
            _check_names(pattern, changes)
            errors: list[ConfigError] = []
            configs: list[QuantConfig] = []
            for base in bases:
                try:
                    configs.append(base.changed(overrides={}, **changes))
                except ConfigError as error:
                    errors.append(error)
            if not configs:
                raise ConfigError(f"overrides[{pattern!r}]: {errors[0]}") from None
            if "method" in changes:
                bases += configs
            checked[pattern] = dict(changes)
        return checked

    def skips(self, name: str) -> bool:
        """Return whether the layer called ``name`` is to stay as it is."""
        return any(matches(pattern, name) for pattern in self.skip)

    def for_layer(self, name: str) -> "QuantConfig":
        """Return the configuration of the layer called ``name``, with overrides applied and none left.

        Raises:
            ConfigError: overrides of several patterns do not go together in this layer.
        """
        changes: dict[str, Any] = {}
        own_options: set[str] = set()  # that stand beside the method
        for pattern, fields in self.overrides.items():
            if matches(pattern, name):
                changes.update(fields)
                own_options = set(fields) if "method" in fields else own_options
        if "method" in changes:
            # Options of other patterns are meant for layers whose method has them.
            others = [name for name in changes if readers(name) and name not in own_options]
            for option in others:
                if not reads_option(changes["method"], option):
                    del changes[option]
        try:
            return self.changed(overrides={}, **changes)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None

    def changed(self, **changes: Any) -> "QuantConfig":
        """Return a copy with other fields or options.

        A change of ``method`` keeps the options that both methods have. ``method="best"`` changes
        what the preset says, where that is neither among the changes nor set in this configuration.

        Raises:
            ConfigError: a value that is not allowed, or an option that the method does not have.

        Example:
            >>> QuantConfig(bits=3).changed(method="best", zero_points="integer").rotation
            64
            >>> QuantConfig(damping=0.05).changed(method="gptq").options
            GPTQ(damping=0.05, act_order=True)
        """
        if "method" not in changes or "options" in changes:
            return dataclasses.replace(self, **changes)
        method = changes["method"]
        fields = {name: getattr(self, name) for name in _general_fields()}
        if isinstance(method, str):
            fields |= self._carried_options(method)
        if method == "best":
            symmetric = changes.get("symmetric", self.symmetric)
            preset = presets.best(symmetric=symmetric)
            if self.rotation is not None:
                del preset["rotation"]
            fields = {**fields, **preset, **self._carried_options(method)}
            changes = {**changes, "method": "two-stage"}
        return QuantConfig(**{**fields, **changes})

    def _carried_options(self, method: str) -> dict[str, Any]:
        """Return the options that are not at their defaults and that another method has too."""
        defaults = OPTIONS[self.method]()
        return {
            name: getattr(self.options, name)
            for name in option_names(self.method)
            if reads_option(method, name) and getattr(self.options, name) != getattr(defaults, name)
        }

    def option(self, name: str, default: Any = None) -> Any:
        """Return an option of the method, or ``default`` where the method has no such option.

        Example:
            >>> QuantConfig(method="rtn").option("damping", 0.01)
            0.01
        """
        assert readers(name), name
        return getattr(self.options, name, default)

    def values(self) -> dict[str, Any]:
        """Return every field, and every option of the method, by name.

        Example:
            >>> list(QuantConfig(method="gptq").values())[3:6]
            ['method', 'damping', 'act_order']
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            if field.name == "options":
                values |= dataclasses.asdict(self.options)
            else:
                values[field.name] = getattr(self, field.name)
        return values

    def __getattr__(self, name: str) -> Any:
        """Give options that were fields of the configuration up to version 0.1, with a warning."""
        if name.startswith("__") or not readers(name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        options = object.__getattribute__(self, "options")
        if not hasattr(options, name):
            raise AttributeError(f"{name}: method {options.method!r} has no such option")
        warnings.warn(
            f"config.{name} is an option of the method now: read config.options.{name}",
            TSQDeprecationWarning,
            stacklevel=2,
        )
        return getattr(options, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled, by version 0.1 too, which had no ``options``."""
        if "options" not in state:
            state = vars(type(self)(**schema.read_version_1(state)))
        self.__dict__.update(state)

    @property
    def uses_deviation(self) -> bool:
        """Return whether the method of this configuration makes use of R, that is of paired passes."""
        enters = self.option("deviation", "none") != "none"
        return bool(enters and self.option("deviation_strength") != 0)

    @property
    def is_settled(self) -> bool:
        """Return whether nothing is left to be chosen on held-out tokens."""
        names = ("damping", "deviation_strength", "deviation_damping")
        return all(self.option(name) != "auto" for name in names)

    def settled(self) -> tuple[float, float, float]:
        """Return damping, strength and damping of the deviation, as numbers.

        Raises:
            ConfigError: one is still to be chosen.
        """
        damping = self.option("damping", 0.01)
        strength = self.option("deviation_strength", 0.0)
        ridge = self.option("deviation_damping", damping)
        if isinstance(damping, str) or isinstance(strength, str) or isinstance(ridge, str):
            raise ConfigError(
                f"damping={damping!r}, deviation_strength={strength!r}, deviation_damping={ridge!r}: "
                "calibrate() chooses what is 'auto'; give numbers here"
            )
        return damping, strength, ridge

    @property
    def has_offsets(self) -> bool:
        """Return whether grids are scales and offsets that are any number, not scales and zero points."""
        return isinstance(self.options, TwoStage) and self.options.zero_points == "float"

    @property
    def has_outliers(self) -> bool:
        """Return whether some weights are stored apart, as a sparse part."""
        return isinstance(self.options, QuantEase) and self.options.has_outliers

    @property
    def holds_zero(self) -> bool:
        """Return whether a weight of exactly zero can be stored as that."""
        return not (self.has_outliers or self.has_offsets or self.tables or self.rotation)

    @property
    def tables(self) -> Codebook | None:
        """Rows or groups that have a look-up table each; ``None`` where there are grids."""
        return self.options.codebook if isinstance(self.options, LNQ) else None

    @property
    def needs_calibration(self) -> bool:
        """Return whether the method of this configuration needs statistics of the layer's inputs."""
        return not isinstance(self.options, RTN) or self.channel_scaling

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """``scale_dtype`` as a ``torch.dtype``."""
        dtype: torch.dtype = getattr(torch, self.scale_dtype)
        return dtype

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, with a ``schema_version``."""
        values: dict[str, Any] = {"schema_version": schema.VERSION}
        for field in dataclasses.fields(self):
            if field.name != "options":
                values[field.name] = getattr(self, field.name)
        values["method"] = {"name": self.method, **dataclasses.asdict(self.options)}
        values["skip"] = list(self.skip)
        values["overrides"] = {
            pattern: {name: _json_value(value) for name, value in changes.items()}
            for pattern, changes in self.overrides.items()
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration that :meth:`to_dict` has written, also in version 0.1.

        Raises:
            ConfigError: an unknown schema version, an unknown key, or a value that is not allowed.
        """
        fields = schema.read(values)
        allowed = [name for name in _general_fields() if name != "options"]
        names = [*allowed, *_all_options()]
        for name in fields:
            if name not in names:
                raise ConfigError(f"unknown field {name!r}; allowed are {', '.join(names)}")
        return cls(**fields)

    def to_json(self) -> str:
        """Return the configuration as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the configuration that :meth:`to_json` has written; raises as :meth:`from_dict`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a JSON object: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"not a JSON object but {type(values).__name__}")
        return cls.from_dict(values)


def _check_names(pattern: str, changes: object) -> None:
    """Refuse an override of a field that layers do not have."""
    if not isinstance(changes, Mapping):
        raise ConfigError(f"overrides[{pattern!r}]={changes!r}: give a mapping of field to value")
    allowed = [name for name in _general_fields() if name not in (*_MODEL_WIDE, "options")]
    allowed += _all_options()
    for name in changes:
        if name not in allowed:
            raise ConfigError(
                f"overrides[{pattern!r}] has unknown field {name!r}; allowed are {', '.join(allowed)}"
            )


def _general_fields() -> list[str]:
    """Return the names of fields but for those that say the method."""
    names = [field.name for field in dataclasses.fields(QuantConfig)]
    names.remove("options")
    return names


def _all_options() -> list[str]:
    """Return the names of the options of all methods, each once."""
    return list(dict.fromkeys(name for method in OPTIONS for name in option_names(method)))


def _json_value(value: object) -> object:
    """Return a value of an override as JSON holds it."""
    if isinstance(value, Options):
        return {"name": value.method, **dataclasses.asdict(value)}
    return value


def explicit_patterns(config: QuantConfig) -> list[str]:
    """Return the patterns that the user gave: every override, and every skip but the default ones."""
    skip = [pattern for pattern in config.skip if pattern not in DEFAULT_SKIP]
    return skip + list(config.overrides)
