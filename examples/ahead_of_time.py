"""A quantised model as a program that needs none of its Python code: torch.export, and AOTInductor where a compiler is.

python examples/ahead_of_time.py [--compile]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import tsq_layers as tsq


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 10)).eval()
    model = tsq.quantize(
        model, tsq.QuantConfig(bits=3, group_size=64), [torch.randn(1024, 128) for _ in range(4)]
    )
    x = torch.randn(5, 128)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    packed = sum(tensor.nbytes for tensor in program.state_dict.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt2")
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        print(
            f"exported: {packed:,} bytes of tensors, same output: {torch.allclose(loaded(x), model(x), atol=1e-5)}"
        )
        if "--compile" in sys.argv[1:]:
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder, "compiled.pt2"))
            )
            compiled = torch._inductor.aoti_load_package(package)
            print(f"compiled: same output: {torch.allclose(compiled(x), model(x), atol=1e-5)}")


if __name__ == "__main__":
    main()
