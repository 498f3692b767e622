"""The operations for a CPU: against float64, at every layout of the codes; built once; and named
where they cannot be built.
"""

import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from grid_kinds import made
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import CompileWarning, LayerError
from tsq_layers.numerics import grid
from tsq_layers.runtime import kernels, native
from tsq_layers.runtime.linear import QuantLinear

KINDS = {"offsets": range(1, 9), "row tables": range(1, 5), "group tables": range(1, 5)}
CASES = [
    pytest.param(kind, bits, id=f"{kind}-{bits}")
    for kind, widths in KINDS.items()
    for bits in widths
]
LAYOUTS = ((7, 3), (75, 32), (96, 96), (288, 48), (576, 128), (1024, 64))
ROWS = (1, 2, 3, 4, 5, 16, 17, 40)

needs_operations = pytest.mark.skipif(not native.usable(), reason="no C++ compiler")


def layer_of(kind, rows, columns, bits, group_size, **options):
    torch.manual_seed(bits)
    return QuantLinear.from_quantized(
        made(kind, rows, columns, bits, group_size, **options), torch.randn(rows)
    )


def off(x, layer):
    """Largest deviation from float64, in units of what one rounding of each product could make."""
    weight = layer.quantized_weight().dequantize(torch.float64)
    found, bias = layer(x).detach().double(), layer.bias.detach().double()
    bound = F.linear(x.double().abs(), weight.abs(), bias.abs())
    return float(((found - F.linear(x.double(), weight, bias)).abs() / bound).max()) * 2**24


@needs_operations
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_every_layout_and_number_of_rows_is_exact_to_a_few_roundings(kind, bits):
    for columns, group_size in LAYOUTS:
        layer = layer_of(kind, 21, columns, bits, group_size)
        for rows in ROWS:
            assert off(torch.randn(rows, columns), layer) < 8


