"""What torch.compile makes of packed layers for a GPU, on a machine that may have none: kernels, traffic, registers.

    python -m benchmarks.generated [--layer 4096x4096] [--bits 2 3 4] [--kinds affine offsets tables] [--json FILE]

Inductor writes Triton kernels for tensors that are only described (FakeTensor), and Triton compiles these for compute
capability 9.0 (Hopper) with its own assembler: all that a GPU is needed for is running them.
Without one, Triton has to be
installed (`pip install triton==3.7.1` for PyTorch 2.13).

For one row of input, for as many as one pass over the codes takes, and for the matrix that more are multiplied with:
kernels in a call; bytes that they read and write if each reads its arguments once, as a multiple of
what must be (packed
weight, input and output); of the largest kernel, registers of a thread, bytes that it spills, and of its widest load.
"""

import argparse
import copy
import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

from benchmarks.running import random_layer
from tsq_layers.runtime import kernels
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.one_pass import few_rows
from tsq_layers.runtime.parts import Parts
from tsq_layers.runtime.route import most_rows

TARGET = GPUTarget("cuda", 90, 32)
# What Inductor asks for; of an H100.
DEVICE = SimpleNamespace(
    name="described",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    is_integrated=0,
    is_multi_gpu_board=0,
)


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel.

    Args:
        name: given by Inductor.
        registers: of a thread.
        spilled: bytes of a thread that are kept in memory for want of registers.
        widest_load: bytes.
    """

    name: str
    registers: int
    spilled: int
    widest_load: int


@dataclass(frozen=True)
class Generated:
    """What is made of one function.

    Args:
        kernels: in the order of their launches.
        temporary: bytes that are allocated, without the output.
        output: bytes.
        source: the Python file that Inductor writes.
    """

    kernels: tuple[Kernel, ...]
    temporary: int
    output: int
    source: str


@contextmanager
def described_gpu() -> Iterator[None]:
    """Let Inductor and Triton believe in a GPU for a while."""
    properties = staticmethod(lambda *_, **__: DEVICE)
    changes: list[tuple[Any, str, Any]] = [
        (CudaInterface, "get_device_properties", properties),
        (CudaInterface.Worker, "get_device_properties", properties),
        (CudaInterface, "get_raw_stream", staticmethod(lambda *_: 0)),
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", lambda *_: (DEVICE.major, DEVICE.minor)),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.version, "cuda", "13.0"),
        (triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: TARGET)),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def generate(
    function: Callable[..., Tensor], *arguments: Tensor | None, **options: Any
) -> Generated:
    """Inductor's code for a function of tensors; these may be on a CPU, only their shapes count."""
    mode = FakeTensorMode()
    with mode:
        described = [
            None
            if t is None
            else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            for t in arguments
        ]
        pure = torch.func.functionalize(lambda *tensors: function(*tensors, **options))
        graph_module = make_fx(pure, decomposition_table=select_decomp_table())(*described)
    graph = GraphLowering(graph_module, example_inputs=described, shape_env=ShapeEnv())
    with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(mock.MagicMock()):
        graph.run(*described)
        code = graph.codegen()[0]
    source: str = getattr(code, "value", code)
    sizes = [
        torch.Size(map(int, shape.strip("(), ").split(", "))).numel()
        * getattr(torch, dtype).itemsize
        for shape, dtype in re.findall(
            r"empty_strided_cuda\((\([^)]*\)), \([^)]*\), torch\.(\w+)\)", source
        )
    ]
    result = graph_module.graph.output_node().args[0].meta["val"]
    output = result.numel() * result.dtype.itemsize
    return Generated(tuple(map(compiled, written(source))), sum(sizes) - output, output, source)


def written(source: str) -> list[Any]:
    """The kernels in a file of Inductor's, each with the launches that it would choose from."""
    found = []
    for name, text in re.findall(
        r"async_compile\.triton\('(\w+)', \'\'\'(.*?)\'\'\', device_str", source, re.DOTALL
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.py"
            path.write_text(text.replace("triton_helpers.set_driver_to_gpu()", ""))
            found.append(getattr(loaded(name, path), name))
    return found


def loaded(name: str, path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def compiled(kernel: Any) -> Kernel:
    """A kernel as Triton's assembler leaves it, with the first launch that Inductor would choose from."""
    launch, meta = kernel.configs[0], copy.deepcopy(kernel.triton_meta)
    source = triton.compiler.ASTSource(
        kernel.fn, meta["signature"], {**meta["constants"], **launch.kwargs}, meta["configs"][0]
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    made = triton.compile(source, target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(  # noqa: S603  (no shell, a tool of Triton's)
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", made.asm["ptx"])
    return Kernel(
        kernel.fn.__name__,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=int(re.search(r"LOCAL:(\d+)", usage)[1]),
        widest_load=max(int(count or 1) * int(bits) // 8 for count, bits in loads),
    )


def functions(layer: QuantLinear) -> dict[str, tuple[Generated, int]]:
    """What is made for one row of input, for as many as one pass takes, and for more; with the
    bytes that must be moved.
    """
    weight = (layer.words, layer.grids, layer.shifts)
    packed = sum(tensor.numel() * tensor.dtype.itemsize for tensor in weight if tensor is not None)
    columns = layer.in_features

    def in_one_pass(x: Tensor, *parts: Tensor | None) -> Tensor:
        return few_rows(x, Parts(*parts), None, layer.format, columns)

    def matrix(*parts: Tensor | None) -> Tensor:
        return kernels.matrix_of(Parts(*parts), layer.format, columns, torch.bfloat16)

    made = {}
    for rows in sorted({1, most_rows(layer.format)}):
        x = torch.empty(rows, layer.in_features)
        one_pass = generate(in_one_pass, x, *weight)
        made[f"{rows} rows" if rows > 1 else "1 row"] = (
            one_pass,
            packed + x.numel() * 4 + one_pass.output,
        )
    whole = generate(matrix, *weight)
    return {**made, "matrix": (whole, packed + whole.output)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", default="4096x4096")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--kinds", nargs="+", default=["affine", "offsets", "tables"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, columns = map(int, arguments.layer.split("x"))
    found = []
    print(
        "| weight | bits | function | kernels | moved, × least | registers | spilled | widest load |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    with described_gpu():
        for kind in arguments.kinds:
            for bits in arguments.bits:
                layer = random_layer(
                    rows, columns, bits, arguments.group_size, kind, torch.bfloat16
                )
                for name, (made, least) in functions(layer).items():
                    moved = (
                        least + 2 * made.temporary
                    ) / least  # what is temporary is written and read
                    largest = max(made.kernels, key=lambda kernel: kernel.registers)
                    print(
                        f"| {kind} | {bits} | {name} | {len(made.kernels)} | {moved:.2f} | "
                        f"{largest.registers} | {largest.spilled} | {largest.widest_load} |",
                        flush=True,
                    )
                    found.append(
                        {
                            "kind": kind,
                            "bits": bits,
                            "function": name,
                            "moved": moved,
                            "kernels": [asdict(kernel) for kernel in made.kernels],
                        }
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
