"""Inputs in 8 bits: what is stored of them, gradients, integers against floats, and what calibration sees."""

import copy

import pytest
import torch
from grid_kinds import KINDS, made
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import LayerError
from tsq_layers.numerics import activations
from tsq_layers.observer import HessianObserver
from tsq_layers.passes.batches import with_input
from tsq_layers.runtime import forward as running
from tsq_layers.runtime import route as routes
from tsq_layers.runtime.environment import environment_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def slow(x):
    """x̂ of every token, one by one, in float64; ties to even."""
    rounded = []
    for token in x.double().reshape(-1, x.shape[-1]):
        scale = float(token.abs().max()) / 127 or 1.0
        rounded.append(
            torch.tensor(
                [scale * round(float(value) / scale) for value in token], dtype=torch.float64
            )
        )
    return torch.stack(rounded).view(x.shape)


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_is_rounded_by_its_own_scale(dtype):
    x = (torch.randn(3, 4, 20) * torch.tensor([1e-3, 1, 30, 100]).view(1, 4, 1)).to(dtype)
    codes, scales = activations.quantize_rows(x)
    assert (codes.dtype, scales.shape) == (torch.int8, (3, 4, 1))
    assert int(codes.abs().max()) == 127
    working = codes.to(scales.dtype) * scales
    if dtype.itemsize > 2:  # half precision has ties, which a rounded scale breaks
        torch.testing.assert_close(working.double(), slow(x), rtol=1e-5, atol=1e-8)
    assert torch.equal(activations.fake_quantized(x), working.to(dtype))
    assert ((working - x).abs() <= scales * 0.5001).all()


def test_zeros_stay_zeros():
    assert not activations.fake_quantized(torch.zeros(2, 5)).any()


def test_gradients_pass_straight_through():
    x = torch.randn(3, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad((activations.fake_quantized(x) * torch.arange(8.0)).sum(), x)
    assert torch.equal(gradient, torch.arange(8.0).expand(3, 8))


# --- the layer -----------------------------------------------------------------------------------


def layer_of(*, bits=8, symmetric=False, group_size=None, rows=16, columns=64, bias=True):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    config = tsq.QuantConfig(method="rtn", bits=bits, group_size=group_size, symmetric=symmetric)
    found = tsq.TwoStageGroupQuantizer(weight, None, config).run().weight
    return tsq.QuantLinear.from_quantized(
        found, torch.randn(rows) if bias else None, activation_bits=8
    )


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("group_size", [None, 16])
def test_layer_multiplies_rounded_inputs(rows, group_size):
    layer, x = layer_of(group_size=group_size), torch.randn(2, rows, 64)
    expected = nn.functional.linear(slow(x), layer.dequantize(torch.float64), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert (layer(x) - nn.functional.linear(x, layer.weight, layer.bias)).abs().max() > 1e-3


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:3])
def test_integers_and_floats_agree(bits, symmetric, dtype, monkeypatch):
    layer, x = layer_of(bits=bits, symmetric=symmetric).to(dtype), torch.randn(3, 20, 64).to(dtype)
    with torch.no_grad():
        emulated = layer(x)
        monkeypatch.setattr(running, "route", lambda *args: "integers")
        found = layer(x)
    assert (found.dtype, found.shape) == (dtype, emulated.shape)
    torch.testing.assert_close(
        found, emulated, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1})
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_exact_at_their_limits(symmetric):
    layer = layer_of(symmetric=symmetric, columns=4096, bias=False)
    layer.words.fill_(-1)  # all codes are the largest
    x = torch.full((17, 4096), 3.0)
    found = running.integer_product(x, None, layer.parts, layer.format)
    expected = (x.double() @ layer.dequantize(torch.float64).T).float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_integers_are_not_used_where_they_do_not_pay_or_fit(monkeypatch):
    assert routes.has_integer_product(torch.device("cpu"))
    monkeypatch.setattr(routes, "has_integer_product", lambda device: True)

    class Elsewhere:
        device, dtype, requires_grad = torch.device("meta"), torch.float32, False

        def __init__(self, rows=64):
            self.shape = (rows, 64)

    def pays(x, **options):
        layer = layer_of(**options)
        way = routes.route(x, layer.parts, layer.format, environment_of(x))
        return way == "integers"

    with torch.no_grad():
        assert pays(Elsewhere())
        assert not pays(torch.randn(64, 64))
        assert not pays(Elsewhere(8))
        assert not pays(Elsewhere(), group_size=32)
        assert not pays(Elsewhere(), rows=12)
        for kind in KINDS:
            layer = tsq.QuantLinear.from_quantized(made(kind, 16, 64, 4, 64), activation_bits=8)
            x = Elsewhere()
            assert routes.route(x, layer.parts, layer.format, environment_of(x)) != "integers"


def test_gradients_flow_through_the_layer():
    layer, x = layer_of(), torch.randn(20, 64, requires_grad=True)
    to_x, to_bias = torch.autograd.grad(layer(x).sum(), [x, layer.bias])
    torch.testing.assert_close(to_x, layer.weight.sum(0).expand(20, 64))
    assert torch.equal(to_bias, torch.full((16,), 20.0))


@pytest.mark.parametrize("bits", [4, 16, 0])
def test_other_widths_are_refused(bits):
    with pytest.raises(LayerError, match="activation_bits"):
        tsq.QuantLinear(8, 8, bits=4, group_size=8, activation_bits=bits)


# --- calibration ---------------------------------------------------------------------------------


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 24))


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(800, 40, generator=generator) for _ in range(count)]


