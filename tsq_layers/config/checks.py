"""What each field of a configuration may hold by itself; patterns and overrides are checked elsewhere."""

import math
from collections.abc import Mapping
from typing import Any, cast

from tsq_layers.errors import ConfigError

_WIDEST_TABLE = 4
_FLAGS = (
    "symmetric",
    "act_order",
    "descent_relax",
    "greedy_pairs",
    "embeddings",
    "channel_scaling",
)


def check_values(values: Mapping[str, Any], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse values that a field cannot have.

    Args:
        values: field → value, of all fields of a :class:`~tsq_layers.config.QuantConfig`.
        choices: field → the words that are allowed.

    Raises:
        ConfigError: the first value that is not allowed; the message names field, value and what is allowed.
    """
    _check_integers(values)
    _check_floats(values)
    for name in _FLAGS:
        if not isinstance(values[name], bool):
            raise ConfigError(f"{name}={values[name]!r}: give True or False")
    for name, allowed in choices.items():
        if values[name] not in allowed:
            raise ConfigError(
                f"{name}={values[name]!r}: give one of {', '.join(map(repr, allowed))}"
            )
    _check_table(values["method"], values["bits"], values["symmetric"])


def _check_integers(values: Mapping[str, Any]) -> None:
    _check_integer("bits", values["bits"], 1, 8)
    if values["group_size"] is not None:
        allowed = "a positive integer, or None for one group per row"
        _check_integer("group_size", values["group_size"], 1, None, allowed)
    for name in (
        "descent_sweeps",
        "refine_sweeps",
        "joint_sweeps",
        "codebook_rounds",
        "codebook_sweeps",
    ):
        _check_integer(name, values[name], 1, None)
    for name in ("joint_rounds", "outlier_columns", "guidance", "distill_epochs"):
        _check_integer(name, values[name], 0, None)
    if values["keep_zeros"] not in (True, False, None):
        raise ConfigError(
            f"keep_zeros={values['keep_zeros']!r}: give True, False, or None for layers with many zeros"
        )
    tokens, rotation, activation_bits = (
        values[n] for n in ("min_expert_tokens", "rotation", "activation_bits")
    )
    if tokens is not None:
        _check_integer("min_expert_tokens", tokens, 0, None, "an integer of at least 0, or None")
    if rotation is not None and not (
        type(rotation) is int and rotation > 1 and rotation.bit_count() == 1
    ):
        raise ConfigError(f"rotation={rotation!r}: give a power of two of at least 2, or None")
    if activation_bits is not None and (type(activation_bits) is not int or activation_bits != 8):
        raise ConfigError(f"activation_bits={activation_bits!r}: give 8, or None")


def _check_floats(values: Mapping[str, Any]) -> None:
    _check_float("damping", values["damping"], 0.0, 1.0, open_low=True, other="auto")
    _check_float("deviation_strength", values["deviation_strength"], 0.0, 1.0, other="auto")
    _check_float(
        "deviation_damping", values["deviation_damping"], 0.0, 10.0, open_low=True, other="auto"
    )
    _check_float("greedy_steps", values["greedy_steps"], 0.0, None, open_low=True)
    _check_float("refine_ridge", values["refine_ridge"], 0.0, None)
    _check_float("outliers", values["outliers"], 0.0, 1.0)
    _check_float("distill_rate", values["distill_rate"], 0.0, 1.0, open_low=True)


def _check_table(method: str, bits: int, symmetric: bool) -> None:
    if method == "lnq" and bits > _WIDEST_TABLE:
        raise ConfigError(
            f"bits={bits} with method='lnq': give 1 to {_WIDEST_TABLE}; a table has 2^bits levels"
        )
    if method == "lnq" and symmetric:
        raise ConfigError("symmetric=True with method='lnq': give False; a table has no zero point")


def _check_integer(
    name: str, value: object, low: int, high: int | None, allowed: str | None = None
) -> None:
    if allowed is None:
        allowed = (
            f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        )
    wrong = not isinstance(value, int) or isinstance(value, bool) or value < low
    if wrong or (high is not None and isinstance(value, int) and value > high):
        raise ConfigError(f"{name}={value!r}: give {allowed}")


def _check_float(
    name: str,
    value: object,
    low: float,
    high: float | None,
    *,
    open_low: bool = False,
    other: str | None = None,
) -> None:
    if other is not None and value == other:
        return
    inside = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    )
    if inside:
        number = float(cast("float", value))
        inside = (number > low if open_low else number >= low) and (high is None or number <= high)
    if not inside:
        bounds = f"{'above' if open_low else 'of at least'} {low:g}" + (
            f" and at most {high:g}" if high is not None else ""
        )
        raise ConfigError(
            f"{name}={value!r}: give a number {bounds}" + (f", or {other!r}" if other else "")
        )
