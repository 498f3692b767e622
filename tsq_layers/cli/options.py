"""Options that several commands have, and what they mean."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.config import QuantConfig
from tsq_layers.config.options import METHODS
from tsq_layers.config.presets import PORTABLE
from tsq_layers.errors import ConfigError
from tsq_layers.formats.engines import SERVICES
from tsq_layers.formats.exporting import FORMATS
from tsq_layers.integrations import texts

OWN_FORMAT = "tsq"
_CONFIG_OPTIONS = ("bits", "group_size", "method", "symmetric", "embeddings")


def add_configuration(command: argparse.ArgumentParser) -> None:
    """Add the options that say how to quantise."""
    default = QuantConfig()
    unset: Any = argparse.SUPPRESS
    command.add_argument(
        "--bits", type=int, default=unset, help=f"width of a code, 1 to 8 (default: {default.bits})"
    )
    command.add_argument(
        "--group-size",
        type=_group_size,
        default=unset,
        help=f"columns that share a scale, or none for whole rows (default: {default.group_size})",
    )
    command.add_argument(
        "--method",
        choices=METHODS,
        default=unset,
        help=f"(default: {default.method}); best in another --format is without float zero points and rotation",
    )
    command.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        default=unset,
        help="codes centred on zero, without zero points (default: no)",
    )
    command.add_argument(
        "--embeddings",
        action=argparse.BooleanOptionalAction,
        default=unset,
        help="quantise the tables of embeddings too (default: no)",
    )
    command.add_argument(
        "--config", metavar="FILE.json", help="a QuantConfig as JSON; the options above change it"
    )


def _group_size(text: str) -> int | None:
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a positive integer, or none for one group per row"
        )
    if text == "none":
        return None
    return int(text)


def configuration(arguments: argparse.Namespace) -> QuantConfig:
    """Return the configuration of ``--config``, or the default one, with what the other options change.

    In another library's ``--format``, ``--method best`` is without what these do not hold.
    """
    base = QuantConfig()
    if arguments.config is not None:
        base = QuantConfig.from_json(texts.read_text(arguments.config))
    # An option that was not given is no attribute: its default is argparse.SUPPRESS.
    changes = {}
    for name in _CONFIG_OPTIONS:
        if hasattr(arguments, name):
            changes[name] = getattr(arguments, name)
    # `tsq plan` has no --format.
    is_foreign = getattr(arguments, "format", OWN_FORMAT) != OWN_FORMAT
    if is_foreign and changes.get("method") == "best":
        changes.update(PORTABLE)
    return base.changed(**changes)


def add_amounts(command: argparse.ArgumentParser) -> None:
    """Add the options that say how much text is calibrated on."""
    command.add_argument(
        "--tokens",
        type=int,
        default=32768,
        help="calibration tokens, in sequences spread evenly over the text (default: %(default)s)",
    )
    command.add_argument(
        "--sequence-length",
        type=int,
        default=1024,
        help="tokens in a sequence (default: %(default)s)",
    )
    command.add_argument(
        "--batch-size", type=int, default=4, help="sequences in a batch (default: %(default)s)"
    )


def sequences(arguments: argparse.Namespace) -> int:
    """Return how many sequences ``--tokens`` are."""
    count: int = arguments.tokens // max(1, arguments.sequence_length)
    if count < 1:
        raise ConfigError(
            f"--tokens {arguments.tokens} is less than one sequence of --sequence-length {arguments.sequence_length}"
        )
    return count


def calibration(arguments: argparse.Namespace, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Return the batches of ``--text``."""
    tokens = texts.read_tokens(Path(arguments.text), tokenizer)
    return texts.windows(
        tokens, arguments.sequence_length, sequences(arguments), arguments.batch_size
    )


def add_offload(command: argparse.ArgumentParser) -> None:
    """Add the option that says where activations wait."""
    command.add_argument(
        "--offload",
        metavar="DEVICE",
        help="where activations wait, for example cpu (default: there)",
    )


def offload(arguments: argparse.Namespace, *, planned: bool = False) -> torch.device | None:
    """Return the device of ``--offload``.

    It must exist and return tensors that are moved to it, unless it is only ``planned`` with.
    """
    if arguments.offload is None:
        return None
    try:
        device = torch.device(arguments.offload)
        if not planned:
            torch.zeros(1).to(device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--offload {arguments.offload}: {str(error).splitlines()[0]}") from error
    return device


def add_checkpoint_dir(command: argparse.ArgumentParser) -> None:
    """Add the option for the directory of a run that may be killed."""
    command.add_argument(
        "--checkpoint-dir",
        metavar="DIR",
        help="keep every solved layer here; the same command goes on from there",
    )


def add_placement(command: argparse.ArgumentParser) -> None:
    """Add the options that say where a model runs, and in which dtype."""
    add_dtype(command)
    command.add_argument(
        "--device",
        default="cpu",
        help="where the model runs, for example cuda (default: %(default)s)",
    )


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Add the dtype of a float model."""
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of a float model (default: %(default)s)",
    )


def add_format(command: argparse.ArgumentParser, *, own: bool) -> None:
    """Add the format of the files that are written."""
    formats = (OWN_FORMAT, *FORMATS) if own else tuple(FORMATS)
    default = "; default: tsq, this library's own, which holds every method" if own else ""
    command.add_argument(
        "--format",
        choices=formats,
        default=OWN_FORMAT if own else None,
        required=not own,
        help=f"of the files that are written{default}",
    )
    command.add_argument(
        "--dequantize-others",
        action="store_true",
        help="write layers that the format cannot hold as floats",
    )
    command.add_argument(
        "--engine",
        choices=tuple(SERVICES),
        help="warn if it is known not to serve what is written in that format",
    )


def add_json(command: argparse.ArgumentParser, what: str) -> None:
    """Add ``--json``, for programs that read the output."""
    command.add_argument("--json", action="store_true", help=f"{what} as JSON")


def placed(model: nn.Module, device: str) -> nn.Module:
    """Move a model to ``--device``."""
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error
