"""From a model to its quantised weights: time and memory beside other libraries, and beside what it must cost.

    python -m benchmarks.end_to_end [--peer "GPTQModel GPTQ=PYTHON"] [--tokens 8192] [--rounds 2] [--json FILE]

From the root of the repository. SmolLM2-135M, the same calibration tokens for all, each run in a process of its own,
one thread, in turn, round after round. CPU seconds are those of quantising alone, of all threads; memory is the largest
resident set of the whole process. The lower bound is the time of the matrix products that cannot be left out, at the
speed that this machine reaches in a large product just before and after: one forward pass of the tokens for each
stream, the upper half of Σ x xᵀ for each input, and for two streams Σ (x − x̃) xᵀ.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import tsq_layers as tsq
from benchmarks.ablation import texts
from benchmarks.ablation.peers import PEERS
from tsq_layers.cli.demonstration import assets
from tsq_layers.errors import FewTokensWarning
from tsq_layers.integrations.transformers import load_causal_lm

OURS = {
    "two-stage, two streams": {"method": "two-stage"},
    "gptq, one stream": {"method": "gptq"},
}
_SCRIPTS = Path(__file__).parent / "ablation" / "peer_scripts"


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if options.one:
        _quantize(options)
        return
    interpreters = dict(text.split("=", 1) for text in options.peer)
    names = [*OURS, *interpreters]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            runs[name].append(_run(name, interpreters.get(name), options))
            print(f"{name}: {_shown(runs[name][-1])}", flush=True)
    found = {
        name: {key: statistics.median(run[key] for run in each) for key in each[0]}
        for name, each in runs.items()
    }
    _report(found, list(interpreters))
    if options.json:
        options.json.write_text(
            json.dumps({"tokens": options.tokens, "runs": runs, "medians": found}, indent=2) + "\n"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer", action="append", default=[], help=f"NAME=interpreter, names: {', '.join(PEERS)}"
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=list(OURS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(name: str, interpreter: str | None, options: argparse.Namespace) -> dict[str, float]:
    """One run in a process of its own."""
    cache = assets.cache_directory()
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.safetensors"
        if interpreter is None:
            arguments = [
                "--tokens",
                options.tokens,
                "--bits",
                options.bits,
                "--group-size",
                options.group_size,
            ]
            command = [
                sys.executable,
                "-m",
                "benchmarks.end_to_end",
                "--one",
                name,
                "--out",
                scratch,
                *arguments,
            ]
        else:
            batches = texts.calibration(cache, options.tokens, 0)
            save_file({"input_ids": torch.cat([batch["input_ids"] for batch in batches])}, tokens)
            script = _SCRIPTS / f"{PEERS[name]}.py"
            command = [
                interpreter,
                script,
                assets.smollm2(cache),
                tokens,
                scratch,
                options.bits,
                options.group_size,
            ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GPTQMODEL_CPU_WORKERS": "2",
        }
        if interpreter is not None:
            environment.pop("PYTHONPATH", None)
        with (Path(scratch) / "log").open("w") as log:
            process = subprocess.Popen(  # noqa: S603
                [str(part) for part in command], env=environment, stdout=log, stderr=log
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{name} failed: {(Path(scratch) / 'log').read_text()[-2000:]}")
        times = json.loads((Path(scratch) / "times.json").read_text(encoding="utf-8"))
    return {"MiB": usage.ru_maxrss / 1024} | times


def _quantize(options: argparse.Namespace) -> None:
    """What the process of one of our runs does."""
    cache = assets.cache_directory()
    batches = texts.calibration(cache, options.tokens, 0)
    before = _peak()
    started, cpu_started = time.perf_counter(), time.process_time()
    model = load_causal_lm(assets.smollm2(cache))
    least = _least_flops(model, options.tokens, paired="two" in options.one)
    config = tsq.QuantConfig(bits=options.bits, group_size=options.group_size, **OURS[options.one])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewTokensWarning)
        tsq.prepare(model, config)
        tsq.calibrate(model, batches, progress=False)
        tsq.convert(model)
    times = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
    times["bound"] = 2 * least / (before + _peak())
    (options.out / "times.json").write_text(json.dumps(times), encoding="utf-8")


def _least_flops(model: nn.Module, tokens: int, *, paired: bool) -> float:
    """Matrix products that cannot be left out: forward passes, H of each input, R of each input. Without the head."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    weights = [layer for name, layer in layers.items() if not name.endswith("lm_head")]
    shared = ("k_proj", "v_proj", "up_proj")  # their inputs are those of q_proj and gate_proj
    inputs = [layer for name, layer in layers.items() if not name.endswith((*shared, "lm_head"))]
    forward = sum(2 * layer.weight.numel() for layer in weights) * (1 + paired)
    sums = sum(layer.in_features**2 * (1 + 2 * paired) for layer in inputs)
    return float(tokens * (forward + sums))


def _peak() -> float:
    """Floating-point operations a second of CPU time in large products; the best of some."""
    size, times = 1024, []
    left, right, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    for _ in range(12):
        started = time.process_time()
        torch.mm(left, right, out=out)
        times.append(time.process_time() - started)
    return 2 * size**3 / min(times)


def _shown(run: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in run.items())


def _report(found: dict[str, dict[str, float]], peers: list[str]) -> None:
    print(
        "\n| run | CPU s | wall s | MiB | × lower bound | × faster peer | × leaner peer "
        "|\n|---|---|---|---|---|---|---|"
    )
    fastest = min((found[name]["cpu_seconds"] for name in peers), default=float("nan"))
    leanest = min((found[name]["MiB"] for name in peers), default=float("nan"))
    for name, run in found.items():
        bound = f"{run['cpu_seconds'] / run['bound']:.2f}" if "bound" in run else ""
        print(
            f"| {name} | {run['cpu_seconds']:.0f} | {run['seconds']:.0f} | {run['MiB']:.0f} | {bound} "
            f"| {run['cpu_seconds'] / fastest:.2f} | {run['MiB'] / leanest:.2f} |"
        )


if __name__ == "__main__":
    main()
