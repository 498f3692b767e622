"""Speed of accumulating H, and H with R, beside large matrix products of the same machine.

    python benchmarks/observing.py [--threads 1] [--repeats 7] [--json FILE]

Useful operations are counted: T·K·(K + 1) for the symmetric sum Σ x xᵀ over T tokens, 2·T·K² more for Σ (x − x̃) xᵀ.
The runs take turns, each right after a product of the same size, and ratios are medians of neighbours, so that a
machine whose speed drifts does not decide.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tsq_layers import HessianObserver

TOKENS, WIDTHS = 1024, (576, 1536, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure(columns: int, dtype: torch.dtype, repeats: int, *, paired: bool) -> dict[str, float]:
    """Operations a second of a product and of an observation, and their ratio with its quartiles."""
    x = torch.randn(TOKENS, columns).to(dtype)
    reference = x + 0.1 if paired else None
    left, right, out = (
        torch.randn(TOKENS, columns),
        torch.randn(columns, columns),
        torch.empty(TOKENS, columns),
    )
    observer = HessianObserver(columns)
    useful = TOKENS * columns * (columns + 1 + 2 * columns * paired)
    products, sums = [], []
    for _ in range(repeats + 1):
        products.append(2 * TOKENS * columns**2 / _seconds(lambda: torch.mm(left, right, out=out)))
        sums.append(useful / _seconds(lambda: observer.observe(x, reference)))
    ratios = sorted(a / b for a, b in zip(sums[1:], products[1:], strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    peak, reached = (statistics.median(values[1:]) / 1e9 for values in (products, sums))
    return {"product": peak, "observation": reached, "ratio": middle, "low": low, "high": high}


def _seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for columns in WIDTHS:
        for name, dtype in DTYPES.items():
            for paired in (False, True):
                found = measure(columns, dtype, arguments.repeats, paired=paired)
                rows.append({"columns": columns, "dtype": name, "paired": paired, **found})
                print(
                    f"K={columns:5} {name:9} {'H and R' if paired else 'H      '}  {found['observation']:6.1f} of "
                    f"{found['product']:6.1f} Gflop/s  {found['ratio']:.2f} ({found['low']:.2f} to "
                    f"{found['high']:.2f})",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
