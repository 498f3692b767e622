"""Fields of a configuration for tests that run every method with options of some."""

from typing import Any

from tsq_layers.config.methods import readers


def applicable(**fields: Any) -> dict[str, Any]:
    """Leave out the options that the method does not read."""
    method = fields.get("method", "two-stage")
    base = "two-stage" if method == "best" else method
    return {
        name: value for name, value in fields.items() if not readers(name) or base in readers(name)
    }
