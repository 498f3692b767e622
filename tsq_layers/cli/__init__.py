"""`tsq`, the command line: a file for each command, and what they share."""

from tsq_layers.cli.program import main

__all__ = ["main"]
