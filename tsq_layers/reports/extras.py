"""Optional packages, imported when they are first needed."""

import importlib
from types import ModuleType

from tsq_layers.errors import MissingExtraError


def required(module: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        MissingExtraError: the package is not installed.

    Example:
        >>> required("no_such_package.part")
        Traceback (most recent call last):
        ...
        tsq_layers.errors.MissingExtraError: this needs no_such_package: pip install "tsq_layers[report]"
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            # Something that the package itself needs is missing, which no extra of ours brings.
            raise
        raise MissingExtraError(
            f'this needs {package}: pip install "tsq_layers[report]"'
        ) from error
