"""QuantLinear with float offsets and with look-up tables: whatever holds with zero points must hold with these."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grid_kinds import KINDS, assert_same, made, raw_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tsq_layers.errors import LayerError
from tsq_layers.layers.convolution import CONVOLUTIONS
from tsq_layers.layers.embedding import EMBEDDING
from tsq_layers.numerics.weight import WeightFormat
from tsq_layers.runtime import kernels, native
from tsq_layers.runtime import one_pass as few_rows
from tsq_layers.runtime.linear import QuantLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = {"offsets": range(1, 9), "row tables": range(1, 5), "group tables": range(1, 5)}
CASES = [pytest.param(kind, bits, id=f"{kind}-{bits}") for kind in KINDS for bits in WIDTHS[kind]]
BUFFERS = {
    "offsets": {"words", "scale_bits", "offset_bits"},
    "row tables": {"words", "table_bits"},
    "group tables": {"words", "table_bits"},
}

kinds = pytest.mark.parametrize("kind", KINDS)
ignore_torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def layer_of(
    kind: str, rows: int = 8, columns: int = 64, bits: int = 4, group_size: int = 32, **options: Any
) -> Any:
    return QuantLinear.from_quantized(
        made(kind, rows, columns, bits, group_size, **options), inputs(rows)
    )


def error_ratio(output: Tensor, x: Tensor, layer: Any) -> float:
    """Root mean square error against float64, in units of that of dequantise-and-``F.linear``."""
    bias, weight = layer.bias.detach().to(x.dtype), layer.quantized_weight()
    exact = F.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    plain = F.linear(x, weight.dequantize(x.dtype), bias)
    return float(((output.double() - exact).norm() / (plain.double() - exact).norm()).item())


# --- storage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_weight_and_rows_are_bit_equal_to_the_grids_and_come_back(
    kind: str, bits: int, scale_dtype: torch.dtype
) -> None:
    ids = torch.tensor([[2, 0], [1, 2]])
    for columns, group_size in ((64, 16), (75, 32), (40, 40)):
        weight = made(kind, 3, columns, bits, group_size, scale_dtype=scale_dtype)
        layer = QuantLinear.from_quantized(weight)
        for dtype in (*DTYPES, torch.float64):
            layer.to(dtype)
            assert torch.equal(layer.weight, weight.dequantize(dtype))
            assert torch.equal(layer.rows(ids), layer.weight[ids])
        assert_same(layer.quantized_weight(), weight)
        assert_same(QuantLinear.from_quantized(layer.quantized_weight()).quantized_weight(), weight)


@kinds
def test_the_comparison_sees_a_single_bit(kind: str) -> None:
    weight = made(kind, 3, 64, 3, 16)
    for name in BUFFERS[kind]:
        layer = QuantLinear.from_quantized(weight)
        layer.get_buffer(name).flatten()[5] ^= 1
        with pytest.raises(AssertionError):
            assert_same(layer.quantized_weight(), weight)


@kinds
def test_blocks_of_rows_are_bit_equal_to_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = made(kind, 9, 75, 3, 32)
    layer = QuantLinear.from_quantized(weight)
    monkeypatch.setattr(native, "_usable", False)
    for block in (10, 160, 9 * 75):
        monkeypatch.setattr(kernels, "_BLOCK", block)
        assert torch.equal(layer.dequantize(torch.bfloat16), weight.dequantize(torch.bfloat16))
    ids = torch.tensor([[8], [2]])
    assert torch.equal(torch.func.vmap(layer.rows)(ids), layer.weight[ids])


@kinds
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_a_change_of_dtype_touches_no_stored_bit(kind: str, scale_dtype: torch.dtype) -> None:
    layer = layer_of(kind, scale_dtype=scale_dtype)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers() if tensor.numel()}
    assert before.keys() == BUFFERS[kind]
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        assert layer.dtype == layer.weight.dtype == dtype
        assert all(torch.equal(layer.get_buffer(name), tensor) for name, tensor in before.items())
    assert layer.half().scales.dtype == scale_dtype
    meta = layer.to("meta")
    assert all(
        tensor.is_meta
        for tensor in (meta.scales, meta.weight, meta(torch.empty(3, 64, device="meta")))
    )


@kinds
def test_copies_keep_every_bit(kind: str) -> None:
    layer = layer_of(kind, columns=75, scale_dtype=torch.bfloat16)
    kept = {
        "offsets": kind == "offsets",
        "tables": None if kind == "offsets" else kind.removesuffix(" tables"),
    }
    empty: Any = QuantLinear(75, 8, bits=4, group_size=32, scale_dtype=torch.bfloat16, **kept)  # type: ignore[arg-type]
    assert not empty.weight.any()
    empty.load_state_dict(layer.state_dict())
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    others = (
        empty,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
    )
    for other in others:
        assert set(other.state_dict()) == BUFFERS[kind] | {"bias"}
        assert_same(other.quantized_weight(), layer.quantized_weight())
        assert repr(other) == repr(layer)
        assert torch.equal(other(inputs(3, 75)), layer(inputs(3, 75)))


@pytest.mark.parametrize(
    ("kind", "stored", "text"),
    [
        ("offsets", 4 * 32 * 12 + 2 * 2 * 16 * 4, "symmetric=False, offsets=True, bias=True"),
        ("row tables", 4 * 32 * 12 + 8 * 16 * 4, "symmetric=False, tables='row', bias=True"),
        (
            "group tables",
            4 * 32 * 12 + 2 * 8 * 16 * 4,
            "symmetric=False, tables='group', bias=True",
        ),
    ],
)
def test_bits_per_weight_counts_what_is_stored(kind: str, stored: int, text: str) -> None:
    layer = layer_of(kind, rows=4, columns=128, bits=3, group_size=64)
    assert layer.bits_per_weight == layer.quantized_weight().bits_per_weight == stored / (4 * 128)
    assert f"bits=3, group_size=64, {text}, bits_per_weight={layer.bits_per_weight:.2f}" in repr(
        layer
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tables": "row", "offsets": True}, "float offsets or look-up tables, not both"),
        (
            {"tables": "row", "symmetric": True},
            "look-up tables has no zero points .* give symmetric=False",
        ),
        (
            {"offsets": True, "symmetric": True},
            "float offsets has no zero points .* give symmetric=False",
        ),
        ({"tables": "row", "bits": 5}, "bits=5: look-up tables are of codes of 1 to 4 bits"),
        ({"tables": "column"}, "tables='column': give 'row', 'group' or None"),
    ],
)
def test_arguments_that_exclude_one_another_are_refused(
    wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(LayerError, match=message):
        QuantLinear(64, 8, **{"bits": 4, "group_size": 32, **wrong})


# --- forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_output_is_as_exact_as_the_plain_path(kind: str, bits: int, dtype: torch.dtype) -> None:
    for columns, group_size in ((256, 32), (256, 256), (288, 48), (75, 32)):
        layer = layer_of(kind, 64, columns, bits, group_size).to(dtype)
        for rows in (4, kernels.FEW_ROWS + 1):
            x = inputs(rows, columns, dtype=dtype)
            output = layer(x)
            assert output.dtype == dtype
            assert error_ratio(output, x, layer) <= 2


@kinds
def test_the_bound_notices_one_changed_bit(kind: str) -> None:
    for name in BUFFERS[kind]:
        layer, x = layer_of(kind, 64, 256), inputs(4, 256)
        good = layer(x)
        layer.get_buffer(name)[5].flatten()[0] ^= 1 << 8
        assert error_ratio(good, x, layer) > 2


@kinds
def test_a_float64_pass_is_exact(kind: str) -> None:
    for bits in WIDTHS[kind]:
        layer, x = layer_of(kind, 8, 256, bits).double(), inputs(3, 256).double()
        exact = F.linear(x, layer.quantized_weight().dequantize(torch.float64), layer.bias)
        torch.testing.assert_close(layer(x), exact, rtol=0, atol=1e-10)


def format_of(kind: str, bits: int, group_size: int) -> WeightFormat:
    return WeightFormat(bits=bits, group_size=group_size, grid=kind.replace(" ", "_"))  # type: ignore[arg-type]


PASSES = [
    pytest.param(kind, bits, group_size, id=f"{kind}-{bits}-{group_size}")
    for kind in KINDS
    for bits in WIDTHS[kind]
    for group_size in (32, 48, 64)
    if few_rows.one_pass(format_of(kind, bits, group_size), 192)
]


@pytest.mark.parametrize(("kind", "bits", "group_size"), PASSES)
def test_the_pass_over_the_words_gives_what_the_matrix_gives(
    kind: str, bits: int, group_size: int
) -> None:
    layer = layer_of(kind, 8, 192, bits, group_size)
    x = inputs(3, 192).double()
    found = few_rows.few_rows(x, layer.parts, None, layer.format, 192)
    torch.testing.assert_close(found, x @ layer.dequantize(torch.float64).T, rtol=0, atol=1e-10)


@kinds
@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 0, 64), (2, 3, 64), (2, 3, 4, 64)])
def test_any_rank_and_number_of_rows(kind: str, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(kind), inputs(*shape, dtype=torch.float64)
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight.double(), layer.bias.double()), rtol=0, atol=1e-5
    )


@kinds
@pytest.mark.parametrize("rows", [2, 40])
def test_autocast_rules_as_in_a_float_layer(kind: str, rows: int) -> None:
    layer = layer_of(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(inputs(rows, 64))
    assert output.dtype == torch.bfloat16
    assert error_ratio(output, inputs(rows, 64, dtype=torch.bfloat16), layer) <= 2


@kinds
@pytest.mark.parametrize("columns", [64, 75])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_gradients_are_those_of_the_dequantised_layer(kind: str, rows: int, columns: int) -> None:
    layer = layer_of(kind, columns=columns)
    x, bias = inputs(rows, columns).requires_grad_(), layer.bias.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    F.linear(twin, layer.weight, bias).square().sum().backward()  # type: ignore[no-untyped-call]
    for found, exact in ((x.grad, twin.grad), (layer.bias.grad, bias.grad)):
        torch.testing.assert_close(
            found, exact, rtol=0, atol=1e-5 * float(exact.detach().abs().max())
        )


@kinds
def test_functional_transforms_and_export_see_a_plain_layer(kind: str) -> None:
    layer, x = layer_of(kind), inputs(3, 64)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), layer.weight)
    program = torch.export.export(
        layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},)
    )
    for count in (2, 40):
        torch.testing.assert_close(program.module()(inputs(count, 64)), layer(inputs(count, 64)))


@kinds
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_nothing_leaves_the_device(kind: str, rows: int) -> None:
    options = {"offsets": True} if kind == "offsets" else {"tables": kind.removesuffix(" tables")}
    with FakeTensorMode(), torch.no_grad():
        layer = QuantLinear(
            64, 8, bits=3, group_size=16, device="cuda", dtype=torch.bfloat16, **options
        )  # type: ignore[arg-type]
        output = layer(torch.empty(rows, 64, device="cuda", dtype=torch.bfloat16))
        assert output.device.type == layer.weight.device.type == layer.scales.device.type == "cuda"
        again = QuantLinear.from_quantized(layer.quantized_weight(), layer.bias)
        assert {buffer.device.type for buffer in again.buffers()} == {"cuda"}


# --- other layers ------------------------------------------------------------------------------


@kinds
def test_a_convolution_runs_on_it(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    conv = CONVOLUTIONS[1]
    values = conv.weight(module).detach()
    weight = made(kind, *values.shape, 3, 8, values=values)
    replacement: Any = conv.replacement(module, QuantLinear.from_quantized(weight, module.bias))
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    exact = F.conv2d(
        x, weight.dequantize().view_as(module.weight), module.bias, padding=1, groups=2
    )
    torch.testing.assert_close(replacement(x), exact)
    assert_same(replacement.matrix.quantized_weight(), weight)
    (gradient,) = torch.autograd.grad(replacement(x).square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.square().sum(), x)[0])


@kinds
def test_an_embedding_looks_up_its_rows(kind: str) -> None:
    weight = made(kind, 30, 20, 4, 8)
    replacement = EMBEDDING.replacement(nn.Embedding(30, 20), QuantLinear.from_quantized(weight))
    ids = torch.tensor([[3, 29], [0, 3]])
    assert torch.equal(replacement(ids), weight.dequantize()[ids])


# --- compilation -------------------------------------------------------------------------------


@pytest.mark.compile
@ignore_torchs_own
@kinds
def test_the_number_of_rows_and_the_way_of_calling_recompile_nothing(
    kind: str, count_graphs: Callable[[], int]
) -> None:
    for rows in range(1, 12):
        for layer in (layer_of(kind), layer_of(kind, seed=1)):
            x = inputs(rows, 64)
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer = layer_of(kind)
    for x in (
        inputs(3, 64).requires_grad_(),
        inputs(64, 3).T,
        inputs(6, 64)[::2],
        inputs(3, 1, 64),
    ):
        layer(x)
        with torch.no_grad():
            layer(x)
    assert count_graphs() == (
        2 if kind == "offsets" else 1
    )  # with tables only one row of input is compiled


@pytest.mark.compile
@ignore_torchs_own
@kinds
def test_matrices_are_compiled_once_for_each_kind_of_layer(
    kind: str, count_graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_PLAIN_MATRICES", set())
    for rows in (kernels.FEW_ROWS + 1, 20, 30):
        for layer in (layer_of(kind), layer_of(kind, seed=1)):
            x = inputs(rows, 64)
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert count_graphs() == 1
    layer_of(kind, 16)(x)
    layer_of(kind).bfloat16()(x.bfloat16())
    assert count_graphs() == 3


@pytest.mark.compile
@ignore_torchs_own
def test_one_graph_for_each_kind(count_graphs: Callable[[], int]) -> None:
    layers = [layer_of(kind) for kind in KINDS]
    layers += [layer_of(kind, scale_dtype=torch.bfloat16) for kind in KINDS]
    layers.append(QuantLinear(64, 8, bits=4, group_size=32))
    layers.append(QuantLinear(64, 8, bits=4, group_size=32, symmetric=True))
    for _ in range(2):
        for layer in layers:
            layer(inputs(1, 64))
    assert count_graphs() == len(layers)


@pytest.mark.compile
@ignore_torchs_own
def test_inference_mode_and_autocast_are_graphs_of_their_own(
    count_graphs: Callable[[], int],
) -> None:
    layer = layer_of("row tables", bits=2)
    for _ in range(2):
        layer(inputs(1, 64))
        with torch.inference_mode():
            layer(inputs(1, 64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(inputs(1, 64))
    assert count_graphs() == 3


@pytest.mark.compile
@ignore_torchs_own
@kinds
def test_a_machine_that_cannot_compile_is_named_once(
    kind: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    monkeypatch.setattr(kernels, "_compiled", {})
    monkeypatch.setattr(kernels, "_uncompilable", set())
    monkeypatch.setattr(native, "_usable", False)
    layer = layer_of(kind)
    for x in (inputs(1, 64), inputs(3, 64)):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert len(recwarn) == 1
    assert "torch.compile fails on cpu" in str(recwarn[0].message)


@pytest.mark.compile
@ignore_torchs_own
@pytest.mark.parametrize(
    ("kind", "bits", "dtype"),
    [
        ("offsets", 8, torch.float32),
        ("row tables", 2, torch.bfloat16),
        ("group tables", 4, torch.float32),
    ],
)
def test_inductor_is_as_exact_as_the_plain_path(
    kind: str, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_usable", False)
    layer = layer_of(kind, 64, 128, bits, 64).to(dtype)
    assert few_rows.one_pass(layer.format, 128)
    x = inputs(1, 128, dtype=dtype)
    assert error_ratio(layer(x), x, layer) <= 2


@pytest.mark.compile
@ignore_torchs_own
@pytest.mark.parametrize(("kind", "bits"), [("offsets", 3), ("row tables", 4), ("group tables", 3)])
def test_inductor_makes_the_matrix_of_the_plain_path(
    kind: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_usable", False)
    monkeypatch.setattr(kernels, "_PLAIN_MATRICES", set())
    layer = layer_of(kind, 24, 100, bits, 16)
    kept = len(kernels._compiled)
    found = kernels.dense_weight(layer.parts, layer.format, 100, torch.float32)
    assert len(kernels._compiled) == kept + 1
    if kind == "offsets":  # product and sum may be rounded once
        torch.testing.assert_close(found, layer.weight, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(found, layer.weight)


@pytest.mark.compile
@ignore_torchs_own
@pytest.mark.parametrize("usable", [True, False], ids=["native", "inductor"])
def test_a_compiled_model_inlines_its_layers(monkeypatch: pytest.MonkeyPatch, usable: bool) -> None:
    monkeypatch.setattr(native, "_usable", native.usable() and usable)
    model = nn.Sequential(
        layer_of("offsets", 64, 64, 8), nn.ReLU(), layer_of("row tables", 8, 64, 2)
    )
    x, kept = inputs(3, 64).requires_grad_(), len(kernels._compiled)
    compiled = torch.compile(model, fullgraph=True)
    compiled(x).sum().backward()
    assert len(kernels._compiled) == kept
    gradient, x.grad = x.grad, None
    with torch.compiler.set_stance("force_eager"):
        expected = model(x)
        expected.sum().backward()
    for found, exact in ((gradient, x.grad), (compiled(x), expected)):
        torch.testing.assert_close(
            found, exact, rtol=0, atol=1e-5 * float(exact.detach().abs().max())
        )


def test_raw_bits_tell_signed_zeros_apart() -> None:
    assert not torch.equal(raw_bits(torch.tensor([0.0])), raw_bits(torch.tensor([-0.0])))
