"""Column scales in the norm before: the same outputs, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import ConfigError, LayerError

SCALED = tsq.QuantConfig(bits=3, group_size=8, channel_scaling=True)


def inputs(columns=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(400, columns, generator=generator)


class Block(nn.Module):
    """A norm that two layers read."""

    def __init__(self, norm, other=None):
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.other = norm, other
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 24)

    def forward(self, x):
        x = self.norm(x)
        return torch.cat([self.a(x), self.b(x if self.other is None else self.other(x))], -1)


def uneven(norm):
    with torch.no_grad():
        for values in norm.parameters():
            values.copy_(torch.exp(torch.linspace(-2, 2, 16)))
    return norm


class Shifted(nn.Module):
    """One and the weight, as Gemma has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return nn.functional.rms_norm(x, (16,)) * (1 + self.weight)


def quantised(model, config=SCALED):
    return tsq.quantize(model, config, [inputs(seed=seed) for seed in range(2)])


NORMS = {
    "LayerNorm": nn.LayerNorm,
    "without bias": lambda n: nn.LayerNorm(n, bias=False),
    "RMSNorm": nn.RMSNorm,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("rotation", [None, 8])
@pytest.mark.parametrize("patterns", [["[ab]"], ["a", "b"]])
def test_outputs_are_the_same(norm, rotation, patterns):
    config = tsq.QuantConfig(bits=3, group_size=8, channel_scaling=True, rotation=rotation)
    model = quantised(Block(uneven(norm(16))), config)
    assert not torch.allclose(model.a.basis.scaling, torch.ones(16))
    x = inputs(seed=5)
    before, was = model(x), copy.deepcopy(model.norm)
    assert tsq.fold_scaling(model, dict.fromkeys(patterns, "norm")) is model
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.norm(x), was(x))
    for layer in (model.a, model.b):
        assert layer.column_scale_bits is None
        assert (layer.basis is None) == (rotation is None)
        assert "channel_scaling" not in repr(layer)


def test_that_check_fails_if_only_the_layers_change():
    model, x = quantised(Block(uneven(nn.LayerNorm(16)))), inputs(seed=5)
    before = model(x)
    model.a.drop_scaling()
    assert (model(x) - before).abs().max() > 0.1


def test_folded_model_is_saved(tmp_path):
    model = tsq.fold_scaling(quantised(Block(uneven(nn.LayerNorm(16)))), {"*": "norm"})
    tsq.save(model, tmp_path)
    again = tsq.load(tmp_path, Block(nn.LayerNorm(16)))
    assert torch.equal(again(inputs()), model(inputs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_llama(dtype):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    torch.manual_seed(0)
    model = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
        .eval()
        .to(dtype)
    )
    for name, values in model.named_parameters():
        if name.endswith("norm.weight"):
            values.data = torch.exp(torch.randn(32)).to(dtype)
    ids = torch.randint(0, 64, (20, 48))
    model = tsq.quantize(model, SCALED, [{"input_ids": ids}])
    before = model(ids).logits
    norms = {}
    for index in range(2):
        layer = f"model.layers.{index}"
        norms[f"{layer}.self_attn.[qkv]_proj"] = f"{layer}.input_layernorm"
        norms[f"re:model.layers.{index}.mlp.(gate|up)_proj"] = f"{layer}.post_attention_layernorm"
    tsq.fold_scaling(model, norms)
    scaled = [
        name for name, module in model.named_modules() if getattr(module, "basis", None) is not None
    ]
    assert {name.rpartition(".")[2] for name in scaled} == {"o_proj", "down_proj"}
    difference = (model(ids).logits - before).float().norm() / before.float().norm()
    assert difference < (1e-5 if dtype == torch.float32 else 0.05)


# --- what is refused -----------------------------------------------------------------------------


def refused(model, norms, error, message):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        tsq.fold_scaling(model, norms)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before.keys() == after.keys()


def test_layers_with_different_scales_are_named():
    config = tsq.QuantConfig(
        bits=3, group_size=8, channel_scaling=True, overrides={"b": {"bits": 4, "group_size": 4}}
    )
    model = quantised(Block(uneven(nn.LayerNorm(16))), config)
    model.b.column_scale_bits = (model.b.basis.scaling * 1.5).view(torch.int32)
    refused(
        model,
        {"[ab]": "norm"},
        LayerError,
        "'a' and 'b' have different column scales.* every layer that reads",
    )


def test_layer_without_scales_is_named():
    config = tsq.QuantConfig(
        bits=3, group_size=8, channel_scaling=True, overrides={"b": {"channel_scaling": False}}
    )
    refused(
        quantised(Block(nn.LayerNorm(16)), config),
        {"[ab]": "norm"},
        LayerError,
        "'b' has no column scales to fold",
    )


def test_norm_of_another_form_is_told_and_left_as_it_was():
    model = quantised(Block(uneven(Shifted())))
    refused(
        model, {"*": "norm"}, LayerError, "'norm', a Shifted, is not proportional to its weight"
    )


@pytest.mark.parametrize("norm", ["a", ""])
def test_modules_that_are_no_norms_are_told(norm):
    refused(
        quantised(Block(nn.LayerNorm(16))),
        {"*": norm},
        LayerError,
        "scales can be folded into a norm",
    )


def test_norm_of_another_width_is_told():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8))
    model = tsq.quantize(model, SCALED, [inputs(8)])
    refused(
        model,
        {"2": "0"},
        LayerError,
        r"'0' is a LayerNorm with parameters of shapes \[\(8,\), \(8,\)\]",
    )


def test_names_that_are_not_there_are_told():
    model = quantised(Block(nn.LayerNorm(16)))
    refused(model, {"c": "norm"}, ConfigError, "pattern 'c' matches none of the 2 quantised layers")
    refused(model, {"a": "norms"}, ConfigError, "'norms' is no module of this Block")


def test_one_bad_norm_leaves_all_as_they_were():
    model = nn.ModuleDict({"x": Block(nn.LayerNorm(16)), "y": Block(Shifted())})
    model["x"], model["y"] = quantised(model["x"]), quantised(model["y"])
    refused(model, {"x.[ab]": "x.norm", "y.[ab]": "y.norm"}, LayerError, "'y.norm', a Shifted")
