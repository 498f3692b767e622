"""Name the versions of the libraries that a result depends on."""

import importlib.metadata
import platform

import torch


def library_versions() -> dict[str, str]:
    """Versions of this library, torch and Python, as :class:`Report` holds them."""
    try:
        own = importlib.metadata.version("tsq_layers")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
        own = "not installed"
    return {"tsq_layers": own, "torch": torch.__version__, "python": platform.python_version()}
