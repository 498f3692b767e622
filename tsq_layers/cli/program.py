"""The program: its commands, its exit codes. Results go to stdout, everything else to stderr."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from tsq_layers.cli import (
    completion,
    evaluation,
    export,
    importing,
    inspection,
    plan,
    quantize,
    refine,
)
from tsq_layers.cli.completion import Parser
from tsq_layers.cli.demonstration import command as demonstration
from tsq_layers.config.versions import library_versions
from tsq_layers.errors import TSQError

COMMANDS = {
    "quantize": (quantize, "quantise a model in a local transformers directory"),
    "plan": (plan, "memory and time that quantize would need, before it is run"),
    "eval": (evaluation, "perplexity of a float or quantised model on a text"),
    "inspect": (inspection, "what happened to every layer of a quantised model"),
    "export": (export, "write a quantised model for transformers, GPTQModel, vLLM or llama.cpp"),
    "import": (
        importing,
        "take over a GPTQ or compressed-tensors checkpoint, codes and scales as they are",
    ),
    "refine": (refine, "better scales for a quantised model of any maker, codes as they are"),
    "demo": (demonstration, "quantise SmolLM2-135M-Instruct in several ways and compare them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tsq`` with these arguments (by default those of the process) and return its exit code.

    0 is success, 2 an error of the user or of a file, told in one line on stderr, and 130 Ctrl-C.
    """
    arguments = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            arguments.run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (TSQError, OSError) as error:
            sys.stderr.write(f"tsq: error: {' '.join(str(error).split())}\n")
            return 2
        except KeyboardInterrupt:
            sys.stderr.write("tsq: interrupted\n")
            return 130
    return 0


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning in one line on stderr."""
    sys.stderr.write(f"tsq: warning: {message}\n")


def parser() -> Parser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(
        prog="tsq",
        description="Quantise language models, measure and inspect the result, exchange it with other tools.",
    )
    top.add_argument(
        "--version", action="version", version=f"tsq_layers {library_versions()['tsq_layers']}"
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        module.add(
            commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        )
    text = "print what lets a shell complete the options of tsq"
    completion.add(
        commands.add_parser("completion", help=text, description=f"{text[0].upper()}{text[1:]}."),
        parser,
    )
    return top
