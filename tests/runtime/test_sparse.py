"""The sparse part of a layer: exact storage, the same output by every path, gradients, files."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tsq_layers as tsq
from tsq_layers.errors import LayerError
from tsq_layers.numerics.basis import Basis
from tsq_layers.numerics.weight import Outliers
from tsq_layers.runtime import forward as running

BASES = {"plain": lambda columns: None, "rotated": lambda columns: Basis.rotated(columns, 16)}
KINDS = ["entries", "columns"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def quantised(
    kind, rows=12, columns=64, *, bits=4, basis=None, dtype=torch.float16, share=0.1, seed=0
):
    """A weight, and its sparse part as a dense matrix in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    config = tsq.QuantConfig(
        method="rtn", bits=bits, group_size=16, scale_dtype=str(dtype).removeprefix("torch.")
    )
    found = tsq.TwoStageGroupQuantizer(weight, None, config).run().weight
    sparse = torch.zeros(rows, columns, dtype=torch.float64)
    if kind == "columns":
        places = (
            torch.randperm(columns, generator=generator)[: max(1, round(share * columns))]
            .sort()
            .values
        )
        values = torch.randn(rows, len(places), generator=generator).to(dtype)
        sparse[:, places] = values.double()
        outliers = Outliers(values, columns=places.int())
    else:
        places = (
            torch.randperm(rows * columns, generator=generator)[: round(share * rows * columns)]
            .sort()
            .values
        )
        values = torch.randn(len(places), generator=generator).to(dtype)
        sparse.view(-1)[places] = values.double()
        outliers = Outliers(values, places.int())
    return tsq.QuantizedWeight(**{**vars(found), "outliers": outliers, "basis": basis}), sparse


def effective(weight, sparse):
    """By the definition, in float64."""
    plain = tsq.QuantizedWeight(**{**vars(weight), "outliers": None, "basis": None}).dequantize(
        torch.float64
    )
    dense = plain + sparse
    return dense if weight.basis is None else weight.basis.restore(dense)


# --- the record ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_record_dequantises_to_the_sum(kind, make):
    weight, sparse = quantised(kind, basis=make(64))
    torch.testing.assert_close(weight.dequantize(torch.float64), effective(weight, sparse))


def test_split_cuts_the_sparse_part(kind):
    weight, _ = quantised(kind)
    parts = weight.split([5, 0, 4, 3])
    assert [part.codes.shape[0] for part in parts] == [5, 0, 4, 3]
    found = torch.cat([part.dequantize(torch.float64) for part in parts])
    assert torch.equal(found, weight.dequantize(torch.float64))


def test_stored_bits_are_counted(kind):
    weight, _ = quantised(kind)
    layer = tsq.QuantLinear.from_quantized(weight)
    added = weight.outliers.values.numel() * 16 + len(weight.outliers.places) * 32
    without = tsq.QuantizedWeight(**{**vars(weight), "outliers": None})
    assert (weight.bits_per_weight - without.bits_per_weight) * 12 * 64 == pytest.approx(added)
    plain = tsq.QuantLinear.from_quantized(without)
    assert (layer.bits_per_weight - plain.bits_per_weight) * 12 * 64 == pytest.approx(added)