@pytest.fixture
def seen(monkeypatch):
    """What observers are given: x and its reference, in the order of layers and batches."""
    calls = []
    original = HessianObserver.observe

    def observe(self, x, reference=None, mask=None, weights=None):
        calls.append((x, reference))
        return original(self, x, reference, mask, weights)

    monkeypatch.setattr(HessianObserver, "observe", observe)
    return calls


@pytest.mark.parametrize("rotation", [None, 8])
@pytest.mark.parametrize("scaling", [False, True])
def test_statistics_are_of_rounded_inputs_beside_plain_ones(seen, rotation, scaling):
    original, data = net(), batches()
    config = tsq.QuantConfig(
        bits=4,
        group_size=8,
        activation_bits=8,
        rotation=rotation,
        channel_scaling=scaling,
        deviation_strength=1.0,
    )
    model = tsq.quantize(copy.deepcopy(original), config, data)
    first, second = seen[:3], seen[3:]
    with torch.no_grad():
        for batch, (x, reference) in zip(data, first, strict=True):
            assert torch.equal(reference, batch)
            assert 0 < (x - batch).norm() < 0.02 * batch.norm()
            if rotation is None:
                torch.testing.assert_close(x.double(), slow(batch), rtol=1e-4, atol=1e-5)
        for batch, (x, reference) in zip(data, second, strict=True):
            assert torch.equal(reference, original[:2](batch))
            plain = model[:2](batch)  # the stream is what the quantised model computes
            assert (x - plain).norm() < 0.02 * plain.norm()
            if rotation is None:
                torch.testing.assert_close(x.double(), slow(plain), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rotation", [None, 8])
def test_the_quantised_stream_runs_what_the_layer_will(rotation):
    outputs = []
    config = tsq.QuantConfig(
        bits=4,
        group_size=8,
        activation_bits=8,
        rotation=rotation,
        channel_scaling=True,
        overrides={"3": {"bits": 8}},
    )
    original = nn.Sequential(*net(), nn.Linear(24, 8))
    model = tsq.prepare(copy.deepcopy(original), config)
    handle = model[2].register_forward_hook(
        lambda module, args, output: outputs.append(output.clone())
    )
    tsq.calibrate(model, batches(1))
    handle.remove()
    model = tsq.convert(model)
    with torch.no_grad():
        expected = model[:3](batches(1)[0])
        torch.testing.assert_close(
            outputs[1], expected, rtol=1e-4, atol=0.02
        )  # a tie may go the other way
        model[0].activation_bits = model[2].activation_bits = None
        assert (model[:3](batches(1)[0]) - outputs[1]).norm() > 2 * (expected - outputs[1]).norm()


def test_without_a_reference_rounding_still_is_a_deviation(seen):
    config = tsq.QuantConfig(bits=4, group_size=8, activation_bits=8)
    tsq.quantize(net(), config, batches(1))
    x, reference = seen[0]
    assert (x - reference).norm() > 0


def test_a_loop_of_ones_own_sees_rounded_inputs(seen):
    model = tsq.prepare(net(), tsq.QuantConfig(bits=4, group_size=8, activation_bits=8))
    model(batches(1)[0])
    torch.testing.assert_close(seen[0][0].double(), slow(batches(1)[0]), rtol=1e-4, atol=1e-5)
    assert tsq.convert(model)[0].activation_bits == 8


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(40, 16), nn.Linear(40, 8)

    def forward(self, x):
        return torch.cat([self.a(input=x), self.b(x)], -1)


def test_layers_with_one_input_share_statistics_only_if_they_round_it_alike(seen):
    config = tsq.QuantConfig(
        group_size=8, activation_bits=8, overrides={"b": {"activation_bits": None}}
    )
    model = tsq.quantize(Shared(), config, batches(1))
    assert [layer.shared_with for layer in model.tsq_report.layers] == [(), ()]
    assert (model.a.activation_bits, model.b.activation_bits) == (8, None)
    assert torch.equal(seen[1][0], batches(1)[0])
    seen.clear()
    tsq.quantize(Shared(), tsq.QuantConfig(group_size=8, activation_bits=8), batches(1))
    assert len(seen) == 1


def test_the_first_tensor_of_a_call_is_changed():
    x, y = torch.ones(2), torch.zeros(2)
    args, kwargs = with_input(lambda x: x + 1, (None, x), {"y": y})
    assert args[0] is None
    assert torch.equal(args[1], x + 1)
    assert kwargs["y"] is y


def test_convolutions_are_refused_with_the_cure():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Linear(8, 8))
    with pytest.raises(
        LayerError, match=r"0: inputs of a Conv1d .* overrides=\{'0': \{'activation_bits': None\}\}"
    ):
        tsq.prepare(model, tsq.QuantConfig(activation_bits=8))
    tsq.prepare(
        model, tsq.QuantConfig(activation_bits=8, overrides={"0": {"activation_bits": None}})
    )


def test_all_convolutions_are_named_at_once():
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(8, 8), nn.Conv1d(8, 4, 1)
    )
    with pytest.raises(LayerError, match="0: inputs of a Conv1d .*; and so for 2 more: 1, 3$"):
        tsq.prepare(model, tsq.QuantConfig(activation_bits=8))


def test_tables_are_left_as_they_are():
    model = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 8))
    config = tsq.QuantConfig(group_size=8, activation_bits=8, embeddings=True)
    model = tsq.quantize(model, config, [torch.randint(0, 30, (20, 20))])
    assert (model[0].matrix.activation_bits, model[1].activation_bits) == (None, 8)
