"""Subclasses of convolutions that do something around ``super().forward`` are quantised as what they call."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tsq_layers as tsq
from tsq_layers.layers import composite_of, kind_of
from tsq_layers.layers.convolution import QuantConv

CONFIG = tsq.QuantConfig(bits=4, group_size=12)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Causal(nn.Conv1d):
    """With what went before, or zeros, on the left."""

    @property
    def missing(self):
        return self.dilation[0] * (self.kernel_size[0] - 1)

    def forward(self, x, before=None):
        if before is None:
            x = F.pad(x.to(self.weight.dtype), (self.missing, 0))
        else:
            x = torch.cat([before, x], -1)
        return super().forward(x)


class Halved(Causal):
    """Two steps away from torch's class, which it calls twice."""

    def forward(self, x):
        return sum(super(Halved, self).forward(part) for part in (x / 2, x / 2))


def network(kind=Causal, **options):
    return nn.Sequential(kind(4, 12, 3, **options), nn.ReLU(), nn.Conv1d(12, 4, 1))


def waves(count=256):
    return torch.randn(count, 4, 20)


@pytest.mark.parametrize("options", [{}, {"groups": 2, "bias": False}, {"dilation": 2}], ids=str)
@pytest.mark.parametrize("kind", [Causal, Halved])
def test_it_is_quantised_saved_loaded_and_put_back(kind, options, tmp_path):
    model, x = network(kind, **options), waves()
    expected, keys, first = model(x).detach(), list(model.state_dict()), model[0]
    assert torch.equal(tsq.prepare(model, CONFIG)(x), expected)
    tsq.unprepare(model)
    assert model[0] is first
    assert list(model.state_dict()) == keys
    fresh = copy.deepcopy(model)
    model = tsq.quantize(model, CONFIG, [x])
    found = model(x)
    assert isinstance(model[0], kind)
    assert isinstance(model[0].convolution, QuantConv)
    assert [layer.name for layer in model.tsq_report.quantized] == ["0.convolution", "2"]
    assert 0 < (found - expected).norm() < 0.15 * expected.norm()
    tsq.save(model, tmp_path)
    for other in (tsq.load(tmp_path, fresh), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), found)


def test_what_reaches_the_convolution_is_what_counts():
    model, x = network(), waves()
    plain = nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(4, 12, 3), nn.ReLU(), copy.deepcopy(model[2]))
    plain[1].load_state_dict(model[0].state_dict())
    model, plain = tsq.quantize(model, CONFIG, [x]), tsq.quantize(plain, CONFIG, [x])
    assert torch.equal(model[0].weight, plain[1].weight)
    assert torch.equal(model(x), plain(x))


def test_other_arguments_go_on_to_its_own_forward():
    layer = tsq.quantize(nn.Sequential(Causal(4, 12, 3)), CONFIG, [waves()])[0]
    x = waves(2)
    whole = layer(x)
    torch.testing.assert_close(layer(x[..., 10:], before=x[..., 8:10]), whole[..., 10:])


class Standardised(nn.Conv1d):
    def forward(self, x):
        self.weight.data /= self.weight.data.std()
        return super().forward(x)


class Functional(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(F.pad(x, (2, 0)), self.weight, self.bias)


class Scaled(nn.Conv1d):
    def scaled(self, x):
        return x * self.weight.mean()

    def forward(self, x):
        return super().forward(self.scaled(x))


@pytest.mark.parametrize("kind", [Standardised, Functional, Scaled])
def test_whatever_does_something_with_its_weight_stays(kind):
    model = network(kind)
    assert kind_of(model[0]) is composite_of(model[0]) is None
    report = tsq.quantize(model, CONFIG, [waves()]).tsq_report
    weight = next(parameter for parameter in report.parameters if parameter.name == "0.weight")
    assert weight.reason.startswith(f"{kind.__name__} computes something of its own around its weight")


def test_plain_subclasses_and_patched_ones_are_not_opened():
    class Plain(nn.Conv1d):
        pass

    patched = Causal(4, 12, 3)
    patched.forward = lambda x: x
    for module in (Plain(4, 12, 3), patched, nn.Conv1d(4, 12, 3), nn.LazyConv1d(12, 3)):
        assert composite_of(module) is None
