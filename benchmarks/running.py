"""How fast packed layers run on a CPU: against float layers, what else runs few bits, and the memory's bandwidth.

    python benchmarks/running.py --threads 1 --layers 4096x4096 576x576 --bits 2 3 4 8 --rows 1 16 --json running.json

All that is compared takes turns, in another order each time, since what runs after a large product was seen to take
longer. Each ratio is of medians; the spread is (largest - smallest) / median of the middle half of the times. With one
thread the time is that of the thread's own CPU clock, so that other work on the machine counts less. Beside F.linear in
float32 and bfloat16: the same weight dequantised at each call; torchao's weight-only layer, if it
is installed; aten's kernel
for 4 bits, where it takes the layer. The limit is the bytes of a layer by the measured bandwidth of a sum over a tensor
larger than the caches.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tsq_layers as tsq
from tsq_layers.numerics import grid
from tsq_layers.runtime.linear import QuantLinear

try:  # its weight-only layers, if it is there
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
except ImportError:
    quantize_ = None

BIG = 2**26  # entries of the tensor that the bandwidth is measured on


def random_layer(
    rows: int, columns: int, bits: int, group: int, kind: str, dtype: torch.dtype
) -> QuantLinear:
    weight = torch.randn(rows, columns)
    scales, zeros = grid.minmax(weight, bits, group, kind == "symmetric")
    scales = grid.storable(scales, torch.float16)
    codes = grid.quantize(weight, scales, zeros, bits, group)
    zeros, scales = zeros.to(torch.uint8), scales.half()
    offsets = -scales * zeros if kind == "offsets" else None
    tables = torch.randn(rows, 1, 2**bits).half() if kind == "tables" else None
    if tables is not None:
        scales, zeros = scales[:, :0], zeros[:, :0]
    if offsets is not None:
        zeros = torch.zeros_like(zeros)
    quantized = tsq.QuantizedWeight(
        codes, scales, zeros, bits, group, kind == "symmetric", offsets, tables
    )
    return QuantLinear.from_quantized(quantized, dtype=dtype)


def alternatives(layer: QuantLinear, x: Tensor, group: int) -> dict[str, Callable[[], object]]:
    wide, half = torch.randn(layer.out_features, layer.in_features), torch.bfloat16
    narrow, x_half = wide.to(half), x.to(half)
    found = {
        "packed": lambda: layer(x),
        "float32": lambda: F.linear(x.float(), wide),
        "bfloat16": lambda: F.linear(x_half, narrow),
        "dequantised": lambda: F.linear(x, layer.dequantize(x.dtype)),
    }
    if quantize_ is not None and layer.in_features % group == 0:
        other = nn.Sequential(
            nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=x.dtype)
        )
        kind = getattr(torch, f"int{layer.bits}")
        quantize_(other, IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(group)))
        found["torchao"] = lambda: other(x)
    if layer.bits == 4 and layer.in_features % 32 == 0 and layer.out_features % 16 == 0:
        codes = torch.randint(0, 16, wide.shape, dtype=torch.int32)
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        grids = torch.randn(layer.in_features // group, layer.out_features, 2).to(half)
        if layer.in_features % group == 0:
            found["int4pack"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x_half, words, group, grids
            )
    return found


def measure(
    actions: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Sorted seconds of each action; they take turns in another order each time, and the first turn is not counted."""
    shuffle = random.Random(0)  # noqa: S311
    times: dict[str, list[float]] = {name: [] for name in actions}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 4 or (time.perf_counter() < end and turns < 200):
        for name in shuffle.sample(list(actions), len(actions)):
            started = clock()
            actions[name]()
            times[name].append(clock() - started)
        turns += 1
    return {name: sorted(values[1:]) for name, values in times.items()}


def spread(values: list[float]) -> float:
    middle = values[len(values) // 4 : -(len(values) // 4) or None]
    return (middle[-1] - middle[0]) / statistics.median(values)


def bandwidth(clock: Callable[[], float]) -> float:
    """Bytes a second."""
    big = torch.ones(BIG)
    return 4 * BIG / measure({"sum": big.sum}, 2, clock)["sum"][0]


def compare(arguments: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, object]]:
    rows, rate = [], bandwidth(clock)
    for name in arguments.layers:
        n, k = map(int, name.split("x"))
        for bits in arguments.bits:
            layer = random_layer(
                n, k, bits, arguments.group_size, arguments.kind, getattr(torch, arguments.dtype)
            )
            stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
            for count in arguments.rows:
                x = torch.randn(count, k).to(getattr(torch, arguments.dtype))
                times = measure(
                    alternatives(layer, x, arguments.group_size), arguments.seconds, clock
                )
                own = statistics.median(times["packed"])
                ratios = {
                    other: statistics.median(values) / own
                    for other, values in times.items()
                    if other != "packed"
                }
                row = {"layer": name, "bits": bits, "rows": count, "limit": stored / rate / own}
                rows.append({**row, "times faster than": ratios, "spread": spread(times["packed"])})
                shown = "  ".join(f"{other} ×{ratio:.2f}" for other, ratio in ratios.items())
                print(
                    f"{name:11} {bits} bits {count:5} rows  {shown}  of the limit {row['limit']:.2f}",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["4096x4096", "11008x4096", "4096x11008", "576x576", "1536x576"],
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128, 1024])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--kind", choices=["affine", "symmetric", "offsets", "tables"], default="affine"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each comparison")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        rows = compare(arguments, time.thread_time if arguments.threads == 1 else time.perf_counter)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
