"""Time of the solver's steps on one layer, and of stages 1 and 2 as a share of GPTQ.

    python benchmarks/solver.py [--threads 2] [--repeats 5] [--json FILE]

Random layers of the shapes of SmolLM2-135M, stacked as calibration stacks them (q, k and v; gate and
up), their sum, which is one decoder layer, and one of 4096×4096. The steps are run in turn, round after round, and medians are compared,
so that a drift of the machine's speed hits all alike. GPTQ is the factorisation of H and the loop
over columns; stage 1 and stage 2 are what two-stage adds to it, stage 2 by the exact solve, and for
comparison the weight-MSE grids that plain GPTQ needs and the descent that the paper uses.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tsq_layers import LayerStatistics, QuantConfig, grid
from tsq_layers.solver import gptq, objective, stage1, stage2

SHAPES = {
    "attention q,k,v": (960, 576),
    "attention out": (576, 576),
    "mlp gate,up": (3072, 576),
    "mlp down": (576, 1536),
    "large": (4096, 4096),
}
DECODER_LAYER = ("attention q,k,v", "attention out", "mlp gate,up", "mlp down")


def steps(rows: int, columns: int, config: QuantConfig) -> dict[str, Callable[[], object]]:
    """The steps on a random layer whose inputs are correlated."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing
    weight = torch.randn(rows, columns, generator=generator)
    layer = LayerStatistics(x.T @ x, torch.tensor(len(x)))
    bits, group = config.bits, config.group_size or columns
    problem = objective.build(weight, layer, config)
    metric = stage1.feedback_metric(problem.factor, problem.order)
    scales, zeros = stage1.fit_grids(weight, metric, bits, group, symmetric=False)
    codes = gptq.assign(weight, problem.factor, problem.order, scales, zeros, bits, group)
    integers = grid.centered(codes, zeros, group)

    def small() -> stage2.SmallProblem:
        difference = grid.dequantize(codes, scales, zeros, group) - weight
        return stage2.small_problem(
            integers, difference @ problem.hessian, problem.hessian, scales, group, config.refine_ridge
        )

    def exact(problem: stage2.SmallProblem) -> torch.Tensor:
        return stage2.accept(problem, stage2.exact(problem, problem.start), torch.float16)

    return {
        "factorise": lambda: objective.build(weight, layer, config),
        "columns": lambda: gptq.assign(weight, problem.factor, problem.order, scales, zeros, bits, group),
        "stage 1": lambda: stage1.fit_grids(weight, metric, bits, group, symmetric=False),
        "stage 2": lambda: exact(small()),
        "weight-MSE grids": lambda: stage1.weight_grids(weight, bits, group, symmetric=False),
        "descent": lambda: stage2.descent(small(), config.refine_sweeps),
    }


def measure(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each action; the actions take turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def report(layer: str, bits: int, group: int, found: Mapping[str, float]) -> dict[str, object]:
    """Print the times of a layer and its share; returns both."""
    share = (found["stage 1"] + found["stage 2"]) / (found["factorise"] + found["columns"])
    shown = "  ".join(f"{step} {value:.1f}" for step, value in found.items())
    print(f"{layer:32} {bits} bits g={group:3}  {shown}  share {share:.2f}", flush=True)
    return {"layer": layer, "bits": bits, "group_size": group, "share": share, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{arguments.threads} threads; milliseconds, medians of {arguments.repeats}")
    for bits, group in ((2, 64), (4, 128)):
        config, total = QuantConfig(bits=bits, group_size=group), Counter()
        for name, (n, k) in SHAPES.items():
            found = measure(steps(n, k, config), arguments.repeats)
            rows.append(report(f"{name} {n}×{k}", bits, group, found))
            if name in DECODER_LAYER:
                total.update(found)
        rows.append(report("a decoder layer of SmolLM2-135M", bits, group, total))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
