"""What a compiler makes of packed layers for a GPU, counted without one: kernels, temporary
tensors, spilled registers.
"""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import generated
from benchmarks.running import random_layer

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(torch.cuda.is_available(), reason="describes a GPU of its own"),
]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("affine", 2), ("affine", 3), ("symmetric", 4), ("offsets", 3), ("tables", 2), ("tables", 4)],
)
def test_each_function_is_one_kernel_without_a_temporary_tensor(kind, bits):
    layer = random_layer(64, 512, bits, 64, kind, torch.bfloat16)
    with generated.described_gpu():
        for name, (made, _) in generated.functions(layer).items():
            assert len(made.kernels) == 1, (name, made.source)
            assert made.temporary == 0
            assert made.kernels[0].spilled == 0
            assert made.kernels[0].widest_load >= 4
    assert not torch.cuda.is_available()
