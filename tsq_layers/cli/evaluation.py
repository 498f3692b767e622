"""`tsq eval`."""

import argparse
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tsq_layers.cli import models, options
from tsq_layers.cli.output import write, write_json
from tsq_layers.errors import CheckpointError, ConfigError
from tsq_layers.evaluation import perplexity
from tsq_layers.integrations import causal_lm as bridge
from tsq_layers.integrations import texts


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument(
        "model",
        metavar="DIR",
        help="directory of a float model, or of one that tsq or another tool has quantised",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help="evaluation text, UTF-8")
    source.add_argument("--token-file", metavar="FILE", help=argparse.SUPPRESS)
    command.add_argument(
        "--tokens",
        type=int,
        help="use only so many, in windows spread evenly over the text (default: the whole text)",
    )
    command.add_argument(
        "--window", type=int, default=1024, help="tokens in a window (default: %(default)s)"
    )
    command.add_argument(
        "--batch-size", type=int, default=1, help="windows that run at once (default: %(default)s)"
    )
    options.add_json(command, "the result, with all digits,")
    options.add_placement(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure, and write the number."""
    window = arguments.window
    if window < 2:
        raise ConfigError(
            f"--window {window}: give at least 2 tokens, of which all but the first are predicted"
        )
    if arguments.tokens is not None and arguments.tokens < window:
        raise ConfigError(
            f"--tokens {arguments.tokens} is less than one window of --window {window}: give more, or a smaller window"
        )
    if arguments.token_file is not None:
        tokens = _read_token_file(Path(arguments.token_file))
    else:
        tokens = texts.read_tokens(Path(arguments.text), bridge.load_tokenizer(arguments.model))
    if arguments.tokens is not None:
        batches = texts.windows(tokens, window, arguments.tokens // window)
        tokens = torch.cat([batch["input_ids"].flatten() for batch in batches])
    model = options.placed(models.load(arguments.model, arguments.dtype), arguments.device)
    bridge.check_length(model, min(window, tokens.numel()), "--window")
    value = perplexity(model, tokens, window=window, batch_size=arguments.batch_size)
    if arguments.json:
        number = value if math.isfinite(value) else str(value)
        write_json({"perplexity": number, "tokens": tokens.numel(), "window": window})
    else:
        write(f"perplexity {value:.6f} on {tokens.numel()} tokens in windows of {window}")


def _read_token_file(path: Path) -> Tensor:
    try:
        return load_file(path)["tokens"]
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} is not a safetensors file with 'tokens': {error}") from error
