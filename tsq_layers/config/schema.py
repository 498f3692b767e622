"""Read configurations of every schema version as the fields of today's.

Version 2 (0.2.0) holds the options of the method under ``"method"``:
``{"schema_version": 2, "bits": 2, "method": {"name": "two-stage", "joint_rounds": 2}, …}``.
Version 1 (0.1) was flat, and held the options of all methods.
"""

from collections.abc import Mapping
from typing import Any

from tsq_layers.config import presets
from tsq_layers.config.methods import OPTIONS, option_names, readers
from tsq_layers.errors import ConfigError

VERSION = 2


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a configuration that a JSON object holds.

    Args:
        values: the object, with its ``schema_version``. It is not changed.

    Raises:
        ConfigError: another schema version, or a method that is not one.
    """
    fields = {key: value for key, value in values.items() if key != "schema_version"}
    version = values.get("schema_version")
    if version not in (1, VERSION) or isinstance(version, bool):
        raise ConfigError(
            f"schema_version={version!r}: this version of tsq_layers reads 1 and {VERSION}"
        )
    fields = read_version_1(fields) if version == 1 else _read_version_2(fields)
    if isinstance(fields.get("skip"), list):
        fields["skip"] = tuple(fields["skip"])
    return fields


def _read_version_2(fields: dict[str, Any]) -> dict[str, Any]:
    if "method" in fields:
        fields |= _method_fields(fields["method"])
    overrides = fields.get("overrides")
    if isinstance(overrides, Mapping):
        fields["overrides"] = {
            pattern: _override_fields(changes) for pattern, changes in overrides.items()
        }
    return fields


def _override_fields(changes: object) -> object:
    if isinstance(changes, Mapping) and "method" in changes:
        return {**changes, **_method_fields(changes["method"])}
    return changes


def _method_fields(method: object) -> dict[str, Any]:
    """Return name and options of a method; what is no object is checked where it is used."""
    if not isinstance(method, Mapping):
        return {"method": method}
    options = dict(method)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"method={dict(method)!r}: it has no 'name'; give one of {', '.join(OPTIONS)}"
        )
    for option in options:
        if not readers(option):
            raise ConfigError(f"unknown option {option!r} of method {name!r}")
    return {"method": name, **options}


def read_version_1(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for the flat fields of version 1.

    Version 1 accepted options that the method does not read, and ignored them: they are left out.
    An override of ``method`` was applied to the options of all methods: those that the new method
    reads are added to it.
    """
    options = {name: value for name, value in fields.items() if readers(name)}
    general = {name: value for name, value in fields.items() if name not in options}
    method = fields.get("method", "two-stage")
    general |= _read_options(method, options, symmetric=fields.get("symmetric", False))
    overrides = fields.get("overrides")
    if isinstance(overrides, Mapping):
        general["overrides"] = {
            pattern: _read_override(changes, method, options, fields)
            for pattern, changes in overrides.items()
        }
    return general


def _read_override(
    changes: object, method: object, options: dict[str, Any], fields: Mapping[str, Any]
) -> object:
    if not isinstance(changes, Mapping):
        return changes
    symmetric = changes.get("symmetric", fields.get("symmetric", False))
    own = {name: value for name, value in changes.items() if readers(name)}
    plain = {name: value for name, value in changes.items() if name not in own}
    if "method" in changes:
        return plain | _read_options(changes["method"], {**options, **own}, symmetric=symmetric)
    read_options = _read_options(method, own, symmetric=symmetric)
    if symmetric and isinstance(method, str) and _base(method) == "two-stage":
        # Version 1 ignored float zero points of a symmetric grid.
        read_options["zero_points"] = "integer"
    return plain | read_options


def _read_options(method: object, options: dict[str, Any], *, symmetric: object) -> dict[str, Any]:
    """Return the options that a method reads; of what is no method, all of them."""
    if not isinstance(method, str) or _base(method) not in OPTIONS:
        return options
    names = option_names(_base(method))
    read_options = {name: value for name, value in options.items() if name in names}
    if symmetric is True and read_options.get("zero_points") == "float":
        read_options["zero_points"] = "integer"
    return read_options


def _base(method: str) -> str:
    """Return the method of which a preset gives the options."""
    return "two-stage" if method in presets.PRESETS else method
