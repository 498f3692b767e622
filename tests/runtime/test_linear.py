"""QuantLinear: exact storage, an output as exact as the plain path's, and everything that a module must survive."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tsq_layers.errors import LayerError
from tsq_layers.numerics import grid
from tsq_layers.numerics.weight import QuantizedWeight, WeightFormat
from tsq_layers.runtime import kernels, native
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.one_pass import one_pass
from tsq_layers.runtime.parts import Parts

WIDTHS = range(1, 9)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Dynamo and Inductor call parts of torch that torch has deprecated.
ignore_torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def random_weight(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> QuantizedWeight:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scales, zeros = grid.minmax(values, bits, group_size, symmetric)
    scales = grid.storable(scales, scale_dtype)
    codes = grid.quantize(values, scales, zeros, bits, group_size)
    return QuantizedWeight(
        codes, scales.to(scale_dtype), zeros.to(torch.uint8), bits, group_size, symmetric
    )


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def raw_bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def error_ratio(output: Tensor, x: Tensor, layer: QuantLinear) -> float:
    """Root mean square error against float64, in units of that of dequantise-and-``F.linear``."""
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    weight = layer.quantized_weight()
    exact = F.linear(
        x.double(), weight.dequantize(torch.float64), None if bias is None else bias.double()
    )
    plain = F.linear(x, weight.dequantize(x.dtype), bias)
    return float(((output.double() - exact).norm() / (plain.double() - exact).norm()).item())


# --- storage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_weight_is_bit_equal_to_the_grids(
    bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    for columns, group_size in ((64, 16), (75, 32), (40, 40)):
        weight = random_weight(
            3, columns, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype
        )
        layer = QuantLinear.from_quantized(weight)
        for dtype in (*DTYPES, torch.float64):
            assert torch.equal(layer.to(dtype).weight, weight.dequantize(dtype))
        back = layer.quantized_weight()
        assert torch.equal(back.codes, weight.codes)
        assert torch.equal(back.zeros, weight.zeros)
        assert torch.equal(raw_bits(back.scales), raw_bits(weight.scales))
        assert (back.bits, back.group_size, back.symmetric) == (bits, group_size, symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_bit_equal_to_the_weights(bits: int, symmetric: bool) -> None:
    for columns, group_size in ((64, 16), (75, 32), (40, 40)):
        layer = QuantLinear.from_quantized(
            random_weight(9, columns, bits, group_size, symmetric=symmetric)
        )
        for dtype in (*DTYPES, torch.float64):
            layer.to(dtype)
            for ids in (
                torch.tensor([[8, 0, 3], [3, 3, 1]]),
                torch.tensor(5, dtype=torch.int32),
                torch.tensor([[]]).long(),
            ):
                rows = layer.rows(ids)
                assert (rows.dtype, rows.shape) == (dtype, (*ids.shape, columns))
                assert torch.equal(rows, layer.weight[ids.long()])
        others = layer.rows(torch.tensor([0, 2]))
        layer.words[1] ^= 1
        assert torch.equal(layer.rows(torch.tensor([0, 2])), others)
        assert not torch.equal(layer.rows(torch.tensor([1, 2])), others)


@pytest.mark.parametrize("symmetric", [False, True])
def test_blocks_of_rows_are_bit_equal_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    weight = random_weight(9, 75, 3, 32, symmetric=symmetric)
    layer = QuantLinear.from_quantized(weight)
    sizes: list[int] = []
    original = kernels.matrix_of
    monkeypatch.setattr(native, "_usable", False)

    def record(parts: Parts, *args: Any) -> Tensor:
        sizes.append(parts.words.shape[0])
        return original(parts, *args)

    monkeypatch.setattr(kernels, "matrix_of", record)
    for block, expected in ((10, [1] * 9), (160, [2, 2, 2, 2, 1]), (9 * 75, [9])):
        monkeypatch.setattr(kernels, "_BLOCK", block)
        sizes.clear()
        assert torch.equal(layer.dequantize(torch.bfloat16), weight.dequantize(torch.bfloat16))
        assert sizes == expected
        ids = torch.tensor([[8], [2]])
        assert torch.equal(torch.func.vmap(layer.rows)(ids), layer.weight[ids])


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_a_change_of_dtype_touches_no_stored_bit(scale_dtype: torch.dtype) -> None:
    layer = QuantLinear.from_quantized(
        random_weight(8, 64, 4, 32, scale_dtype=scale_dtype), torch.randn(8)
    )
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        assert layer.dtype == layer.weight.dtype == layer.bias.dtype == dtype  # type: ignore[union-attr]
        for name in ("words", "scale_bits", "zero_words"):
            assert torch.equal(layer.get_buffer(name), before[name])
    assert layer.half().scales.dtype == scale_dtype
    meta = layer.to("meta")
    assert all(
        tensor.is_meta
        for tensor in (meta.words, meta.weight, meta(torch.empty(3, 64, device="meta")))
    )


def test_bits_per_weight_counts_what_is_stored() -> None:
    layer = QuantLinear(128, 16, bits=3, group_size=64, bias=False)
    # 12 words for 128 codes, two 16-bit scales, and one word in each plane for two zero points.
    assert layer.bits_per_weight == pytest.approx((12 * 32 + 2 * 16 + 2 * 32) / 128)
    assert QuantLinear(4096, 2, bits=4, group_size=128).bits_per_weight == 4 + 20 / 128
    assert (
        QuantLinear(4096, 2, bits=2, group_size=None, symmetric=True).bits_per_weight
        == 2 + 16 / 4096
    )


def test_state_dict_safetensors_and_deepcopy_keep_every_bit(tmp_path: Path) -> None:
    weight = random_weight(8, 75, 5, 32, scale_dtype=torch.bfloat16)
    layer = QuantLinear.from_quantized(weight, torch.randn(8))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    empty = QuantLinear(75, 8, bits=5, group_size=32, scale_dtype=torch.bfloat16)
    assert not empty.weight.any()
    fresh = copy.deepcopy(empty)
    fresh.load_state_dict(layer.state_dict())
    empty.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for other in (fresh, empty, copy.deepcopy(layer)):
        assert set(other.state_dict()) == {"words", "scale_bits", "zero_words", "bias"}
        assert all(
            torch.equal(tensor, layer.state_dict()[name])
            for name, tensor in other.state_dict().items()
        )
        assert torch.equal(other.weight, weight.dequantize())
    with pytest.raises(RuntimeError, match="size mismatch for words"):
        QuantLinear(75, 8, bits=4, group_size=32).load_state_dict(layer.state_dict())


def test_from_float_takes_over_bias_dtype_and_flags() -> None:
    linear = nn.Linear(64, 8, dtype=torch.bfloat16).eval()
    linear.bias.requires_grad_(False)
    layer = QuantLinear.from_float(linear, random_weight(8, 64, 4, 32))
    assert (layer.dtype, layer.training, layer.bias.requires_grad) == (torch.bfloat16, False, False)  # type: ignore[union-attr]
    assert torch.equal(layer.bias, linear.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        linear.bias.zero_()
    assert layer.bias.any()  # type: ignore[union-attr]
    assert (
        QuantLinear.from_float(nn.Linear(64, 8, bias=False), random_weight(8, 64, 4, 32)).bias
        is None
    )
    assert QuantLinear.from_quantized(
        random_weight(8, 64, 4, 32), torch.zeros(8)
    ).bias.requires_grad  # type: ignore[union-attr]
    assert (
        "in_features=64, out_features=8, bits=4, group_size=32, symmetric=False, bias=True, bits_per_weight=5.00"
        in repr(layer)
    )


def test_errors_name_the_shapes() -> None:
    weight = random_weight(8, 64, 4, 32)
    layer = QuantLinear.from_quantized(weight)
    with pytest.raises(LayerError, match=r"shape \(2, 63\).*\(\.\.\., 64\) and has 8 outputs"):
        layer(torch.zeros(2, 63))
    with pytest.raises(
        LayerError, match=r"torch.int64 of shape \(2, 64\); this layer takes floating point"
    ):
        layer(torch.zeros(2, 64, dtype=torch.int64))
    with pytest.raises(LayerError, match=r"\(8, 64\) and the layer's \(9, 64\)"):
        QuantLinear.from_float(nn.Linear(64, 9), weight)
    with pytest.raises(LayerError, match=r"bias has shape \(9,\)"):
        QuantLinear.from_quantized(weight, torch.zeros(9))
    for wrong, message in (
        ({"bits": 9}, "bits=9"),
        ({"group_size": 0}, "group_size=0"),
        ({"scale_dtype": torch.float64}, "scale_dtype=torch.float64"),
    ):
        with pytest.raises(LayerError, match=message):
            QuantLinear(64, 8, **{"bits": 4, "group_size": 32, **wrong})  # type: ignore[arg-type]
    with pytest.raises(LayerError, match="out_features=0"):
        QuantLinear(64, 0, bits=4, group_size=32)


# --- forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_output_is_as_exact_as_the_plain_path(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    for columns, group_size in ((256, 32), (256, 256), (288, 48), (75, 32)):
        weight = random_weight(64, columns, bits, group_size, symmetric=symmetric)
        layer = QuantLinear.from_quantized(weight, inputs(64)).to(dtype)
        for rows in (4, kernels.FEW_ROWS + 1):
            x = inputs(rows, columns, dtype=dtype)
            output = layer(x)
            assert output.dtype == dtype
            assert error_ratio(output, x, layer) <= 2


def test_the_bound_notices_one_changed_code() -> None:
    layer = QuantLinear.from_quantized(random_weight(64, 256, 4, 32))
    x = inputs(4, 256)
    good = layer(x)
    layer.words[5, 7] ^= 1
    assert error_ratio(good, x, layer) > 2


def test_which_shapes_take_one_pass() -> None:
    assert all(
        one_pass(WeightFormat(bits=bits, group_size=64), 4096)
        and one_pass(WeightFormat(bits=bits), 4096)
        for bits in WIDTHS
    )
    assert one_pass(WeightFormat(bits=2, group_size=64), 576)
    assert one_pass(WeightFormat(bits=4, group_size=64), 576)
    assert not one_pass(WeightFormat(bits=3, group_size=32), 75)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 0, 64), (2, 3, 64), (2, 3, 4, 64)])
def test_any_rank_and_number_of_rows(shape: tuple[int, ...]) -> None:
    layer = QuantLinear.from_quantized(random_weight(8, 64, 4, 32), inputs(8))
    x = inputs(*shape, dtype=torch.float64)
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight.double(), layer.bias.double()), rtol=0, atol=1e-10
    )  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [2, 40])
def test_autocast_rules_as_in_a_float_layer(rows: int) -> None:
    layer = QuantLinear.from_quantized(random_weight(8, 64, 4, 32), inputs(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(inputs(rows, 64))
        assert layer(inputs(rows, 64).double()).dtype == torch.float64
    assert output.dtype == torch.bfloat16
    assert error_ratio(output, inputs(rows, 64, dtype=torch.bfloat16), layer) <= 2


@ignore_torchs_own
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(
    "additions",
    [{}, {"rotation": 32}, {"activation_bits": 8}, {"outliers": 20}, {"outlier_columns": 2}],
    ids=str,
)
def test_forward_derivatives_are_those_of_the_dequantised_layer(
    additions: dict[str, int], rows: int, trained: bool
) -> None:
    layer = QuantLinear(64, 8, bits=4, group_size=32, bias=True, **additions).requires_grad_(
        trained
    )  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for name, buffer in layer.named_buffers():
        if name in ("words", "zero_words"):
            buffer.copy_(torch.randint(2**31, buffer.shape, generator=generator))
    layer.scale_bits.copy_(raw_bits(torch.rand(8, 2, generator=generator).half() + 0.5))  # type: ignore[union-attr, operator]
    x, tangent = inputs(rows, 64), inputs(rows + 1, 64)[1:]
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    assert found is not None
    exact = F.linear(tangent, layer.weight)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("columns", [64, 75])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_gradients_are_those_of_the_dequantised_layer(rows: int, columns: int) -> None:
    layer = QuantLinear.from_quantized(random_weight(8, columns, 4, 32), inputs(8))
    x, bias = inputs(rows, columns).requires_grad_(), layer.bias.detach().clone().requires_grad_()  # type: ignore[union-attr]
    layer(x).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    F.linear(twin, layer.weight, bias).square().sum().backward()  # type: ignore[no-untyped-call]
    for found, exact in ((x.grad, twin.grad), (layer.bias.grad, bias.grad)):  # type: ignore[union-attr]
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("rows", [1, 40])
def test_the_graph_does_not_hold_the_matrix(rows: int) -> None:
    layer = QuantLinear.from_quantized(random_weight(48, 64, 4, 32), inputs(48))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(inputs(rows, 64).requires_grad_())
    assert saved
    assert max(tensor.numel() for tensor in saved) <= layer.words.numel()


def test_functional_transforms_see_a_plain_layer() -> None:
    layer = QuantLinear.from_quantized(random_weight(8, 64, 4, 32))
    x = inputs(3, 64)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    jacobian = torch.func.jacrev(layer)(x[0])
    torch.testing.assert_close(jacobian, layer.weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_nothing_leaves_the_device(rows: int, bits: int) -> None:
    # Without gradients: autograd itself cannot record CUDA tensors in a build without CUDA.
    with FakeTensorMode(), torch.no_grad():
        layer = QuantLinear(64, 8, bits=bits, group_size=16, device="cuda", dtype=torch.bfloat16)
        output = layer(torch.empty(rows, 64, device="cuda", dtype=torch.bfloat16))
        assert output.device.type == layer.weight.device.type == "cuda"
        again = QuantLinear.from_quantized(layer.quantized_weight(), layer.bias)
        assert again.dtype_marker.device.type == again.words.device.type == "cuda"


def test_export_runs_and_is_equal() -> None:
    layer = QuantLinear.from_quantized(random_weight(8, 64, 4, 32), inputs(8))
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (inputs(4, 64),), dynamic_shapes=({0: rows},))
    for count in (2, 40):
        torch.testing.assert_close(program.module()(inputs(count, 64)), layer(inputs(count, 64)))


# --- compilation -------------------------------------------------------------------------------


@pytest.mark.compile
@ignore_torchs_own
def test_the_number_of_rows_recompiles_nothing(count_graphs: Callable[[], int]) -> None:
    layer = QuantLinear.from_quantized(random_weight(8, 64, 4, 32), inputs(8))
    twin = QuantLinear.from_quantized(random_weight(8, 64, 4, 32, seed=1), inputs(8))
    for rows in range(1, 40):
        for each in (layer, twin):
            torch.testing.assert_close(
                each(inputs(rows, 64)), F.linear(inputs(rows, 64), each.weight, each.bias)
            )
    assert count_graphs() == 2


@pytest.mark.compile
@ignore_torchs_own
def test_the_way_of_calling_recompiles_nothing(count_graphs: Callable[[], int]) -> None:
    layer = QuantLinear.from_quantized(random_weight(8, 64, 4, 32), inputs(8))
    for x in (
        inputs(3, 64),
        inputs(3, 64).requires_grad_(),
        inputs(64, 3).T,
        inputs(6, 64)[::2],
        inputs(3, 1, 64),
        nn.Parameter(inputs(3, 64)),
    ):
        layer(x)
        with torch.no_grad():
            layer(x)
    assert count_graphs() == 1


@pytest.mark.compile
@ignore_torchs_own
def test_more_shapes_than_the_recompile_limit_all_stay_compiled(
    count_graphs: Callable[[], int],
) -> None:
    widths = range(8, 8 * 12, 8)
    for _ in range(2):
        for rows in widths:
            QuantLinear.from_quantized(random_weight(rows, 64, 8, 32))(inputs(1, 64))
    assert len(widths) > torch._dynamo.config.recompile_limit
    assert count_graphs() == len(widths)


@pytest.mark.compile
@ignore_torchs_own
def test_many_rows_and_tensors_without_values_are_not_compiled(
    count_graphs: Callable[[], int],
) -> None:
    layer = QuantLinear.from_quantized(random_weight(8, 64, 4, 32))
    layer(inputs(kernels.FEW_ROWS + 1, 64))
    torch.func.vmap(layer)(inputs(3, 64))
    copy.deepcopy(layer).to("meta")(torch.empty(2, 64, device="meta"))
    with FakeTensorMode():
        QuantLinear(64, 8, bits=4, group_size=16)(torch.empty(1, 64))
    with torch.compiler.set_stance("force_eager"):
        layer(inputs(1, 64))
    assert count_graphs() == 0


@pytest.mark.compile
@ignore_torchs_own
def test_a_machine_that_cannot_compile_is_named_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    monkeypatch.setattr(kernels, "_compiled", {})
    monkeypatch.setattr(kernels, "_uncompilable", set())
    monkeypatch.setattr(native, "_usable", False)
    layer = QuantLinear.from_quantized(random_weight(8, 64, 4, 32), inputs(8))
    for x in (inputs(1, 64), inputs(1, 64), inputs(3, 64)):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert len(recwarn) == 1
    message = str(recwarn[0].message)
    assert "torch.compile fails on cpu" in message
    assert "no C++ compiler here" in message
    assert "Install a C++ compiler" in message


@pytest.mark.compile
@ignore_torchs_own
@pytest.mark.parametrize(
    ("bits", "columns", "dtype"), [(4, 288, torch.float32), (6, 256, torch.bfloat16)]
)
def test_inductor_is_as_exact_as_the_plain_path(
    bits: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_usable", False)
    layer = QuantLinear.from_quantized(random_weight(64, columns, bits, 48), inputs(64)).to(dtype)
    assert one_pass(layer.format, columns)
    for rows in (1, 3, 7) if bits == 4 else (1,):
        x = inputs(rows, columns, dtype=dtype)
        assert error_ratio(layer(x), x, layer) <= 2


@pytest.mark.compile
@ignore_torchs_own
@pytest.mark.parametrize("bits", [2, 3])
def test_inductor_makes_the_matrix_bit_by_bit(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_usable", False)
    monkeypatch.setattr(kernels, "_PLAIN_MATRICES", set())
    layer = QuantLinear.from_quantized(random_weight(24, 100, bits, 16))
    kept = len(kernels._compiled)
    found = kernels.dense_weight(layer.parts, layer.format, 100, torch.float32)
    assert len(kernels._compiled) == kept + 1
    assert torch.equal(found, layer.weight)


@pytest.mark.compile
@ignore_torchs_own
@pytest.mark.parametrize("usable", [True, False], ids=["native", "inductor"])
def test_a_compiled_model_inlines_its_layers(monkeypatch: pytest.MonkeyPatch, usable: bool) -> None:
    monkeypatch.setattr(native, "_usable", native.usable() and usable)
    first = QuantLinear.from_quantized(random_weight(64, 64, 8, 32), inputs(64))
    model = nn.Sequential(
        first, nn.ReLU(), QuantLinear.from_quantized(random_weight(8, 64, 8, 32), inputs(8))
    )
    x = inputs(3, 64).requires_grad_()
    kinds = len(kernels._compiled)
    compiled = torch.compile(model, fullgraph=True)
    compiled(x).sum().backward()
    assert len(kernels._compiled) == kinds
    gradient, x.grad = x.grad, None
    with torch.compiler.set_stance("force_eager"):
        expected = model(x)
        expected.sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    torch.testing.assert_close(compiled(x), expected)
