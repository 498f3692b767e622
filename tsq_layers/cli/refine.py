"""`tsq refine`."""

import argparse

import tsq_layers as tsq
from tsq_layers.cli import models, options
from tsq_layers.integrations import causal_lm as bridge
from tsq_layers.workflow.refinement import DEFAULT


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    command.add_argument(
        "model", metavar="DIR", help="directory of a quantised model, of tsq or of another tool"
    )
    command.add_argument(
        "reference", metavar="FLOAT_DIR", help="directory of the float model that it was made from"
    )
    command.add_argument("--text", metavar="FILE", required=True, help="calibration text, UTF-8")
    command.add_argument(
        "--out", metavar="DIR", required=True, help="where to save the refined model"
    )
    options.add_format(command, own=True)
    options.add_amounts(command)
    command.add_argument(
        "--joint-rounds",
        type=int,
        default=0,
        help="improve the codes too, in so many rounds (default: %(default)s)",
    )
    options.add_offload(command)
    options.add_checkpoint_dir(command)
    options.add_placement(command)
    options.add_json(command, "what was written")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load both models, refine the scales, write."""
    models.check_out(
        arguments,
        {"the model that is read": arguments.model, "the float model": arguments.reference},
    )
    offload = options.offload(arguments)
    config = DEFAULT.changed(joint_rounds=arguments.joint_rounds)
    tokenizer = bridge.load_tokenizer(arguments.reference)
    batches = options.calibration(arguments, tokenizer)
    model = models.load_quantised(arguments.model)
    reference = options.placed(
        bridge.load_causal_lm(arguments.reference, arguments.dtype), arguments.device
    )
    bridge.check_length(reference, arguments.sequence_length, "--sequence-length")
    models.check_format(model, tokenizer, arguments)
    model = tsq.refine(
        options.placed(model, arguments.device),
        reference,
        batches,
        config=config,
        offload=offload,
        checkpoint_dir=arguments.checkpoint_dir,
    )
    models.save(model, tokenizer, arguments, fresh=True)
