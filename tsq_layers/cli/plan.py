"""`tsq plan`."""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.cli import options
from tsq_layers.cli.output import write
from tsq_layers.errors import CalibrationError
from tsq_layers.integrations import causal_lm as bridge
from tsq_layers.integrations import texts
from tsq_layers.planning import plan


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument(
        "model",
        metavar="MODEL_DIR",
        help="directory of the float model; only its config.json is read",
    )
    options.add_configuration(command)
    options.add_amounts(command)
    options.add_offload(command)
    options.add_dtype(command)
    options.add_json(command, "the plan, in bytes and seconds,")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Plan on the model without its weights, if that can be; they are loaded only if its course depends on values."""
    config = options.configuration(arguments)
    count = options.sequences(arguments)
    offload = options.offload(arguments, planned=True)
    example = None
    batch_count = 0
    if config.needs_calibration:
        tokens = torch.empty(count * arguments.sequence_length, dtype=torch.int64, device="meta")
        windows = texts.windows(tokens, arguments.sequence_length, count, arguments.batch_size)
        example = windows[0]["input_ids"]
        batch_count = len(windows)
    model = bridge.empty_causal_lm(arguments.model, arguments.dtype)
    try:
        result = plan(model, config, _random_tokens(model, example), batch_count, offload=offload)
    except CalibrationError:
        model = bridge.load_causal_lm(arguments.model, arguments.dtype)
        result = plan(model, config, _random_tokens(model, example), batch_count, offload=offload)
    write(result.to_json() if arguments.json else str(result))


def _random_tokens(model: nn.Module, like: Tensor | None) -> dict[str, Tensor] | None:
    """A batch of token ids that a model knows; the same each time."""
    if like is None:
        return None
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(table.num_embeddings, like.shape, generator=generator)}
