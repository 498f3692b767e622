"""Reading the fields of a dataclass from a JSON object: keys, types, and numbers that JSON lacks."""

import dataclasses
import json
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tsq_layers.config import QuantConfig
from tsq_layers.errors import CheckpointError, ConfigError


def json_object(text: str, where: str) -> dict[str, Any]:
    """A text that is a JSON object.

    Raises:
        CheckpointError: it is not.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where} is not a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is not a JSON object but {type(values).__name__}")
    return values


def read_config(values: Mapping[str, Any], where: str) -> QuantConfig:
    """A configuration in a file.

    Raises:
        CheckpointError: it is not valid.
    """
    try:
        return QuantConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{where}: config: {error}") from None


def checked_fields(record: type, values: object, where: str) -> dict[str, Any]:
    """Keys and JSON types of a dataclass that was read from a file.

    Raises:
        CheckpointError: an unknown or missing key, or a value that does not fit its annotation.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where} is {type(values).__name__}, not a JSON object")
    if values.get("name"):
        where = f"{where}, {values['name']!r}"
    hints = {f.name: get_type_hints(record)[f.name] for f in dataclasses.fields(record)}
    for key, value in values.items():
        if key not in hints:
            raise CheckpointError(
                f"{where} has unknown key {key!r}; allowed are {', '.join(hints)}"
            )
        if not _fits(value, hints[key]):
            raise CheckpointError(f"{where}: {key}={value!r} is not {_named(hints[key])}")
    required = [
        f.name
        for f in dataclasses.fields(record)
        if f.default is f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise CheckpointError(f"{where} lacks key {missing[0]!r}")
    return dict(values)


def _named(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type)
        else str(hint).replace("typing.", "").replace("collections.abc.", "")
    )


def _fits(value: object, hint: Any) -> bool:
    """Return whether a JSON value can stand for a field with this annotation; nested values are not looked at."""
    if get_origin(hint) in (UnionType, Union):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    accepted: dict[Any, type | tuple[type, ...]] = {
        float: (int, float),
        tuple: list,
        Mapping: dict,
        QuantConfig: dict,
    }
    plain = get_origin(hint) or hint
    return isinstance(value, accepted.get(plain, plain))


def json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as text."""
    return value if math.isfinite(value) else str(float(value))


def read_number(value: object, where: str) -> float:
    """Inverse of :func:`json_number`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if value in ("nan", "inf", "-inf"):
        return float(str(value))
    raise CheckpointError(f"{where} is {value!r}, not a number")