def grid_layer(bits, columns, group_size, *, symmetric=False, rows=21):
    """Random codes on a grid with integer zero points."""
    generator = torch.Generator().manual_seed(bits)
    groups = grid.group_count(columns, group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    scales = (0.1 + torch.rand(rows, groups, generator=generator)).half()
    weight = tsq.QuantizedWeight(codes, scales, zeros, bits, group_size, symmetric)
    return QuantLinear.from_quantized(weight, torch.zeros(rows))


@needs_operations
@pytest.mark.parametrize("symmetric", [False, True], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_zero_points_are_exact_to_a_few_roundings(bits, symmetric):
    for columns, group_size in (*LAYOUTS, (384, 128), (4608, 4608), (64, 4)):
        layer = grid_layer(bits, columns, group_size, symmetric=symmetric)
        for rows in (1, 2, 7, 17):
            assert off(torch.randn(rows, columns), layer) < 8


@needs_operations
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_one_input_alone_gives_its_column_of_the_weight(bits):
    layer, place = grid_layer(bits, 384, 64), 200
    x = torch.zeros(1, 384)
    for value in (1.0, -3.0, 2.0**-20, 65504.0):
        x[0, place] = value
        assert torch.equal(layer(x)[0], value * layer.dequantize(torch.float32)[:, place])


@needs_operations
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_outlier_costs_the_others_of_its_group_no_more_than_its_own_last_digit(bits):
    layer, x = grid_layer(bits, 384, 64), torch.randn(1, 384)
    x[0, 70] = 3e4
    weight = layer.quantized_weight().dequantize(torch.float64)
    error = (layer(x).double() - F.linear(x.double(), weight)).abs()
    rounding = 2.0**-23 * 3e4 * weight[:, 64:128].abs().sum(1) + 2.0**-21 * F.linear(
        x.double().abs(), weight.abs()
    )
    assert (error <= rounding).all()


@needs_operations
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_inputs_that_are_no_numbers_or_very_small_are_as_with_floats(bits):
    layer = grid_layer(bits, 128, 64)
    weight, x = layer.dequantize(torch.float32), torch.randn(1, 128)
    for value in (float("inf"), float("nan")):
        x[0, 5] = value
        assert not torch.isfinite(layer(x)[:, weight[:, 5] != 0]).any()
    for factor in (1e-30, 1e-38, 1e30):
        x = torch.randn(1, 128) * factor
        found, expected = layer(x), F.linear(x.double(), weight.double())
        assert (
            (found - expected).abs()
            <= 2.0**-20 * F.linear(x.double().abs(), weight.double().abs()) + 1e-44
        ).all()
    assert not layer(torch.zeros(1, 128)).any()


@needs_operations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_half_precision_is_float32_rounded_once(bits, dtype):
    layer = grid_layer(bits, 384, 64)
    for rows in (1, 5):
        x = torch.randn(rows, 384).to(dtype)
        assert torch.equal(layer(x), layer(x.float()).to(dtype))


@needs_operations
def test_the_bound_notices_one_changed_code():
    layer, x = layer_of("offsets", 21, 288, 4, 48), torch.randn(3, 288)
    good = layer(x)
    layer.words[20, -1] ^= 1 << 31
    assert (layer(x) - good)[:, 20].abs().min() > 1e-4
    assert torch.equal(layer(x)[:, :20], good[:, :20])


@needs_operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_the_matrix_is_bit_equal_to_the_grids(kind, bits, dtype):
    for columns, group_size in LAYOUTS:
        weight = made(kind, 5, columns, bits, group_size, scale_dtype=torch.float32)
        assert torch.equal(
            QuantLinear.from_quantized(weight).dequantize(dtype), weight.dequantize(dtype)
        )


@needs_operations
@pytest.mark.parametrize("columns", range(1, 10))
def test_narrow_rows_end_where_they_end(columns):
    # A vector behind the last column of a row of less than a vector would reach over the row after it.
    for bits, group_size in ((2, columns), (3, 2), (4, 1), (8, 3)):
        weight = made("offsets", 33, columns, bits, group_size, scale_dtype=torch.float32)
        layer = QuantLinear.from_quantized(weight)
        for _ in range(20):
            assert torch.equal(layer.dequantize(torch.float32), weight.dequantize(torch.float32))
        assert off(torch.randn(40, columns), layer_of("offsets", 33, columns, bits, group_size)) < 8


@needs_operations
def test_a_sum_that_cancels_keeps_its_digits():
    weight = made("offsets", 4, 256, 1, 256)
    weight.offsets.copy_(-weight.scales)  # levels -s and 0
    layer = QuantLinear.from_quantized(weight, torch.zeros(4))
    x = 1e4 + torch.randn(1, 256)
    layer.words.fill_(-1)  # all codes are 1: the weight is exactly zero
    assert not layer(x).any()


@needs_operations
def test_nothing_is_read_behind_the_tensors():
    # The last row ends where the storage ends; what a vector would read beyond it belongs to others.
    layer = layer_of("offsets", 3, 7, 3, 3)
    around = torch.full((layer.words.numel() + 64,), -1, dtype=torch.int32)
    x, good, words = torch.randn(2, 7), None, layer.words.clone()
    for filling in (0, -1):
        around.fill_(filling)
        around[: words.numel()] = words.flatten()
        layer.words = around[: words.numel()].view_as(words)
        good = layer(x) if good is None else good
        assert torch.equal(layer(x), good)


@needs_operations
def test_threads_change_nothing():
    layer, x = layer_of("offsets", 700, 512, 3, 64), torch.randn(3, 512)
    one = layer(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(layer(x), one)
    finally:
        torch.set_num_threads(1)


@needs_operations
def test_words_of_another_width_are_refused():
    layer = QuantLinear(64, 8, bits=4, group_size=32)
    layer.words = layer.words[:, :-1]
    with pytest.raises(LayerError, match=r"need int32 \(N, 8\)"):
        layer(torch.zeros(1, 64))


def test_a_machine_without_a_compiler_is_named_once(monkeypatch):
    monkeypatch.setattr(native, "_usable", None)
    monkeypatch.setattr(native, "_COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    layer, x = QuantLinear(64, 8, bits=4, group_size=32), torch.zeros(1, 64)
    with pytest.warns(
        CompileWarning, match="no-such-compiler is on the path.*Install a C\\+\\+ compiler"
    ):
        layer(x)
    layer(x)  # warnings are errors here
    assert not native.usable()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_usable", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")

    def fails(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="operations.cpp: no such header")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.warns(CompileWarning, match="no such header"):
        assert not native.usable()
    assert list((tmp_path / "tsq_layers" / "native").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(native, "_usable", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(
        CompileWarning, match="Let XDG_CACHE_HOME name a directory that can be written"
    ):
        assert not native.usable()


def test_a_compiler_may_have_arguments(monkeypatch, tmp_path):
    commands = []

    def compiled(command, **_):
        commands.append(command)
        Path(command[command.index("-o") + 1]).touch()

    monkeypatch.setenv("CXX", "ccache 'my g++' -m64")
    monkeypatch.setattr(subprocess, "run", compiled)
    assert native._built(tmp_path).exists()
    assert commands[0][:3] == ["ccache", "my g++", "-m64"]


def test_a_damaged_library_is_built_again(monkeypatch, tmp_path):
    loaded, made = [], []

    def load(path):
        loaded.append(path)
        if len(loaded) == 1:
            raise OSError("file too short")

    def built(folder):
        library = folder / "library.so"
        if not library.exists():
            made.append(library)
            library.touch()
        return library

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_built", built)
    monkeypatch.setattr(torch.ops, "load_library", load)
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)
    assert native._load()
    assert (len(loaded), len(made)) == (2, 2)


@needs_operations
def test_warmup_names_every_packed_layer():
    model = nn.Sequential(
        layer_of("offsets", 8, 64, 4, 32), nn.ReLU(), layer_of("row tables", 8, 8, 2, 8)
    )
    assert list(tsq.warmup(model)) == ["build", "0", "2"]
    assert list(tsq.warmup(model.to("meta"))) == []
    assert kernels.native is native
