"""`tsq`, the command line: quantize, plan, eval, inspect, demo. Results go to stdout, everything else to stderr."""

import argparse
import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import tsq_layers as tsq
from tsq_layers.checkpoint.description import DESCRIPTION_FILE, Description
from tsq_layers.checkpoint.headers import description_from_headers, outlined
from tsq_layers.config import Method, QuantConfig
from tsq_layers.demo.run import run_demo
from tsq_layers.errors import CalibrationError, CheckpointError, ConfigError, TSQError
from tsq_layers.integrations import causal_lm as bridge
from tsq_layers.integrations import texts
from tsq_layers.perplexity import perplexity
from tsq_layers.planning import plan
from tsq_layers.report import LayerReport, Report, format_bytes

_CONFIG_OPTIONS = ("bits", "group_size", "method", "symmetric", "embeddings")
_STEPS = ("initialize", "assign", "refine")
_OBJECTIVES = ("assign", "descent", "exact")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tsq`` with these arguments (by default those of the process) and return its exit code.

    0 is success, 2 an error of the user or of a file, told in one line on stderr, and 130 Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
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


def write(line: str = "") -> None:
    """One line of result on stdout, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    sys.stderr.write(f"tsq: warning: {message}\n")


def _quantize(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    if Path(arguments.out).resolve() == Path(arguments.model).resolve():
        raise ConfigError(f"--out {arguments.out} is the directory of the float model: give another one")
    tokenizer = bridge.load_tokenizer(arguments.model)
    batches = _calibration(arguments, config, tokenizer)
    model = _placed(bridge.load_causal_lm(arguments.model, arguments.dtype), arguments.device)
    model = tsq.quantize(
        model,
        config,
        batches,
        offload=arguments.offload,
        checkpoint_dir=arguments.checkpoint_dir,
        min_coverage=arguments.min_coverage,
    )
    bridge.save_causal_lm(model, tokenizer, arguments.out)
    for line in str(tsq.report(model)).split("\n\n")[0].splitlines():
        write(line)
    write(f"saved in {arguments.out}; tsq inspect {arguments.out} shows every layer")


def _config(arguments: argparse.Namespace) -> QuantConfig:
    """The configuration of ``--config``, or the default one, with what the other options change."""
    base = QuantConfig()
    if arguments.config is not None:
        base = QuantConfig.from_json(_read(arguments.config))
    given = {name: getattr(arguments, name) for name in _CONFIG_OPTIONS if hasattr(arguments, name)}
    return dataclasses.replace(base, **given)


def _calibration(arguments: argparse.Namespace, config: QuantConfig, tokenizer: Any) -> list[dict[str, Tensor]] | None:
    if arguments.text is None:
        if config.needs_calibration:
            raise ConfigError(
                f"method {config.method!r} needs calibration text: give --text FILE, or --method rtn, which needs none"
            )
        return None
    tokens = texts.read_tokens(Path(arguments.text), tokenizer)
    return texts.windows(tokens, arguments.sequence_length, _sequences(arguments), arguments.batch_size)


def _sequences(arguments: argparse.Namespace) -> int:
    """How many sequences ``--tokens`` are."""
    count: int = arguments.tokens // max(1, arguments.sequence_length)
    if count < 1:
        raise ConfigError(
            f"--tokens {arguments.tokens} is less than one sequence of --sequence-length {arguments.sequence_length}"
        )
    return count


def _plan(arguments: argparse.Namespace) -> None:
    """Plan on the model without its weights, if that can be; they are loaded only if its course depends on values."""
    config, count = _config(arguments), _sequences(arguments)
    example, batches = None, 0
    if config.needs_calibration:
        tokens = torch.empty(count * arguments.sequence_length, dtype=torch.int64, device="meta")
        windows = texts.windows(tokens, arguments.sequence_length, count, arguments.batch_size)
        example, batches = windows[0]["input_ids"], len(windows)
    model = bridge.empty_causal_lm(arguments.model, arguments.dtype)
    try:
        found = plan(model, config, _random_tokens(model, example), batches, offload=arguments.offload)
    except CalibrationError:
        model = bridge.load_causal_lm(arguments.model, arguments.dtype)
        found = plan(model, config, _random_tokens(model, example), batches, offload=arguments.offload)
    write(found.to_json() if arguments.json else str(found))


def _random_tokens(model: nn.Module, like: Tensor | None) -> dict[str, Tensor] | None:
    """A batch of token ids that a model knows; the same each time."""
    if like is None:
        return None
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(table.num_embeddings, like.shape, generator=generator)}


def _eval(arguments: argparse.Namespace) -> None:
    if arguments.token_file is not None:
        tokens = _read_token_file(Path(arguments.token_file))
    else:
        tokens = texts.read_tokens(Path(arguments.text), bridge.load_tokenizer(arguments.model))
    if arguments.tokens is not None:
        batches = texts.windows(tokens, arguments.window, max(1, arguments.tokens // arguments.window))
        tokens = torch.cat([batch["input_ids"].flatten() for batch in batches])
    model = _placed(bridge.load_causal_lm(arguments.model, arguments.dtype), arguments.device)
    value = perplexity(model, tokens, window=arguments.window, batch_size=arguments.batch_size)
    if arguments.json:
        write(
            json.dumps(
                {
                    "perplexity": value if math.isfinite(value) else str(value),
                    "tokens": tokens.numel(),
                    "window": arguments.window,
                }
            )
        )
    else:
        write(f"perplexity {value:.6f} on {tokens.numel()} tokens in windows of {arguments.window}")


def _read_token_file(path: Path) -> Tensor:
    try:
        return load_file(path)["tokens"]
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} is not a safetensors file with 'tokens': {error}") from error


def _placed(model: nn.Module, device: str) -> nn.Module:
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _inspect(arguments: argparse.Namespace) -> None:
    path = Path(arguments.model) / DESCRIPTION_FILE
    if not bridge.is_quantised(path.parent):
        raise ConfigError(
            f"{arguments.model} holds no {DESCRIPTION_FILE}: give a directory that tsq quantize or tsq.save wrote"
        )
    report = _saved_report(path)
    files = _report_files(report, arguments)
    if arguments.json:
        write(report.to_json())
        return
    for line in str(report).split("\n\n")[0].splitlines():
        write(line)
    write()
    for line in files or _layer_table(report.layers):
        write(line)


def _report_files(report: Report, arguments: argparse.Namespace) -> list[str]:
    """Write the page and the picture that were asked for; a line about each."""
    title = Path(arguments.model).resolve().name
    writers = {
        "page": (arguments.html, lambda file: report.to_html(file, title=title)),
        "picture": (arguments.plot, report.plot),
    }
    lines = []
    for what, (file, writer) in writers.items():
        if file is not None:
            try:
                writer(file)
            except OSError as error:
                raise ConfigError(f"cannot write {file}: {error.strerror or error}") from error
            lines.append(f"{what}: {file}")
    return lines


def _saved_report(path: Path) -> Report:
    outline = None if path.exists() else outlined(path.parent)
    if outline is not None:
        report = description_from_headers(path.parent, outline).report
    else:
        report = Description.from_json(_read(path)).report
    if report is None:
        raise ConfigError(f"{path} holds no report: the model was not made by tsq.quantize or tsq.convert")
    return report


def _layer_table(layers: Sequence[LayerReport]) -> list[str]:
    """One aligned line a layer: bits, size, loss after each step, and the objective of stage 2 by either solver."""
    losses, objectives = [f"{step} loss" for step in _STEPS], [f"{step} objective" for step in _OBJECTIVES]
    rows = [["layer", "shape", "method", "bits", "group", "bits/weight", "size", *losses, *objectives, "status"]]
    for layer in layers:
        size = None if layer.bits_per_weight is None else format_bytes(round(layer.weights * layer.bits_per_weight / 8))
        plain = [layer.name or "(model)", f"{layer.rows}×{layer.columns}", layer.method, layer.bits, layer.group_size]
        numbers = [layer.bits_per_weight, size, *map(layer.losses.get, _STEPS), *map(layer.objective.get, _OBJECTIVES)]
        status = f"{layer.status}: {layer.reason}" if layer.reason else layer.status
        rows.append([*map(_cell, plain), *map(_cell, numbers), status])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [
            row[0].ljust(widths[0]),
            *(text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1], strict=True)),
            row[-1],
        ]
        for row in rows
    ]
    return ["  ".join(row) for row in aligned]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def _demo(arguments: argparse.Namespace) -> None:
    run_demo(Path(arguments.out), quick=arguments.quick, texts=[Path(text) for text in arguments.text], write=write)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _group_size(text: str) -> int | None:
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a positive integer, or none for one group per row")
    return None if text == "none" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tsq", description="Quantise language models, measure and inspect the result."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(commands.add_parser("quantize", help="quantise a model in a local transformers directory"))
    _add_plan(commands.add_parser("plan", help="memory and time that quantize would need, before it is run"))
    _add_eval(commands.add_parser("eval", help="perplexity of a float or quantised model on a text"))
    inspect = commands.add_parser("inspect", help="what happened to every layer of a quantised model")
    inspect.add_argument("model", metavar="DIR", help="directory that tsq quantize wrote")
    inspect.add_argument("--json", action="store_true", help="the whole report as JSON")
    inspect.add_argument("--html", metavar="FILE.html", help="write the report as a page for a browser")
    inspect.add_argument("--plot", metavar="FILE.png", help="draw loss, bits and seconds of every layer; or .svg, .pdf")
    inspect.set_defaults(run=_inspect)
    demo = commands.add_parser("demo", help="quantise SmolLM2-135M-Instruct in several ways and compare them")
    demo.add_argument(
        "--quick", action="store_true", help="fewer methods and fewer tokens: minutes, and rougher numbers"
    )
    demo.add_argument(
        "--out",
        metavar="DIR",
        default="tsq-demo",
        help="results.json, perplexity.png and the saved models (default: %(default)s)",
    )
    demo.add_argument("--text", metavar="FILE", nargs="+", default=[], help="more texts to evaluate on")
    demo.set_defaults(run=_demo)
    return parser


def _add_quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL_DIR", help="directory of the float model and its tokenizer")
    command.add_argument("--out", metavar="DIR", required=True, help="where to save the quantised model")
    _add_configuration(command)
    command.add_argument("--text", metavar="FILE", help="calibration text, UTF-8")
    _add_amounts(command)
    command.add_argument(
        "--min-coverage",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="share of the parameters, 0 to 1, that must be quantised, or it is an error (default: 0)",
    )
    command.add_argument(
        "--checkpoint-dir", metavar="DIR", help="keep every solved layer here; the same command goes on from there"
    )
    command.add_argument("--offload", metavar="DEVICE", help="where activations wait, for example cpu (default: there)")
    _add_placement(command)
    command.set_defaults(run=_quantize)


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODEL_DIR", help="directory of the float model; only its config.json is read"
    )
    _add_configuration(command)
    _add_amounts(command)
    command.add_argument("--offload", metavar="DEVICE", help="where activations would wait, if not with the model")
    _add_dtype(command)
    command.add_argument("--json", action="store_true", help="the plan as JSON, in bytes and seconds")
    command.set_defaults(run=_plan)


def _add_configuration(command: argparse.ArgumentParser) -> None:
    default = QuantConfig()
    unset: Any = argparse.SUPPRESS
    command.add_argument("--bits", type=int, default=unset, help=f"width of a code, 1 to 8 (default: {default.bits})")
    command.add_argument(
        "--group-size",
        type=_group_size,
        default=unset,
        help=f"columns that share a scale, or none for whole rows (default: {default.group_size})",
    )
    command.add_argument("--method", choices=get_args(Method), default=unset, help=f"(default: {default.method})")
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
    command.add_argument("--config", metavar="FILE.json", help="a QuantConfig as JSON; the options above change it")


def _add_amounts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tokens",
        type=int,
        default=32768,
        help="calibration tokens, in sequences spread evenly over the text (default: %(default)s)",
    )
    command.add_argument(
        "--sequence-length", type=int, default=1024, help="tokens in a sequence (default: %(default)s)"
    )
    command.add_argument("--batch-size", type=int, default=4, help="sequences in a batch (default: %(default)s)")


def _add_eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="DIR", help="directory of a float model, or one that tsq quantize wrote")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help="evaluation text, UTF-8")
    source.add_argument("--token-file", metavar="FILE", help=argparse.SUPPRESS)
    command.add_argument(
        "--tokens", type=int, help="use only so many, in windows spread evenly over the text (default: the whole text)"
    )
    command.add_argument("--window", type=int, default=1024, help="tokens in a window (default: %(default)s)")
    command.add_argument("--batch-size", type=int, default=1, help="windows that run at once (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="the result as JSON, with all digits")
    _add_placement(command)
    command.set_defaults(run=_eval)


def _add_placement(command: argparse.ArgumentParser) -> None:
    _add_dtype(command)
    command.add_argument(
        "--device", default="cpu", help="where the model runs, for example cuda (default: %(default)s)"
    )


def _add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of a float model (default: %(default)s)",
    )
