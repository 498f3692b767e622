"""Tokens a second that a whole model generates, and the memory that it takes: packed beside float.

    python benchmarks/generation.py [--rows float32 bfloat16 "4 bits" "2 bits"] [--tokens 32] [--rounds 5] [--json FILE]

SmolLM2-135M-Instruct with its cache of keys and values, one sequence, greedy; packed layers are
rounded to the nearest code
in groups of 64, float32 for the rest: speed does not depend on the method. Every model is a process
of its own that only loads it and waits
while another one runs; rounds are interleaved, medians are printed. Memory is the resident set after loading and one
round, less that of a process that has only imported the libraries. ``OMP_NUM_THREADS`` sets the threads.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import tsq_layers as tsq
from tsq_layers.cli.demonstration import assets
from tsq_layers.integrations.transformers import load_causal_lm, save_causal_lm

ROWS = ("float32", "bfloat16", "8 bits", "4 bits", "3 bits", "2 bits")
PROMPT = 16


def directory_of(row: str, folder: Path) -> Path:
    source = assets.smollm2(assets.cache_directory())
    if not row.endswith("bits"):
        return source
    target = folder / row.replace(" ", "-")
    model = tsq.quantize(
        load_causal_lm(source),
        tsq.QuantConfig(bits=int(row.split(maxsplit=1)[0]), group_size=64, method="rtn"),
    )
    save_causal_lm(model, None, target)
    return target


def resident() -> int:
    """Bytes of this process that are in memory."""
    fields = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return int(fields["VmRSS"].split()[0]) * 1024


@torch.no_grad()
def model_process(directory: str, dtype: str, tokens: int) -> None:
    """Load, and generate once for each line of the input."""
    before = resident()
    model = load_causal_lm(directory, dtype)
    tsq.warmup(model)
    ids = torch.arange(PROMPT).unsqueeze(0) + 100

    def generate() -> float:
        output = model(ids, use_cache=True)
        started = time.perf_counter()
        for _ in range(tokens):
            following = output.logits[:, -1:].argmax(-1)
            output = model(following, past_key_values=output.past_key_values, use_cache=True)
        return tokens / (time.perf_counter() - started)

    generate()
    print(json.dumps({"bytes": resident() - before}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"rate": generate()}), flush=True)


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a model's process ended; its message is above")
    values: dict[str, float] = json.loads(line)
    return values


def compare(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    processes = {}
    for row in options.rows:
        dtype = "bfloat16" if row == "bfloat16" else "float32"
        command = [
            sys.executable,
            __file__,
            "--model",
            str(directory_of(row, folder)),
            dtype,
            "--tokens",
            str(options.tokens),
        ]
        processes[row] = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    memory = {row: answer(process)["bytes"] for row, process in processes.items()}
    rates: dict[str, list[float]] = {row: [] for row in processes}
    for _ in range(options.rounds):
        for row, process in processes.items():
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            rates[row].append(answer(process)["rate"])
    for process in processes.values():
        process.communicate()
    return [{"row": row, "bytes": memory[row], "rates": rates[row]} for row in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=["float32", "bfloat16", "4 bits", "2 bits"]
    )
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        model_process(*options.model, options.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(options, Path(folder))
    first = statistics.median(found[0]["rates"])
    print(f"| | tokens a second | range | × {found[0]['row']} | MiB |\n|---|---:|---:|---:|---:|")
    for each in found:
        rates = sorted(each["rates"])
        middle = statistics.median(rates)
        print(
            f"| {each['row']} | {middle:.1f} | {rates[0]:.1f}–{rates[-1]:.1f} | "
            f"{middle / first:.2f} | {each['bytes'] / 2**20:.0f} |"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"tokens": options.tokens, "runs": found}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
