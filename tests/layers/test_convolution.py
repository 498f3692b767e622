"""Convolutions: patches times the matrix are what torch computes, and the quantised replacement is
torch's convolution.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tsq_layers as tsq
from tsq_layers.errors import LayerError
from tsq_layers.layers.convolution import CONVOLUTIONS, QuantConv, patches
from tsq_layers.layers.same_padding import QuantConvSame
from tsq_layers.numerics import grid
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.runtime.linear import QuantLinear

# torch's own convolution says once that an even kernel with padding="same" costs a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

FLOAT = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KINDS = dict(zip((1, 2, 3), CONVOLUTIONS, strict=True))

CASES: dict[str, dict[str, Any]] = {
    "1d": {"n": 1, "kernel_size": 3, "padding": 1},
    "1d, strided": {
        "n": 1,
        "kernel_size": 4,
        "stride": 3,
        "dilation": 2,
        "padding": 2,
        "bias": False,
    },
    "1d, same": {"n": 1, "kernel_size": 4, "padding": "same"},
    "2d": {"n": 2, "kernel_size": (3, 2), "padding": (1, 0)},
    "2d, pointwise": {"n": 2, "kernel_size": 1, "stride": 2},
    "2d, groups": {"n": 2, "kernel_size": 3, "groups": 2, "padding": "valid"},
    "2d, depthwise": {"n": 2, "kernel_size": 3, "groups": 4, "padding": "same", "dilation": (1, 3)},
    "2d, even and same": {"n": 2, "kernel_size": (4, 3), "padding": "same"},
    "2d, reflect": {"n": 2, "kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "2d, circular and same": {
        "n": 2,
        "kernel_size": (2, 5),
        "padding": "same",
        "padding_mode": "circular",
    },
    "3d, replicate": {
        "n": 3,
        "kernel_size": (1, 2, 3),
        "padding": (0, 1, 1),
        "padding_mode": "replicate",
    },
    "3d, groups": {"n": 3, "kernel_size": 2, "stride": (1, 2, 1), "groups": 2},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def convolution(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    rest = {name: value for name, value in case.items() if name != "n"}
    return FLOAT[case["n"]](4, 8, dtype=dtype, **rest)


def inputs(case: dict[str, Any], dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    sizes = (7, 6, 5)[: case["n"]]
    return torch.randn(batch, 4, *sizes, generator=torch.Generator().manual_seed(1)).to(dtype)


def quantised(module: Any, kind: Any, *, bits: int = 4, group_size: int = 8) -> tuple[Any, Any]:
    """The replacement, and the float layer with the same values in its weight."""
    matrix = kind.weight(module)
    scales, zeros = grid.minmax(matrix, bits, group_size, symmetric=False)
    scales = grid.storable(scales, torch.float16)
    codes = grid.quantize(matrix, scales, zeros, bits, group_size)
    weight = QuantizedWeight(
        codes, scales.half(), zeros.to(torch.uint8), bits, group_size, symmetric=False
    )
    replacement = kind.replacement(
        module, QuantLinear.from_quantized(weight, module.bias, dtype=matrix.dtype)
    )
    reference = copy.deepcopy(module)
    with torch.no_grad():
        reference.weight.copy_(kind.from_matrix(module, weight.dequantize(matrix.dtype)))
    return replacement, reference


def pair(case: dict[str, Any], dtype: torch.dtype = torch.float32, **grids: int) -> tuple[Any, Any]:
    return quantised(convolution(case, dtype), KINDS[case["n"]], **grids)


# --- patches -----------------------------------------------------------------------------------


def as_patches(module: Any, kind: Any, x: Tensor, *, reorder: bool = False) -> Tensor:
    """The layer's output, computed from what its kind shows of it."""
    blocks, weight = kind.blocks(module), kind.weight(module)
    rows = kind.inputs(module, x)
    rows = rows.unsqueeze(1) if blocks == 1 else rows
    assert rows.shape[1:] == (blocks, weight.shape[1])
    if reorder:
        rows = rows.flip(-1)
    y = torch.einsum("tbk,bnk->tbn", rows, weight.view(blocks, -1, weight.shape[1])).flatten(1)
    return y if module.bias is None else y + module.bias


