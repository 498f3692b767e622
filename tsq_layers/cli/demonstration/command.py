"""`tsq demo`."""

import argparse
import json
import sys
from pathlib import Path

from tsq_layers.cli import options
from tsq_layers.cli.demonstration.run import run_demo
from tsq_layers.cli.output import write, write_json
from tsq_layers.integrations.texts import read_text


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument(
        "--quick",
        action="store_true",
        help="fewer methods and fewer tokens: minutes, and rougher numbers",
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        default="tsq-demo",
        help="results.json, perplexity.png and the saved models (default: %(default)s)",
    )
    command.add_argument(
        "--text", metavar="FILE", nargs="+", default=[], help="more texts to evaluate on"
    )
    options.add_json(command, "the results, at the end,")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run it; with ``--json`` its lines go to stderr."""
    out, texts = Path(arguments.out), [Path(text) for text in arguments.text]
    if not arguments.json:
        run_demo(out, quick=arguments.quick, texts=texts, write=write)
        return
    run_demo(out, quick=arguments.quick, texts=texts, write=_tell)
    write_json(json.loads(read_text(out / "results.json")))


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
