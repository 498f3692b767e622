"""What the methods do to real trained networks: metrics, seconds, coverage, bits per weight.

    python -m benchmarks.networks [--networks encoder gpt2 …] [--bits 4 3] [--methods rtn gptq two-stage] [--out DIR]

From the root of the repository. Groups of 64, asymmetric; `gptq` has static grids with weight-MSE clipping and
act-order, and calibrates sequentially on the same data as `two-stage`. Results are kept as JSON lines in `--out`
as they are done; an interrupted run goes on. Networks are downloaded once, to the cache directory of `tsq demo`.
"""

import argparse
import copy
import importlib
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.cli.demonstration import assets, results
from tsq_layers.config import quant_config as configuration
from tsq_layers.errors import FewTokensWarning, SkippedLayerWarning
from tsq_layers.passes.batches import attention_mask, default_forward

NETWORKS = ("decoder", "encoder", "gpt2", "speech", "vision")
METHODS = ("rtn", "gptq", "two-stage")
GROUP_SIZE = 64

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.networks:
        network = importlib.import_module(f"benchmarks.networks.{name}")
        rows = list(_rows(network, options))
        print(
            "\n".join(["", f"**{network.NAME}**", "", *table(rows, network.METRIC), ""]), flush=True
        )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--bits", type=int, nargs="+", default=(4, 3))
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, choices=get_args(configuration.Method)
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another one draws other calibration data"
    )
    parser.add_argument("--threads", type=int, help="threads of torch; its own default otherwise")
    parser.add_argument("--out", type=Path, default=Path("tsq-networks"))
    return parser.parse_args(arguments)


def _rows(network: Any, options: argparse.Namespace) -> Iterator[Row]:
    """The float network, then every method at every width."""
    cache = assets.cache_directory()
    reference = network.load(cache)
    batches = network.calibration(cache, options.seed)
    cases = [
        (
            method,
            tsq.QuantConfig(method=method, bits=bits, group_size=GROUP_SIZE, skip=network.SKIP),
        )
        for bits in options.bits
        for method in options.methods
    ]
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in sorted(Path(network.__file__).parent.glob("*.py"))
    )
    same = [network.NAME, source, results.library_digest(), torch.get_num_threads()]
    for method, config in [("float", None), *cases]:
        what = [config.to_dict(), options.seed] if config else ["float"]
        key = results.fingerprint(same, what)
        row = _kept(options.out / "runs.jsonl").get(key)
        if row is None:
            row = _measured(network, cache, reference, batches, config) | {"method": method}
            _keep(options.out / "runs.jsonl", key, row)
        values = ", ".join(f"{metric} {value:.4g}" for metric, value in row["metrics"].items())
        print(
            f"{row['network']}, {row['method']}, {row['bits']} bits: {values}; {row['seconds']:.1f} s",
            flush=True,
        )
        yield row


def _keep(path: Path, key: str, row: Row) -> None:
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps({"key": key, "row": row}) + "\n")


def _kept(path: Path) -> dict[str, Row]:
    """Results of earlier runs by their keys; a line that an interruption tore is not there."""
    rows: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[values["key"]] = values["row"]
    return rows


def _measured(
    network: Any,
    cache: Path,
    reference: nn.Module,
    batches: Sequence[Any],
    config: tsq.QuantConfig | None,
) -> Row:
    row: Row = {"network": network.NAME, "bits": 32, "seconds": 0.0}
    model = reference
    if config is not None:
        model = copy.deepcopy(reference)
        started = time.perf_counter()
        model = _quantised(network, model, batches, config)
        row |= {"bits": config.bits, "seconds": time.perf_counter() - started}
        report = model.tsq_report
        stored = [layer for layer in report.layers if layer.bits_per_weight is not None]
        parameters = sum(parameter.numel() for parameter in reference.parameters())
        row["coverage"] = sum(layer.weights for layer in stored) / parameters
        row["bits_per_weight"] = report.bits_per_weight
        row["size"] = report.size_after
    with torch.compiler.set_stance(
        "force_eager"
    ):  # compiling for every shape would take longer than it saves
        row["metrics"] = network.evaluate(cache, model, reference)
    return row


def _quantised(
    network: Any, model: nn.Module, batches: Sequence[Any], config: tsq.QuantConfig
) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewTokensWarning)  # the modules say how much data there is
        warnings.simplefilter("ignore", SkippedLayerWarning)  # so does the coverage
        return tsq.quantize(
            model,
            config,
            batches if config.needs_calibration else None,
            forward=network.FORWARD or default_forward,
            padding_mask=network.PADDING_MASK or attention_mask,
        )


def table(rows: Sequence[Row], first: str) -> list[str]:
    """Lines of a Markdown table with the metric ``first`` before others; coverage is the share of
    all parameters that was quantised.
    """
    metrics = sorted(rows[0]["metrics"], key=lambda metric: metric != first)
    titles = ["method", "bits", *metrics, "bits/weight", "coverage", "MB", "seconds"]
    return results.markdown(titles, [_cells(row, metrics) for row in rows])


def _cells(row: Row, metrics: Sequence[str]) -> list[str]:
    cells = [
        row["method"],
        str(row["bits"]),
        *(f"{row['metrics'][metric]:.4g}" for metric in metrics),
    ]
    if row["method"] == "float":
        return cells + [results.BLANK] * 4
    coverage, bits = f"{row['coverage']:.1%}", f"{row['bits_per_weight']:.3f}"
    return [*cells, bits, coverage, f"{row['size'] / 1e6:.1f}", f"{row['seconds']:.1f}"]


if __name__ == "__main__":
    main()
