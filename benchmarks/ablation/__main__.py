"""Run rows of the ablation that are not in the results yet, then print the tables.

    python -m benchmarks.ablation [--rows gptq two-stage …] [--bits 2 3] [--tokens 16384] [--seeds 0] [--out DIR]

From the root of the repository. A row takes minutes; results are kept as JSON lines in `--out` as they are done, and
an interrupted run goes on. The results that the tables of `benchmarks/README.md` show are beside this file.
"""

import argparse
import dataclasses
import itertools
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tsq_layers as tsq
from benchmarks.ablation import peers, picture, records, tables, texts
from benchmarks.ablation.records import Run
from benchmarks.ablation.rows import ROWS
from tsq_layers.cli.demonstration import assets, results
from tsq_layers.errors import FewTokensWarning
from tsq_layers.integrations.transformers import load_causal_lm

RESULTS = Path(__file__).with_name("results.jsonl")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    cache = assets.cache_directory()
    wanted = [
        Run(name=name, bits=bits, group_size=group_size, tokens=tokens, seed=seed)
        for bits, group_size, tokens, seed, name in itertools.product(
            options.bits, options.group_size, options.tokens, options.seeds, options.rows
        )
    ]
    for run in [] if options.tables else [records.FLOAT, *wanted]:
        if run.key not in records.kept(options.out):
            done = _measured(run, cache, options)
            records.keep(options.out, done)
            values = ", ".join(f"{value:.2f} on {text}" for text, value in done.perplexity.items())
            print(f"{done.label}: {values}; {done.seconds:.0f} s", flush=True)
    runs = list(records.kept(options.out).values())
    print("\n".join(tables.lines(runs)))
    where = {
        "bits": options.bits[0],
        "group_size": options.group_size[0],
        "tokens": options.tokens[0],
    }
    for draw, path in ((picture.draw, options.picture), (picture.draw_axes, options.axes)):
        if path is not None:
            draw(runs, path, **where)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=[*ROWS, *peers.PEERS])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--group-size", type=int, nargs="+", default=[64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384], help="calibration tokens")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="each draws other calibration windows"
    )
    parser.add_argument("--threads", type=int, help="threads of torch; its own default otherwise")
    parser.add_argument("--python", type=Path, help="the interpreter that has the peers of --rows")
    parser.add_argument(
        "--tables", action="store_true", help="only print the tables of what is there"
    )
    parser.add_argument(
        "--picture", type=Path, help="draw the table of the first of --bits, --group-size, --tokens"
    )
    parser.add_argument(
        "--axes", type=Path, help="draw the headline rows around the first of these"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of JSON lines")
    return parser.parse_args(arguments)


def _measured(run: Run, cache: Path, options: argparse.Namespace) -> Run:
    directory = assets.smollm2(cache)
    if run.name in peers.PEERS:
        batches = texts.calibration(cache, run.tokens, run.seed)
        model, seconds, cpu = peers.quantized(
            run, directory, batches, options.python, options.threads
        )
        return dataclasses.replace(
            run, perplexity=_perplexities(model, cache), seconds=seconds, cpu_seconds=cpu
        )
    model = load_causal_lm(directory)
    if run == records.FLOAT:
        return dataclasses.replace(run, perplexity=_perplexities(model, cache))
    config = tsq.QuantConfig(**{"bits": run.bits, "group_size": run.group_size, **ROWS[run.name]})
    started, cpu_started = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewTokensWarning)  # one axis is how few they are
        tsq.prepare(model, config)
        if config.needs_calibration:
            batches = texts.calibration(cache, run.tokens, run.seed)
            tsq.calibrate(model, batches, held_out=texts.held_out(cache), progress=False)
        model = tsq.convert(model)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    report = model.tsq_report
    layers = [layer for layer in report.layers if layer.status == "quantized" and layer.losses]

    def mean(values: list[dict[str, float]]) -> float | None:
        return (
            sum(list(steps.values())[-1] for steps in values) / len(values)
            if values and values[0]
            else None
        )

    return dataclasses.replace(
        run,
        perplexity=_perplexities(model, cache),
        loss=mean([dict(layer.losses) for layer in layers]),
        held_out_loss=mean([dict(layer.held_out_losses) for layer in layers]),
        bits_per_weight=report.bits_per_weight,
        seconds=seconds,
        cpu_seconds=cpu,
        settings=_settings(config),
        source=results.library_digest(),
    )


def _settings(config: tsq.QuantConfig) -> dict[str, Any]:
    """What a configuration changes."""
    default = tsq.QuantConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != default[name]}


def _perplexities(model: nn.Module, cache: Path) -> dict[str, float]:
    with torch.compiler.set_stance(
        "force_eager"
    ):  # compiling for so few calls would take longer than it saves
        return {
            name: tsq.perplexity(model, tokens, window=texts.WINDOW, progress=False)
            for name, tokens in texts.evaluation(cache).items()
        }


if __name__ == "__main__":
    main()
