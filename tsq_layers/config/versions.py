"""Name the version of this library, and of the libraries that a result depends on."""

import platform

import torch

VERSION = "0.2.0"
"""The version of this library; the build reads it from here."""


def library_versions() -> dict[str, str]:
    """Return the versions of this library, torch and Python, as a report holds them.

    Example:
        >>> library_versions()["tsq_layers"] == VERSION
        True
    """
    return {
        "tsq_layers": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
