"""Time of the solver's steps on one layer, beside the GPTQ of other libraries on the same weight and the same H.

    python benchmarks/solver.py [--peer GPTQModel=PYTHON --peer llm-compressor=PYTHON] [--threads 1] [--json FILE]

Random layers of the shapes of SmolLM2-135M, stacked as calibration stacks them (q, k and v; gate and up), their sum,
which is one decoder layer, and large ones. All steps and peers are run in turn, round after round, and medians of CPU
seconds are compared, so that other work on the machine counts less. GPTQ is the factorisation of H and the loop over
columns, with the grids of least squared error of the weight; two-stage has stage 1 in their place, and stage 2. The
share is (stage 1 + stage 2) / (factorisation + columns). A peer is solved by the script of its name in solver_peers/,
in the interpreter that is named, grids included.
"""

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tsq_layers import LayerStatistics, QuantConfig
from tsq_layers.numerics import grid
from tsq_layers.solver import gptq, stage1, stage2
from tsq_layers.solver import problem as objective
from tsq_layers.solver.blocks import in_original_order

SHAPES = {
    "attention q,k,v": (960, 576),
    "attention out": (576, 576),
    "mlp gate,up": (3072, 576),
    "mlp down": (576, 1536),
    "large": (4096, 4096),
    "tall": (11008, 4096),
    "wide": (4096, 11008),
}
DECODER_LAYER = ("attention q,k,v", "attention out", "mlp gate,up", "mlp down")
PEERS = {"GPTQModel": "gptqmodel", "llm-compressor": "llmcompressor"}
FACTORS = 256  # of the inputs: what columns have in common


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A random weight, and the mean of x xᵀ over correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    tokens = columns + 512
    x = torch.randn(tokens, FACTORS, generator=generator) @ torch.randn(
        FACTORS, columns, generator=generator
    )
    x += FACTORS**0.5 / 2 * torch.randn(tokens, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x / tokens


def steps(weight: Tensor, hessian: Tensor, config: QuantConfig) -> dict[str, Callable[[], object]]:
    """The steps of the solver, each from the results of those before it."""
    bits, group = config.bits, config.group_size or weight.shape[1]
    layer = LayerStatistics(hessian * len(hessian), torch.tensor(len(hessian)))
    built = objective.build(weight, layer, config)
    metric = stage1.feedback_metric(built.factor, built.order)
    scales, zeros = stage1.fit_grids(weight, metric, bits, group, symmetric=False)
    assigned = gptq.assign(weight, built.factor, built.order, scales, zeros, bits, group)

    def refined() -> Tensor:
        pulled = in_original_order(
            gptq.error_times_hessian(assigned.whitened, built.factor), built.order
        )
        integers = grid.centered(assigned.codes, zeros, group)
        small = stage2.small_problem(
            integers, pulled, built.hessian, scales, group, config.refine_ridge
        )
        return stage2.accept(small, stage2.exact(small, small.start), torch.float16)

    return {
        "factorise": lambda: objective.build(weight, layer, config),
        "columns": lambda: gptq.assign(
            weight, built.factor, built.order, scales, zeros, bits, group
        ),
        "stage 1": lambda: stage1.fit_grids(weight, metric, bits, group, symmetric=False),
        "stage 2": refined,
        "weight-MSE grids": lambda: stage1.weight_grids(weight, bits, group, symmetric=False),
    }


class Peer:
    """A peer's GPTQ in a process of its own, which solves when it is asked."""

    def __init__(self, name: str, interpreter: str, stack: ExitStack) -> None:
        script = Path(__file__).parent / "solver_peers" / f"{PEERS[name]}_solver.py"
        self._process = stack.enter_context(
            subprocess.Popen(  # noqa: S603  (no shell, fixed arguments)
                [interpreter, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
        self.name = name

    def seconds(self, question: Mapping[str, object]) -> float:
        """CPU seconds of a solution."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # the peer may print, too
                return float(json.loads(line)["seconds"])
        raise SystemExit(f"{self.name} failed on {question}")


def measure(actions: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each action; the actions take turns, and the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            times[name].append(1000 * action())
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def timed(action: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        started = time.process_time()
        action()
        return time.process_time() - started

    return run


def report(
    layer: str, bits: int, group: int, found: Mapping[str, float], peers: list[str]
) -> dict[str, object]:
    """Print the times of a layer, its share, and how much faster than the fastest peer it is; returns all."""
    own = found["factorise"] + found["columns"]
    totals = {
        "gptq": own + found["weight-MSE grids"],
        "two-stage": own + found["stage 1"] + found["stage 2"],
    }
    share = (found["stage 1"] + found["stage 2"]) / own
    shown = "  ".join(f"{step} {value:.1f}" for step, value in {**found, **totals}.items())
    row: dict[str, object] = {
        "layer": layer,
        "bits": bits,
        "group_size": group,
        "share": share,
        **found,
        **totals,
    }
    solved = [found[name] for name in peers if not math.isnan(found[name])]
    if solved:
        row["faster than the fastest peer"] = min(solved) / totals["two-stage"]
        shown += f"  ×{row['faster than the fastest peer']:.2f}"
    print(f"{layer:32} {bits} bits g={group:3}  {shown}  share {share:.2f}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer", action="append", default=[], help=f"NAME=interpreter, names: {', '.join(PEERS)}"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads; milliseconds of CPU, medians of {arguments.repeats}")
    rows = []
    with ExitStack() as stack:
        peers = [Peer(*text.split("=", 1), stack) for text in arguments.peer]
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "problem.safetensors"
        totals: dict[tuple[int, int], Counter[str]] = {(2, 64): Counter(), (4, 128): Counter()}
        names = [peer.name for peer in peers]
        for shape in arguments.shapes:
            n, k = SHAPES[shape]
            weight, hessian = problem(n, k)
            save_file({"weight": weight, "hessian": hessian}, file)
            for (bits, group), total in totals.items():
                question = {
                    "file": str(file),
                    "bits": bits,
                    "group_size": group,
                    "threads": arguments.threads,
                }
                own = steps(weight, hessian, QuantConfig(bits=bits, group_size=group))
                actions = {name: timed(action) for name, action in own.items()}
                actions |= {
                    peer.name: lambda peer=peer, question=question: peer.seconds(question)
                    for peer in peers
                }
                found = measure(actions, arguments.repeats)
                rows.append(report(f"{shape} {n}×{k}", bits, group, found, names))
                if shape in DECODER_LAYER:
                    total.update(found)
        if set(DECODER_LAYER) <= set(arguments.shapes):
            for (bits, group), total in totals.items():
                rows.append(report("a decoder layer of SmolLM2-135M", bits, group, total, names))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