INT = torch.arange(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), "give one of them"),
        ((torch.ones(3), INT, INT), "give one of them"),
        ((torch.ones(3).double(), INT), "float64; give float16"),
        ((torch.ones(3), INT.long()), "int64 of shape"),
        ((torch.ones(4), INT), r"shape \(4,\) for 3 places"),
        ((torch.ones(2, 3), INT), r"shape \(2, 3\) for 3 places"),
        ((torch.ones(3), None, INT), r"shape \(3,\) for 3 places"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(LayerError, match=message):
        Outliers(*arguments)


def test_outliers_of_another_weight_are_refused(kind):
    weight, _ = quantised(kind)
    other = Outliers(torch.ones(3), INT)
    with pytest.raises(LayerError, match="in one dtype"):
        tsq.QuantizedWeight(**{**vars(weight), "outliers": other})
    rows = Outliers(torch.ones(5, 3).half(), columns=INT)
    with pytest.raises(LayerError, match="have 5 rows, the weight has 12"):
        tsq.QuantizedWeight(**{**vars(weight), "outliers": rows})
    with pytest.raises(LayerError, match="the basis is of 32 columns"):
        tsq.QuantizedWeight(**{**vars(weight), "basis": Basis.rotated(32, 8)})


# --- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@pytest.mark.parametrize("shape", [(), (1,), (8,), (9,), (2, 30), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_that_of_the_effective_weight(kind, make, shape, bias):
    weight, sparse = quantised(kind, basis=make(64))
    layer = tsq.QuantLinear.from_quantized(weight, torch.randn(12) if bias else None)
    x = torch.randn(*shape, 64)
    expected = nn.functional.linear(
        x.double(), effective(weight, sparse), layer.bias.double() if bias else None
    )
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_that_check_fails_without_the_sparse_part(kind):
    weight, sparse = quantised(kind)
    layer, x = tsq.QuantLinear.from_quantized(weight), torch.randn(3, 64)
    layer.outlier_bits.zero_()
    assert (layer(x).double() - x.double() @ effective(weight, sparse).T).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [3, 20])
def test_output_has_the_dtype_of_the_input(kind, dtype, rows):
    weight, sparse = quantised(kind)
    x = torch.randn(rows, 64).to(dtype)
    found = tsq.QuantLinear.from_quantized(weight, torch.zeros(12))(x)
    assert found.dtype == dtype
    expected = x.double() @ effective(weight, sparse).T
    assert (found.double() - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm() + 1e-9


@pytest.mark.parametrize("rows", [3, 20])
def test_autocast(kind, rows):
    weight, sparse = quantised(kind)
    x = torch.randn(rows, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tsq.QuantLinear.from_quantized(weight)(x)
    assert found.dtype == torch.bfloat16
    expected = x.double() @ effective(weight, sparse).T
    assert (found.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@pytest.mark.parametrize("rows", [3, 20])
def test_gradients(kind, make, rows):
    weight, sparse = quantised(kind, basis=make(64))
    layer = tsq.QuantLinear.from_quantized(weight, torch.randn(12, dtype=torch.float64))
    x = torch.randn(rows, 64, dtype=torch.float64, requires_grad=True)
    to_x, to_bias = torch.autograd.grad((layer(x) ** 2).sum(), [x, layer.bias])
    y = x @ effective(weight, sparse).T + layer.bias
    expected = torch.autograd.grad((y**2).sum(), [x, layer.bias])
    torch.testing.assert_close((to_x, to_bias), expected)


def test_no_dense_weight_is_kept_for_the_gradient(kind):
    weight, _ = quantised(kind, rows=200, columns=192, share=0.01)
    layer, saved = tsq.QuantLinear.from_quantized(weight), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        layer(torch.randn(30, 192, requires_grad=True))
    assert max(saved) < 200 * 192 / 2


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_few_rows_make_no_dense_sparse_part():
    weight, sparse = quantised("entries", rows=256, columns=256, share=0.01)
    layer, x = tsq.QuantLinear.from_quantized(weight), torch.randn(4, 256)
    parts = layer.parts
    with Largest() as largest:
        found = running._sparse_product(x, parts.values, parts.places, 256)
    assert largest.size < 256 * 256 / 8
    torch.testing.assert_close(found.double(), x.double() @ sparse.T, rtol=1e-4, atol=1e-4)
    with Largest() as largest:
        running.dequantize(parts, layer.format, 256, torch.float32)
    assert largest.size >= 256 * 256


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_weight(kind, make, dtype):
    weight, sparse = quantised(kind, basis=make(64))
    layer = tsq.QuantLinear.from_quantized(weight, dtype=dtype)
    ids = torch.tensor([[3, 0], [11, 3]], dtype=torch.int32)
    found = layer.rows(ids)
    if weight.basis is None:
        assert torch.equal(found, layer.weight[ids])
    torch.testing.assert_close(
        found, effective(weight, sparse)[ids].to(dtype), rtol=1e-5, atol=1e-2
    )


def test_weight_and_record_agree_and_come_back(kind):
    weight, _ = quantised(kind)
    layer = tsq.QuantLinear.from_quantized(weight)
    assert torch.equal(layer.weight, weight.dequantize())
    again = layer.quantized_weight().outliers
    assert torch.equal(again.values, weight.outliers.values)
    assert torch.equal(again.places, weight.outliers.places)
    assert (again.columns is None) == (kind == "entries")
    assert torch.equal(layer.bfloat16().dequantize(torch.float32), weight.dequantize())


def test_no_outliers_are_none(kind):
    weight, _ = quantised(kind)
    empty = torch.empty(0, dtype=torch.int32)
    none = (
        Outliers(torch.empty(0).half(), empty)
        if kind == "entries"
        else Outliers(torch.ones(12, 0).half(), None, empty)
    )
    layer = tsq.QuantLinear.from_quantized(
        tsq.QuantizedWeight(**{**vars(weight), "outliers": none})
    )
    assert layer.outliers is None
    assert layer(torch.randn(3, 64)).shape == (3, 12)


def test_rounded_inputs_go_through_both_parts(kind):
    weight, sparse = quantised(kind)
    layer, x = tsq.QuantLinear.from_quantized(weight, activation_bits=8), torch.randn(20, 64)
    expected = layer.rounded_input(x).double() @ effective(weight, sparse).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_in_one_graph(kind):
    torch._dynamo.reset()
    weight, _ = quantised(kind)
    layer = tsq.QuantLinear.from_quantized(weight)
    run = torch.compile(layer, fullgraph=True, backend="eager", dynamic=False)
    for rows in (2, 20):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-4)


def test_export_and_vmap(kind):
    weight, _ = quantised(kind)
    layer = tsq.QuantLinear.from_quantized(weight)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (torch.randn(4, 64),), dynamic_shapes=({0: rows},))
    x = torch.randn(2, 20, 64)
    torch.testing.assert_close(program.module()(x[0]), layer(x[0]))
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))


