"""`tsq import`."""

import argparse
from pathlib import Path

from tsq_layers.cli import models, options
from tsq_layers.errors import ConfigError


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument(
        "model", metavar="DIR", help="directory of a GPTQ or compressed-tensors checkpoint"
    )
    command.add_argument("--out", metavar="DIR", required=True, help="where to save it")
    options.add_json(command, "what was written")
    command.set_defaults(run=run, format=options.OWN_FORMAT, engine=None)


def run(arguments: argparse.Namespace) -> None:
    """Read the checkpoint of another tool, write it as this library's."""
    models.check_out(arguments, {"the model that is read": arguments.model})
    path = Path(arguments.model)
    if not path.is_dir():
        raise ConfigError(f"no directory {path}")
    if not models.is_foreign(path):
        raise ConfigError(
            f"{path} holds no checkpoint of another tool: its config.json should have a quantization_config"
        )
    models.save(models.load(path), models.tokenizer_of(path), arguments)
