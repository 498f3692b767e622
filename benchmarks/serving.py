"""Tokens a second that vLLM serves: packed layers, the float model, and vLLM's own 4-bit kernel.

    python benchmarks/serving.py [--rows …] [--more NAME=DIR …] [--dtype bfloat16] [--rounds 5] [--out FILE]

SmolLM2-135M-Instruct, rounded to the nearest code in groups of 64: speed does not depend on the method. Every
engine is a process of its own and waits while another one runs; rounds are interleaved, medians are
printed. ``OMP_NUM_THREADS`` sets the threads. An engine that does not run is listed with its reason.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tsq_layers as tsq
from tsq_layers.cli.demonstration import assets
from tsq_layers.formats import export_checkpoint
from tsq_layers.integrations.transformers import load_causal_lm, save_causal_lm

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
# What is asked for: sequences, tokens of each prompt, new tokens of each sequence.
WORKLOADS = {"1 sequence": (1, 16, 24), "4 sequences": (4, 16, 24), "prompt of 512": (1, 512, 1)}
ROWS = ("float", "2 bits", "3 bits", "4 bits", "8 bits", "vLLM's 4 bits")


def directory_of(row: str, folder: Path) -> Path:
    """A directory that vLLM serves; made where it does not exist."""
    source, target = assets.smollm2(assets.cache_directory()), folder / row.replace(" ", "-")
    if row == "float":
        return source
    if not target.exists():
        own = not row.startswith("vLLM")
        config = tsq.QuantConfig(
            bits=int(row.split()[-2]), group_size=64, method="rtn", symmetric=not own
        )
        model = tsq.quantize(load_causal_lm(source, "bfloat16"), config)
        if own:
            save_causal_lm(model, None, target)
            name_method(target / "config.json")
        else:
            export_checkpoint(model, target, format="compressed-tensors", engine="vllm")
    return target


def name_method(path: Path) -> None:
    """Add the key that vLLM looks for, where it is not there."""
    values = json.loads(path.read_text())
    values.setdefault("quantization_config", {"quant_method": "tsq"})
    path.write_text(json.dumps(values))


# --- an engine, in its own process -----------------------------------------------------------------


def engine(directory: str, dtype: str) -> None:
    """Load, say so, and run one workload for each line of the input."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415  (the process that compares needs none)

    llm = LLM(
        model=directory,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=600,
        max_num_seqs=4,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    answer(ready=True)
    for line in sys.stdin:
        sequences, length, new = WORKLOADS[line.strip()]
        prompts = [
            {"prompt_token_ids": [1 + (7 * i + s) % 5000 for i in range(length)]}
            for s in range(sequences)
        ]
        options = SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False, temperature=0)
        started = time.perf_counter()
        llm.generate(prompts, options, use_tqdm=False)
        seconds = time.perf_counter() - started
        answer(rate=sequences * (new if new > 1 else length) / seconds)


def answer(**values: Any) -> None:
    print("ANSWER", json.dumps(values), flush=True)


class Engine:
    """The other end of :func:`engine`."""

    def __init__(self, directory: Path, dtype: str) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (it lives as long as the process)
        command = [sys.executable, __file__, "--engine", str(directory), "--dtype", dtype]
        self.process = subprocess.Popen(  # noqa: S603  (no shell, this file)
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | SETTINGS,
        )
        self.failure: str | None = None

    def ready(self) -> bool:
        """Wait until it has loaded; ``False``, and a reason in ``failure``, if it cannot."""
        self.failure = None if self._heard() else self._reason()
        return self.failure is None

    def rate(self, workload: str) -> float | None:
        """Tokens a second, once; ``None``, and a reason in ``failure``, if it cannot."""
        assert self.process.stdin is not None
        self.process.stdin.write(workload + "\n")
        self.process.stdin.flush()
        heard = self._heard()
        if heard is None:
            self.failure = self._reason()
            return None
        return float(heard["rate"])

    def _heard(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return dict(json.loads(line.removeprefix("ANSWER ")))
        return None

    def _reason(self) -> str:
        self.process.wait()
        self.log.seek(0)
        errors = [line.strip() for line in self.log if "Error" in line]
        return errors[-1] if errors else f"exit {self.process.returncode}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# --- the comparison --------------------------------------------------------------------------------


def measured(engines: dict[str, Engine], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Row → workload → tokens a second in each round; a first run of each is not counted."""
    running = {row: one for row, one in engines.items() if one.ready()}
    rates: dict[str, dict[str, list[float]]] = {
        row: {name: [] for name in WORKLOADS} for row in running
    }
    for number in range(rounds + 1):
        for workload in WORKLOADS:
            for row, one in list(running.items()):
                rate = one.rate(workload)
                if rate is None:
                    del running[row], rates[row]
                elif number:
                    rates[row][workload].append(rate)
    return rates


def table(rates: dict[str, dict[str, list[float]]]) -> str:
    """Medians, in brackets least and most, and the ratio to the first row."""
    lines = [
        "| | " + " | ".join(f"{name}, tokens/s" for name in WORKLOADS) + " |",
        "|---" * (len(WORKLOADS) + 1) + "|",
    ]
    first = next(iter(rates.values()))
    for row, found in rates.items():
        cells = [
            f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f}), "
            f"{statistics.median(values) / statistics.median(first[name]):.2f}×"
            for name, values in found.items()
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--more", nargs="*", default=[], help="NAME=DIR: other directories")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path("tsq-serving"), help="where directories are made"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        engine(arguments.engine, arguments.dtype)
        return
    directories = {row: directory_of(row, arguments.folder) for row in arguments.rows}
    directories |= {
        name: Path(path) for name, _, path in (item.partition("=") for item in arguments.more)
    }
    engines = {row: Engine(directory, arguments.dtype) for row, directory in directories.items()}
    try:
        rates = measured(engines, arguments.rounds)
    finally:
        for one in engines.values():
            one.close()
    for row, one in engines.items():
        if one.failure:
            print(f"{row} does not run here: {one.failure}")
    print(table(rates))
    if arguments.out:
        arguments.out.write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
    main()
