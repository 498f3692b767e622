"""Models whose weights accelerate keeps elsewhere: calibrated, converted and run like others."""

import copy

import pytest
import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import LayerError
from tsq_layers.layers.offloading import entry_device, is_offloaded

accelerate = pytest.importorskip("accelerate")

CONFIG = tsq.QuantConfig(bits=3, group_size=16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(self.norm(torch.relu(self.up(x))))
        return self.conv(x.transpose(1, 2))


def net():
    torch.manual_seed(0)
    return Net().eval()


def offloaded():
    return accelerate.cpu_offload(net(), execution_device=torch.device("cpu"))


def on_disk(folder):
    return accelerate.disk_offload(net(), offload_dir=folder, execution_device=torch.device("cpu"))


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (16, 32), generator=generator) for _ in range(3)]


def weights(model):
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "words" in name or "bits" in name
    }


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_offloaded_model_gets_the_very_same_weights(place, tmp_path):
    plain = tsq.quantize(net(), CONFIG, data())
    model = offloaded() if place == "memory" else on_disk(tmp_path / "offload")
    assert is_offloaded(model.up)
    model = tsq.quantize(model, CONFIG, data())
    assert [entry.name for entry in model.tsq_report.quantized] == ["up", "down", "conv"]
    assert len(weights(plain)) == 9
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(model).items())
    with torch.no_grad():
        assert torch.equal(model(data()[0]), plain(data()[0]))


def test_offloaded_model_is_as_before_after_unprepare_and_after_an_exception():
    model = offloaded()
    with torch.no_grad():
        before = model(data()[0])
    tsq.unprepare(tsq.prepare(model, CONFIG))
    tsq.prepare(model, CONFIG)
    model.conv.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tsq.calibrate(model, data())
    tsq.unprepare(model)
    model.conv._forward_pre_hooks.clear()
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(data()[0]), before)


def test_one_pass_form_works_offloaded():
    plain, model = tsq.prepare(net(), CONFIG), tsq.prepare(offloaded(), CONFIG)
    with torch.no_grad():
        for batch in data():
            plain(batch), model(batch)
    plain, model = tsq.convert(plain), tsq.convert(model)
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(model).items())


def test_calibration_of_an_offloaded_model_can_be_resumed(tmp_path):
    expected = tsq.quantize(offloaded(), CONFIG, data(), checkpoint_dir=tmp_path)
    again = tsq.quantize(offloaded(), CONFIG, data(), checkpoint_dir=tmp_path)
    assert all(
        torch.equal(tensor, weights(expected)[name]) for name, tensor in weights(again).items()
    )


def test_meta_weights_that_nobody_brings_are_refused():
    with pytest.raises(
        LayerError, match="up: its weight is on the meta device and has no values; load the weights"
    ):
        tsq.prepare(net().to("meta"), CONFIG)


def test_entry_device_is_the_execution_device_or_that_of_the_parameters():
    assert entry_device(offloaded()) is None  # its hooks move its inputs
    assert entry_device(offloaded().up) == torch.device("cpu")
    assert entry_device(net()) == torch.device("cpu")
    assert entry_device(nn.ReLU()) is None
    assert entry_device(copy.deepcopy(net()).to("meta")) is None


def test_device_map_of_transformers_is_calibrated(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    ids = [torch.randint(64, (8, 64)) for _ in range(2)]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    batches = [{"input_ids": part} for part in ids]
    plain, model = tsq.quantize(plain, CONFIG, batches), tsq.quantize(model, CONFIG, batches)
    assert len(weights(plain)) == 42
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(model).items())
    with torch.no_grad():
        assert torch.equal(model(ids[0]).logits, plain(ids[0]).logits)
