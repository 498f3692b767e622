"""`tsq quantize`."""

import argparse

import tsq_layers as tsq
from tsq_layers.cli import models, options
from tsq_layers.errors import ConfigError
from tsq_layers.formats.configurations import check_configuration
from tsq_layers.integrations import causal_lm as bridge


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument(
        "model", metavar="MODEL_DIR", help="directory of the float model and its tokenizer"
    )
    command.add_argument(
        "--out", metavar="DIR", required=True, help="where to save the quantised model"
    )
    options.add_configuration(command)
    options.add_format(command, own=True)
    command.add_argument("--text", metavar="FILE", help="calibration text, UTF-8")
    options.add_amounts(command)
    command.add_argument(
        "--min-coverage",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="share of the parameters, 0 to 1, that must be quantised, or it is an error (default: 0)",
    )
    options.add_checkpoint_dir(command)
    options.add_offload(command)
    options.add_placement(command)
    options.add_json(command, "what was written")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load, quantise, write."""
    config = options.configuration(arguments)
    offload = options.offload(arguments)
    # Before the model is read, so that an error comes at once; shapes are checked later.
    if arguments.format != options.OWN_FORMAT:
        check_configuration(config, arguments.format)
    models.check_out(arguments, {"the float model": arguments.model})
    if models.is_foreign(arguments.model):
        raise ConfigError(
            f"{arguments.model} holds a model that is quantised already: give the float model, or "
            "tsq refine improves this one"
        )
    tokenizer = bridge.load_tokenizer(arguments.model)
    batches = None
    if arguments.text is not None:
        batches = options.calibration(arguments, tokenizer)
    elif config.needs_calibration or config.distill_epochs:
        if config.method != "rtn":
            field = "method"
        elif config.channel_scaling:
            field = "channel_scaling"
        else:
            field = "distill_epochs"
        raise ConfigError(
            f"{field}={getattr(config, field)!r} needs calibration text: give --text FILE, or a "
            "configuration that needs none (--method rtn)"
        )
    model = options.placed(
        bridge.load_causal_lm(arguments.model, arguments.dtype), arguments.device
    )
    if batches is not None:
        bridge.check_length(model, arguments.sequence_length, "--sequence-length")
    models.check_format(model, tokenizer, arguments, config)
    model = tsq.quantize(
        model,
        config,
        batches,
        offload=offload,
        checkpoint_dir=arguments.checkpoint_dir,
        min_coverage=arguments.min_coverage,
    )
    models.save(model, tokenizer, arguments, fresh=True)