# --- in a model ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(12, 64), nn.Conv1d(64, 12, 1)
        self.out = nn.Linear(64, 12)

    def forward(self, ids):
        x = self.embed(ids)
        return self.out(x) + self.conv(x.mT).mT


def packed_net(kind):
    """All three layers with a sparse part."""
    from tsq_layers.layers import kind_of

    torch.manual_seed(0)
    model = Net()
    for seed, (name, module) in enumerate(list(model.named_children())):
        matrix = tsq.QuantLinear.from_quantized(
            quantised(kind, seed=seed)[0], module.__dict__.get("bias")
        )
        bias = getattr(module, "bias", None)
        matrix.bias = bias
        setattr(model, name, kind_of(module).replacement(module, matrix))
    return model


IDS = torch.arange(12).view(2, 6)


def test_every_kind_of_layer_uses_it(kind):
    model = packed_net(kind)
    x = model.embed.weight[IDS]
    assert torch.equal(model.embed(IDS), x)
    expected = (
        nn.functional.linear(x, model.out.weight, model.out.bias)
        + nn.functional.conv1d(x.mT, model.conv.weight, model.conv.bias).mT
    )
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)


def test_saved_copied_and_pickled_models_are_equal(kind, tmp_path):
    model = packed_net(kind)
    tsq.save(model, tmp_path)
    with torch.device("meta"):
        empty = Net()
    for again in (
        tsq.load(tmp_path, empty),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(again(IDS), model(IDS))
        assert repr(again) == repr(model)
        assert torch.equal(again.out.outlier_bits, model.out.outlier_bits)
    assert ("outlier_columns=" if kind == "columns" else "outliers=") in repr(model)


def test_damaged_counts_are_refused(kind, tmp_path):
    model = packed_net(kind)
    tsq.save(model, tmp_path)
    file = tmp_path / "tsq.json"
    name = "outliers" if kind == "entries" else "outlier_columns"
    count = getattr(model.out.format, name)
    file.write_text(file.read_text().replace(f'"{name}": {count}', f'"{name}": {count + 1}'))
    with pytest.raises(tsq.errors.CheckpointError):
        tsq.load(tmp_path, Net())
