"""Does `tsq.plan` predict what a calibration needs? Its peak memory beside that of a real calibration.

    python benchmarks/plan.py MODEL_DIR [--layers 6] [--sizes 8x512 16x1024] [--json FILE]

MODEL_DIR is a causal language model of transformers. Its first decoder layers are quantised, with random tokens in
batches of one sequence, paired and not. The prediction is made on the model without weights. The calibration runs in
a process of its own, which loads the model, runs one batch, notes its resident memory, and calibrates; measured is how
far the resident memory rises above that (`VmHWM` of Linux, begun anew by `/proc/self/clear_refs`).

A plan counts what is alive. glibc keeps much of what was freed, the more as every pass runs in a thread with an arena
of its own: with its defaults the resident memory rises to 505 MB where 280 are planned (8x512, paired; 340 if glibc's
malloc_trim is called at every visit of a layer). So the calibrating process is started with MALLOC_MMAP_THRESHOLD_
and MALLOC_TRIM_THRESHOLD_ of 64 KiB, which gives larger tensors back at once, and takes more time. MKL keeps operands
that it has packed in the thread of every pass, up to 2.2 MB; the plan counts these, MKL_DISABLE_FAST_MM=1 in the
environment turns them off. Seconds are extrapolated from less than two seconds of measurements: they are those of a
machine that is as busy then as it is now.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tsq_layers as tsq
from tsq_layers.integrations.transformers import load_causal_lm
from tsq_layers.planning import Plan, plan

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def configuration(layers: int) -> tsq.QuantConfig:
    """4 bits for the first decoder layers."""
    return tsq.QuantConfig(
        bits=4, group_size=128, skip=("lm_head", rf"re:.*layers\.(?!({_numbers(layers)})\.).*")
    )


def _numbers(layers: int) -> str:
    return "|".join(map(str, range(layers)))


def tokens(count: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Batches of one sequence each."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1000, (1, length), generator=generator)} for _ in range(count)
    ]


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def calibrated(
    directory: str, layers: int, count: int, length: int, *, paired: bool
) -> dict[str, float]:
    """Rise of the resident memory and seconds of a real calibration, in this process."""
    model, batches = load_causal_lm(directory), tokens(count, length)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # in memory, not in a mapped file
    with torch.no_grad():
        model(**batches[0], use_cache=False)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    tsq.prepare(model, configuration(layers))
    tsq.calibrate(model, batches, paired=paired, progress=False)
    return {"bytes": memory("VmHWM") - before, "seconds": time.perf_counter() - started}


def predicted(directory: str, layers: int, count: int, length: int, *, paired: bool) -> Plan:
    """The plan for it, made without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return plan(model, configuration(layers), tokens(1, length)[0], count, paired=paired)


def in_a_child(arguments: list[str]) -> dict[str, float]:
    """Run this script with ``--child`` and read its result."""
    command = [sys.executable, __file__, *arguments, "--child"]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, check=True)  # noqa: S603  (ourselves)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sizes", nargs="+", default=["8x512", "16x1024"], help="batches x tokens")
    parser.add_argument("--paired", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for size in arguments.sizes:
        for paired in {"yes": (True,), "no": (False,), "both": (True, False)}[arguments.paired]:
            count, length = map(int, size.split("x"))
            if arguments.child:
                print(
                    json.dumps(
                        calibrated(arguments.model, arguments.layers, count, length, paired=paired)
                    )
                )
                return
            found = predicted(arguments.model, arguments.layers, count, length, paired=paired)
            flag = "yes" if paired else "no"
            measured = in_a_child(
                [
                    arguments.model,
                    "--layers",
                    str(arguments.layers),
                    "--sizes",
                    size,
                    "--paired",
                    flag,
                ]
            )
            row = {
                "size": size,
                "paired": paired,
                "predicted": found.peak,
                "measured": measured["bytes"],
                "predicted_seconds": sum(found.seconds.values()),
                "measured_seconds": measured["seconds"],
            }
            rows.append(row)
            print(
                f"{size:9} {'paired  ' if paired else 'unpaired'}  predicted "
                f"{row['predicted'] / 1e6:7.1f} MB  measured {row['measured'] / 1e6:7.1f} MB  "
                f"ratio {row['predicted'] / row['measured']:.2f}   seconds "
                f"{row['predicted_seconds']:6.1f} and {row['measured_seconds']:6.1f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
