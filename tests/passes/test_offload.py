"""Parked activations: memory is given back while a pass waits, and everything is there again when it goes on."""

import contextlib

import pytest
import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.calibration import run as calibration
from tsq_layers.passes import offload as module
from tsq_layers.passes.offload import ActivationOffload

CONFIG = tsq.QuantConfig(bits=3, group_size=16, skip=())


@pytest.fixture
def anywhere(monkeypatch):
    """Offload although all is on the CPU, and however small."""
    monkeypatch.setattr(module, "_SMALLEST", 1)
    made = ActivationOffload.__init__

    def elsewhere(self, device, model):
        made(self, device, model)
        self.device = Elsewhere()

    class Elsewhere:
        """Equal to no device; copies stay on the CPU."""

    monkeypatch.setattr(ActivationOffload, "__init__", elsewhere)
    move_away = module._Storage.move_away
    monkeypatch.setattr(
        module._Storage, "move_away", lambda self, _: move_away(self, torch.device("cpu"))
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 8)
        self.register_buffer("shift", torch.randn(16))
        self.cache = {"scale": torch.randn(16)}

    def forward(self, x, record=None):
        shift, scale = self.shift, self.cache["scale"]
        residual, both = x * scale, (x + shift, [x - shift])
        x = residual + self.b(torch.relu(self.a(residual)))
        return self.c(x * both[0] + both[1][0])


def net():
    torch.manual_seed(0)
    return Residual()


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(128, 16, generator=generator) for _ in range(4)]


def weights(model):
    return dict(model.state_dict())


def test_offloaded_calibration_gives_the_very_same_weights(anywhere):
    plain = tsq.quantize(net(), CONFIG, data(), held_out=data()[:1])
    offloaded = tsq.quantize(net(), CONFIG, data(), held_out=data()[:1], offload="cpu")
    assert all(
        torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(offloaded).items()
    )


def test_waiting_passes_hold_no_memory_but_the_models_and_the_batches(anywhere, monkeypatch):
    model, batches, left = net(), data(), []
    own = {
        tensor.untyped_storage()._cdata for tensor in [model.shift, model.cache["scale"], *batches]
    }
    visit = calibration.Calibration._visit

    def looked_at(self, name, arrivals):
        left.append([arrival.input.untyped_storage().nbytes() for arrival in arrivals])
        return visit(self, name, arrivals)

    monkeypatch.setattr(calibration.Calibration, "_visit", looked_at)
    tsq.quantize(model, CONFIG, batches, offload="cpu")
    assert len(left) == 3
    assert all(size == 0 for sizes in left for size in sizes)
    assert len(own) == 6
    assert all(tensor.untyped_storage().nbytes() for tensor in [model.shift, model.cache["scale"]])
    assert all(torch.equal(one, other) for one, other in zip(batches, data(), strict=True))


def test_nothing_is_offloaded_where_it_is_already():
    model, seen = net(), []
    offload = ActivationOffload("cpu", model)
    model.b.register_forward_pre_hook(
        lambda _, args: (offload.store(0, None)(), seen.append(args[0].clone()), None)[2]
    )
    model(data()[0])
    assert offload._storages == {}
    assert seen[0].abs().sum() > 0


def test_an_aborted_pass_gets_its_memory_back(anywhere):
    model, batches = net(), data()
    model.c.register_forward_pre_hook(lambda *_: 1 / 0)
    tsq.prepare(model, CONFIG)
    with pytest.raises(ZeroDivisionError):
        tsq.calibrate(model, batches, offload="cpu")
    assert all(torch.equal(one, other) for one, other in zip(batches, data(), strict=True))


def test_locals_are_found_in_containers_and_in_all_frames():
    def inner(x):
        pair = (x + 1, {"deep": [x + 2]})
        number = 3
        found = {tensor.item() for tensor in module._locals(__import__("sys")._getframe())}
        return found, pair, number

    def outer():
        mine = torch.tensor(10.0)
        return inner(torch.tensor(0.0)), mine

    (found, _, _), _ = outer()
    assert {0.0, 1.0, 2.0, 10.0} <= found


def test_reading_locals_keeps_nothing_alive():
    import weakref

    tensor = torch.ones(3)
    gone = weakref.ref(tensor)
    list(module._locals(__import__("sys")._getframe()))
    del tensor
    with contextlib.suppress(NameError):
        assert gone() is None