def as_rows(y: Tensor, n: int) -> Tensor:
    """The output (B, N, …) as (T, N)."""
    batch = y.unsqueeze(0) if y.dim() == n + 1 else y
    return batch.movedim(1, -1).flatten(0, -2)


@st.composite
def layers_and_inputs(draw: st.DrawFn) -> tuple[int, nn.Module, Tensor]:
    n = draw(st.integers(1, 3))

    def sides(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    kernel, dilation, stride = sides(1, 3), sides(1, 2), sides(1, 3)
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "numbers":
        padding = sides(0, 2)
    if padding == "same":
        stride = (1,) * n
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, outputs = (groups * draw(st.integers(1, 2)) for _ in range(2))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    module = FLOAT[n](
        channels,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        mode,
        dtype=torch.float64,
    )
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return n, module, torch.randn(*batch, channels, *sides(5, 7), dtype=torch.float64)


@settings(deadline=None, max_examples=150)
@given(layers_and_inputs())
def test_patches_times_matrix_is_the_layer(drawn: tuple[int, Any, Tensor]) -> None:
    n, module, x = drawn
    expected = as_rows(module(x), n)
    torch.testing.assert_close(as_patches(module, KINDS[n], x), expected, rtol=0, atol=1e-10)


@cases
def test_another_order_of_columns_is_noticed(case: dict[str, Any]) -> None:
    module, x, kind = (
        convolution(case, torch.float64),
        inputs(case, torch.float64),
        KINDS[case["n"]],
    )
    expected = as_rows(module(x), case["n"])
    torch.testing.assert_close(as_patches(module, kind, x), expected, rtol=0, atol=1e-10)
    assert (as_patches(module, kind, x, reorder=True) - expected).abs().max() > 1e-2


@cases
def test_matrix_is_a_view_and_has_an_inverse(case: dict[str, Any]) -> None:
    module, kind = convolution(case), KINDS[case["n"]]
    matrix = kind.weight(module)
    assert matrix.data_ptr() == module.weight.data_ptr()
    assert torch.equal(kind.from_matrix(module, matrix), module.weight)


def test_pointwise_patches_are_as_large_as_the_input() -> None:
    module, x = nn.Conv2d(4, 8, 1), torch.randn(2, 4, 6, 5)
    rows = patches(module, x)
    assert torch.equal(rows, x.permute(0, 2, 3, 1).reshape(-1, 4))
    assert rows.untyped_storage().nbytes() == x.untyped_storage().nbytes()


# --- which modules -----------------------------------------------------------------------------


class Renamed(nn.Conv2d):
    pass


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.std(), bias)


def names(module: nn.Module) -> list[str]:
    return [kind.name for kind in CONVOLUTIONS if kind.matches(module)]


def test_kinds_match_what_computes_a_plain_convolution() -> None:
    assert [names(make(4, 8, 3)) for make in FLOAT.values()] == [["Conv1d"], ["Conv2d"], ["Conv3d"]]
    assert names(Renamed(4, 8, 3)) == ["Conv2d"]
    for other in (
        Doubled(4, 8, 3),
        Standardised(4, 8, 3),
        nn.ConvTranspose2d(4, 8, 3),
        nn.Linear(4, 8),
    ):
        assert names(other) == []
    lazy = nn.LazyConv2d(8, 3)
    assert names(lazy) == []
    lazy(torch.zeros(1, 4, 5, 5))
    assert names(lazy) == ["Conv2d"]
    patched: Any = nn.Conv2d(4, 8, 3)
    patched._conv_forward = lambda x, weight, bias: x
    assert names(patched) == []


# --- padding as TensorFlow's -------------------------------------------------------------------


