"""`tsq export`."""

import argparse

from tsq_layers.cli import models, options


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument(
        "model", metavar="DIR", help="directory of a quantised model, of tsq or of another tool"
    )
    command.add_argument(
        "--out", metavar="DIR", required=True, help="where to write it; a new or empty directory"
    )
    options.add_format(command, own=False)
    command.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="of a file (default: %(default)s)"
    )
    options.add_json(command, "what was written")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, and write it as another format."""
    models.check_out(arguments, {"the model that is read": arguments.model})
    model = models.load_quantised(arguments.model)
    models.save(model, models.tokenizer_of(arguments.model), arguments)
