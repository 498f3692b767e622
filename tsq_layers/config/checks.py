"""Check the value of one field of a configuration at a time.

Patterns are checked in :mod:`tsq_layers.config.patterns`, fields that depend on each other where
the configuration is made.
"""

import math
from collections.abc import Callable
from typing import cast

from tsq_layers.errors import ConfigError

Check = Callable[[str, object], None]


def check_field(name: str, value: object) -> None:
    """Refuse a value that a field cannot have.

    Args:
        name: of a field of :class:`~tsq_layers.config.QuantConfig`, or of an option of a method.
        value: its value.

    Raises:
        ConfigError: the value is not allowed; the message names field, value and what is allowed.

    Example:
        >>> check_field("bits", 4)
        >>> check_field("bits", 9)
        Traceback (most recent call last):
        ...
        tsq_layers.errors.ConfigError: bits=9: give an integer from 1 to 8
    """
    CHECKS[name](name, value)


def _refuse(name: str, value: object, allowed: str) -> None:
    raise ConfigError(f"{name}={value!r}: give {allowed}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        _refuse(name, value, "True or False")


def _choice(*words: str) -> Check:
    def check(name: str, value: object) -> None:
        if value not in words:
            _refuse(name, value, f"one of {', '.join(map(repr, words))}")

    return check


def _integer(low: int, high: int | None = None, allowed: str | None = None) -> Check:
    if allowed is None:
        allowed = f"an integer of at least {low}"
        if high is not None:
            allowed = f"an integer from {low} to {high}"

    def check(name: str, value: object) -> None:
        # A bool is an int for Python, and a mistake here.
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        number = cast("int", value)
        if not is_integer or number < low or (high is not None and number > high):
            _refuse(name, value, allowed)

    return check


def _number(
    low: float, high: float | None = None, *, above: bool = False, word: str | None = None
) -> Check:
    allowed = f"a number {'above' if above else 'of at least'} {low:g}"
    if high is not None:
        allowed += f" and at most {high:g}"
    if word is not None:
        allowed += f", or {word!r}"

    def check(name: str, value: object) -> None:
        if word is not None and value == word:
            return
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            _refuse(name, value, allowed)
        number = float(cast("float", value))
        too_low = number <= low if above else number < low
        too_high = high is not None and number > high
        if not math.isfinite(number) or too_low or too_high:
            _refuse(name, value, allowed)

    return check


def _or_none(check: Check) -> Check:
    def check_unless_none(name: str, value: object) -> None:
        if value is not None:
            check(name, value)

    return check_unless_none


def _rotation(name: str, value: object) -> None:
    is_power_of_two = type(value) is int and value > 1 and value.bit_count() == 1
    if value is not None and not is_power_of_two:
        _refuse(name, value, "a power of two of at least 2, or None")


def _activation_bits(name: str, value: object) -> None:
    if value is not None and (type(value) is not int or value != 8):
        _refuse(name, value, "8, or None")


def _keep_zeros(name: str, value: object) -> None:
    if value not in (True, False, None):
        _refuse(name, value, "True, False, or None for layers with many zeros")


CHECKS: dict[str, Check] = {
    # of every method
    "bits": _integer(1, 8),
    "group_size": _or_none(_integer(1, None, "a positive integer, or None for one group per row")),
    "symmetric": _flag,
    "scale_dtype": _choice("float16", "bfloat16", "float32"),
    "rotation": _rotation,
    "channel_scaling": _flag,
    "activation_bits": _activation_bits,
    "guidance": _integer(0),
    "keep_zeros": _keep_zeros,
    "min_expert_tokens": _or_none(_integer(0, None, "an integer of at least 0, or None")),
    "embeddings": _flag,
    "distill_epochs": _integer(0),
    "distill_rate": _number(0.0, 1.0, above=True),
    # options of methods
    "damping": _number(0.0, 1.0, above=True, word="auto"),
    "act_order": _flag,
    "grid_metric": _choice("feedback", "blocks"),
    "deviation": _choice("target", "refine", "none"),
    "deviation_strength": _number(0.0, 1.0, word="auto"),
    "deviation_damping": _number(0.0, 10.0, above=True, word="auto"),
    "descent_start": _choice("gptq", "nearest"),
    "descent_sweeps": _integer(1),
    "descent_relax": _flag,
    "outliers": _number(0.0, 1.0),
    "outlier_columns": _integer(0),
    "greedy_steps": _number(0.0, above=True),
    "greedy_pairs": _flag,
    "codebook": _choice("row", "group"),
    "codebook_rounds": _integer(1),
    "codebook_sweeps": _integer(1),
    "refine": _choice("exact", "descent", "none"),
    "refine_ridge": _number(0.0),
    "refine_sweeps": _integer(1),
    "joint_rounds": _integer(0),
    "joint_sweeps": _integer(1),
    "zero_points": _choice("integer", "float"),
}
"""Field or option → its check."""