class Conv2dSame(nn.Conv2d):
    """What timm's computes: as ``padding="same"`` of torch, for any stride."""

    def forward(self, x: Tensor) -> Tensor:
        for dim, (kernel, stride) in enumerate(
            zip(self.kernel_size, self.stride, strict=True), start=2
        ):
            size = x.shape[dim]
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            before = x.new_zeros(*x.shape[:dim], missing // 2, *x.shape[dim + 1 :])
            after = x.new_zeros(*x.shape[:dim], missing - missing // 2, *x.shape[dim + 1 :])
            x = torch.cat([before, x, after], dim)
        return self._conv_forward(x, self.weight, self.bias)


Conv2dSame.__module__ = "timm.layers.conv2d_same"


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 3), (2, 2), (1, 2), (4, 1)])
def test_padding_that_depends_on_the_size_of_the_input(
    kernel: int, stride: int, groups: int, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            Conv2dSame(4, 8, kernel, stride, groups=groups), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )

    model, x, y = build(), torch.randn(192, 4, 9, 8), torch.randn(2, 4, 7, 5)
    expected = model(y)
    model = tsq.quantize(model, tsq.QuantConfig(bits=8, group_size=None), [x])
    assert isinstance(model[0], QuantConvSame)
    assert (model(y) - expected).norm() < 0.02 * expected.norm()
    if stride == 1:
        same = F.conv2d(y, model[0].weight, model[0].bias, padding="same", groups=groups)
        torch.testing.assert_close(model[0](y), same)
    tsq.save(model, tmp_path)
    assert torch.equal(tsq.load(tmp_path, build())(y), model(y))


# --- the replacement ----------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_output_is_bit_equal_to_the_float_layers(case: dict[str, Any], dtype: torch.dtype) -> None:
    replacement, reference = pair(case, dtype)
    x = inputs(case, dtype)
    assert torch.equal(replacement.weight, reference.weight)
    assert torch.equal(replacement(x), reference(x))
    assert torch.equal(replacement(x[0]), reference(x[0]))
    assert replacement(x).dtype == dtype


@settings(deadline=None, max_examples=60)
@given(layers_and_inputs())
def test_any_geometry_is_bit_equal_to_the_float_layers(drawn: tuple[int, Any, Tensor]) -> None:
    n, module, x = drawn
    replacement, reference = quantised(module, KINDS[n])
    assert torch.equal(replacement(x), reference(x))


def test_one_changed_code_is_noticed() -> None:
    replacement, reference = pair(CASES["2d"])
    replacement.matrix.words[3, 1] ^= 1
    assert not torch.equal(replacement(inputs(CASES["2d"])), reference(inputs(CASES["2d"])))


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_widths(bits: int) -> None:
    replacement, reference = pair(CASES["2d, groups"], bits=bits, group_size=5)
    x = inputs(CASES["2d, groups"])
    assert torch.equal(replacement(x), reference(x))


def test_replacement_takes_over_flags_and_shapes() -> None:
    module = convolution(CASES["2d, depthwise"]).eval()
    module.bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    replacement, reference = quantised(module, KINDS[2])
    assert not any(part.training for part in replacement.modules())
    assert not replacement.bias.requires_grad
    assert torch.equal(replacement.bias, reference.bias)
    assert replacement.bias is replacement.matrix.bias
    assert (replacement.in_channels, replacement.out_channels, replacement.groups) == (4, 8, 4)
    assert (
        "4, 8, kernel_size=(3, 3), stride=(1, 1), padding=same, dilation=(1, 3), groups=4"
        in repr(replacement)
    )


