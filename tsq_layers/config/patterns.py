"""Patterns of layer names: globs, or regular expressions after ``re:``."""

import re
from fnmatch import fnmatchcase

from tsq_layers.errors import ConfigError


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern (a glob, or ``re:`` and a regular expression) matches a module's name.

    Example:
        >>> matches("mlp.*", "model.layers.3.mlp.up_proj"), matches("re:.*[qk]_proj", "attn.v_proj")
        (True, False)
    """
    parts = name.split(".")
    tails = (".".join(parts[start:]) for start in range(len(parts)))
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], tail) for tail in tails)
    return any(fnmatchcase(tail, pattern) for tail in tails)


def checked_patterns(skip: object) -> tuple[str, ...]:
    """The patterns of layers that stay as they are, as a tuple.

    Raises:
        ConfigError: not a tuple or list of patterns.
    """
    if isinstance(skip, str) or not isinstance(skip, (tuple, list)):
        raise ConfigError(f"skip={skip!r}: give a tuple of patterns, for example ('lm_head',)")
    for pattern in skip:
        check_pattern(pattern)
    return tuple(skip)


def check_pattern(pattern: object) -> None:
    """Refuse what is no pattern.

    Raises:
        ConfigError: not a string, an empty one, or a regular expression with a mistake.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(
            f"pattern {pattern!r}: give a glob such as '*.down_proj', or 're:' and a regular expression"
        )
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from None
