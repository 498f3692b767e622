"""What a call of a packed layer may cost on a CPU, counted: graphs, operations, allocations."""

import pytest
import torch
from grid_kinds import made
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from tsq_layers.runtime import native
from tsq_layers.runtime.linear import QuantLinear

pytestmark = pytest.mark.skipif(not native.usable(), reason="no C++ compiler")
ignore_torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LINEAR = torch.ops.tsq_layers.linear.default if native.usable() else None


def layer_of(rows=8, columns=64, bits=4):
    return QuantLinear.from_quantized(made("offsets", rows, columns, bits, 32), torch.zeros(rows))


def operations(layer, x):
    with torch.profiler.profile() as profile, torch.no_grad():
        layer(x)
    return [event.name for event in profile.events() if "::" in event.name]


@pytest.mark.compile
@ignore_torchs_own
def test_no_shape_and_no_number_of_rows_compiles_anything(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    for rows in range(8, 8 * 12, 8):
        for bits in (2, 3, 4, 8):
            layer = layer_of(rows, bits=bits)
            for count in (1, 2, 7, 40):
                layer(torch.zeros(count, 64))


@pytest.mark.parametrize("rows", [1, 8])
def test_a_call_is_one_operation_that_makes_its_output(rows):
    x, layer = torch.zeros(rows, 64), layer_of()
    found = operations(layer, x)
    assert found.count("tsq_layers::linear") == 1
    assert found.count("aten::empty") <= 1
    assert (
        len([name for name in found if name not in ("aten::view", "aten::reshape", "aten::to")])
        <= 4
    )


def test_the_matrix_is_never_made_for_few_rows():
    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
            return out

    layer = layer_of(512, 512)
    arguments = (
        torch.zeros(1, 512),
        layer.words,
        layer.grids,
        layer.shifts,
        None,
        4,
        32,
        512,
        native.FEW_ROWS,
    )
    with Largest() as mode, torch.no_grad():
        LINEAR(*arguments)
    assert mode.largest == 512


@pytest.mark.compile
@ignore_torchs_own
def test_a_compiled_model_is_one_graph_for_all_rows():
    counter = CompileCounter()
    model = nn.Sequential(layer_of(64, 64), nn.ReLU(), layer_of(8, 64, bits=3), nn.Linear(8, 4))
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 3, 9, 40):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.compile
@ignore_torchs_own
def test_inductor_calls_the_operation():
    model = nn.Sequential(layer_of(64, 64), nn.ReLU(), layer_of(8, 64))
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        assert operations(compiled, x).count("tsq_layers::linear") == 2