def test_autocast_rules_as_in_a_float_layer() -> None:
    replacement, reference = pair(CASES["2d"])
    x = inputs(CASES["2d"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(replacement(x), reference(x))
        assert replacement(x).dtype == torch.bfloat16
        assert replacement(x.double()).dtype == torch.float64


@cases
def test_gradients_are_those_of_the_float_layer(case: dict[str, Any]) -> None:
    replacement, reference = pair(case)
    for x in (inputs(case), inputs(case)[0]):
        gradients = []
        for layer in (replacement, reference):
            layer.zero_grad()
            copied = x.clone().requires_grad_()
            layer(copied).square().sum().backward()
            gradients.append((copied.grad, None if layer.bias is None else layer.bias.grad.clone()))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["1d, strided", "2d, groups", "3d, replicate"])
def test_gradients_of_gradients(name: str) -> None:
    replacement, _ = pair(CASES[name], torch.float64)
    x = inputs(CASES[name], torch.float64, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(replacement, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(replacement, x, fast_mode=True)


def test_the_graph_holds_neither_the_dense_weight_nor_the_input() -> None:
    layer = QuantConv(
        QuantLinear(32 * 9, 64, bits=4, group_size=32), kernel_size=(3, 3), padding=(1, 1)
    )
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, 32, 12, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert saved
    assert (
        max(tensor.numel() for tensor in saved)
        <= layer.matrix.words.numel()
        < x.numel()
        < layer.weight.numel()
    )


def test_functional_transforms_see_a_plain_layer() -> None:
    replacement, reference = pair(CASES["2d"], torch.float64)
    x = inputs(CASES["2d"], torch.float64)
    torch.testing.assert_close(torch.func.vmap(replacement)(x), reference(x))
    torch.testing.assert_close(
        torch.func.jacrev(replacement)(x[0]), torch.func.jacrev(reference)(x[0])
    )


# --- what a module must survive ----------------------------------------------------------------


def test_state_dict_and_deepcopy_keep_every_bit() -> None:
    replacement, _ = pair(CASES["2d, groups"])
    x = inputs(CASES["2d, groups"])
    keys = {f"matrix.{name}" for name in ("words", "scale_bits", "zero_words", "bias")}
    assert set(replacement.state_dict()) == keys
    empty = KINDS[2].replacement(
        convolution(CASES["2d, groups"]), QuantLinear(18, 8, bits=4, group_size=8)
    )
    assert not torch.equal(empty(x), replacement(x))
    empty.load_state_dict(replacement.state_dict())
    for other in (empty, copy.deepcopy(replacement)):
        assert torch.equal(other(x), replacement(x))
    assert replacement.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_as_one_graph() -> None:
    case = CASES["2d, even and same"]
    replacement, _ = pair(case)
    x, again = (inputs(case).requires_grad_() for _ in range(2))
    compiled = torch.compile(replacement, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    replacement(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), replacement(again))


@pytest.mark.parametrize("name", ["1d, same", "2d", "3d, groups"])
def test_export_runs_for_any_batch(name: str) -> None:
    replacement, _ = pair(CASES[name])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(replacement, (inputs(CASES[name]),), dynamic_shapes=({0: batch},))
    x = inputs(CASES[name], batch=5)
    torch.testing.assert_close(program.module()(x), replacement(x))


@cases
def test_nothing_leaves_the_device(case: dict[str, Any]) -> None:
    module, kind = convolution(case), KINDS[case["n"]]
    rows, columns = kind.weight(module).shape
    with FakeTensorMode(), torch.no_grad():
        matrix = QuantLinear(
            columns, rows, bits=3, group_size=8, device="cuda", dtype=torch.bfloat16
        )
        replacement: Any = kind.replacement(module, matrix)
        x = torch.empty(inputs(case).shape, device="cuda", dtype=torch.bfloat16)
        for result in (replacement(x), patches(replacement, x), replacement.weight):
            assert result.device.type == "cuda"
            assert result.dtype == torch.bfloat16


def test_errors_name_shapes_and_values() -> None:
    def make(**changes: Any) -> QuantConv:
        return QuantConv(
            QuantLinear(36, 8, bits=4, group_size=8), **{"kernel_size": (3, 3), **changes}
        )

    layer = make()
    for wrong in (
        torch.zeros(2, 3, 5, 5),
        torch.zeros(4, 5),
        torch.zeros(1, 4, 5, 5, dtype=torch.int64),
    ):
        with pytest.raises(
            LayerError, match=r"\(batch, 4, …\) or \(4, …\) with 2 spatial dimensions"
        ):
            layer(wrong)
    for changes, message in (
        ({"kernel_size": (3, 3, 1, 1)}, "kernel_size=.*give 1, 2 or 3 numbers"),
        ({"stride": (1,)}, r"stride=\(1,\)"),
        ({"padding": (1,)}, r"padding=\(1,\): give 2 numbers"),
        ({"padding": "full"}, "padding='full'"),
        ({"padding": "same", "stride": (2, 2)}, r"stride=\(2, 2\)"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror': give one of zeros"),
        ({"groups": 3}, "groups=3"),
        ({"kernel_size": (5, 1)}, r"a matrix of 8×36 with kernel_size=\(5, 1\)"),
    ):
        with pytest.raises(LayerError, match=message):
            make(**changes)
    assert F.conv2d(torch.zeros(1, 4, 5, 5), layer.weight).shape == (1, 8, 3, 3)
