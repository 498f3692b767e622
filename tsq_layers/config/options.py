"""Make the options of a method from the ways in which they can be given."""

import dataclasses
from typing import Any

from tsq_layers.config.methods import (
    LNQ,
    OPTIONS,
    Options,
    TwoStage,
    check_readers,
    option_names,
    readers,
)
from tsq_layers.errors import ConfigError

METHODS: tuple[str, ...] = (*OPTIONS, "best")
"""Names that ``method`` may have: the methods, and the preset."""

_WIDEST_TABLE = 4  # bits: the 16 levels of a table stay in registers


def make_options(
    method: str | Options, options: Options | None, method_options: dict[str, Any]
) -> Options:
    """Return the options of a method from the ways in which they can be given."""
    if isinstance(method, Options):
        if options is not None:
            raise ConfigError(f"method={method!r}, options={options!r}: give one of the two")
        options = method
        method = options.method
    if not isinstance(method, str) or method not in OPTIONS:
        raise ConfigError(f"method={method!r}: give one of {', '.join(map(repr, METHODS))}")
    unknown = [name for name in method_options if not readers(name)]
    if unknown:
        raise TypeError(
            f"QuantConfig has no field {unknown[0]!r}, and no method has such an option"
        )
    check_readers(method, list(method_options))
    if options is None:
        return OPTIONS[method](**method_options)
    if not isinstance(options, OPTIONS[method]):
        raise ConfigError(
            f"options={options!r}: they are not of method {method!r}; give options of the method, "
            f"or config.changed(method={method!r}), which keeps what both methods have"
        )
    return dataclasses.replace(options, **method_options)


def check_together(bits: int, symmetric: bool, options: Options) -> None:
    """Refuse values that do not go together."""
    if isinstance(options, LNQ) and bits > _WIDEST_TABLE:
        raise ConfigError(
            f"bits={bits} with method='lnq': give 1 to {_WIDEST_TABLE}; a table has 2^bits levels"
        )
    if isinstance(options, LNQ) and symmetric:
        raise ConfigError("symmetric=True with method='lnq': give False; a table has no zero point")
    if isinstance(options, TwoStage) and symmetric and options.zero_points == "float":
        raise ConfigError(
            "symmetric=True with zero_points='float': a symmetric grid has no zero points; "
            "give zero_points='integer', or symmetric=False"
        )


def reads_option(method: object, option: str) -> bool:
    """Return whether a method, given by name or by its options, has an option."""
    if isinstance(method, str):
        base = "two-stage" if method == "best" else method
        return base in OPTIONS and option in option_names(base)
    return isinstance(method, Options) and hasattr(method, option)
