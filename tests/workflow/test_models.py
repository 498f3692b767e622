"""Whole models of transformers, tiny and random: every layer is reached, and the model computes nearly what it did."""

import pytest
import torch
from torch import nn

import tsq_layers as tsq

transformers = pytest.importorskip("transformers")

# Tiny models are calibrated with few tokens.
pytestmark = pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")

CONFIG = tsq.QuantConfig(bits=4, group_size=32)
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **SPECIAL
    )
    return transformers.LlamaForCausalLM(config).eval()


def t5():
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
    }
    config = transformers.T5Config(**sizes, vocab_size=64, decoder_start_token_id=0, **SPECIAL)
    return transformers.T5ForConditionalGeneration(config).eval()


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, initializer_range=0.2, **SPECIAL)
    return transformers.GPT2LMHeadModel(config).eval()


LAYERS = {
    llama: {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in [f"self_attn.{x}_proj" for x in "qkvo"]
        + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    },
    t5: {
        f"{side}.block.{i}.layer.{name}"
        for i in range(2)
        for side, names in {
            "encoder": [f"0.SelfAttention.{x}" for x in "qkvo"]
            + [f"1.DenseReluDense.{x}" for x in ("wi", "wo")],
            "decoder": [f"0.SelfAttention.{x}" for x in "qkvo"]
            + [f"1.EncDecAttention.{x}" for x in "qkvo"]
            + [f"2.DenseReluDense.{x}" for x in ("wi", "wo")],
        }.items()
        for name in names
    },
    gpt2: {
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    },
}


@pytest.fixture(params=[llama, t5, gpt2], ids=lambda make: make.__name__)
def make(request):
    """Makes the same model each time."""

    def made():
        torch.manual_seed(0)
        return request.param()

    made.original = request.param
    return made


def batches(make, count=4):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(2, 64, (8, 16), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(make, "original", make) is t5:
            batch["decoder_input_ids"] = ids[:, :10].flip(1)
        found.append(batch)
    return found


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def distance(value, expected):
    return float((value - expected).norm() / expected.norm())


def test_all_layers_are_quantised(make):
    model = tsq.quantize(make(), CONFIG, batches(make))
    assert {name for name, m in model.named_modules() if isinstance(m, tsq.QuantLinear)} == LAYERS[
        make.original
    ]
    report = model.tsq_report
    assert {layer.name for layer in report.quantized} == LAYERS[make.original]
    assert {layer.kind for layer in report.quantized} == {
        "Conv1D" if make.original is gpt2 else "Linear"
    }
    assert not [layer for layer in report.layers if layer.status == "never called"]
    assert model.config.use_cache is True
    encoder, decoder = 4 * 8 * 16, 4 * 8 * 10
    in_decoder = {layer.name for layer in report.quantized if layer.tokens == decoder}
    assert {layer.tokens for layer in report.quantized} <= {encoder, decoder}
    if make.original is t5:
        from_encoder = {
            f"decoder.block.{i}.layer.1.EncDecAttention.{x}" for i in range(2) for x in "kv"
        }
        assert (
            in_decoder == {name for name in LAYERS[t5] if name.startswith("decoder")} - from_encoder
        )
    else:
        assert not in_decoder


def test_logits_stay_close_and_the_closer_the_more_bits(make):
    """Rounding to 8 bits in groups of 16 changes a weight by 0.2 % of its group's range; a dozen
    layers add up to 2 %.
    """
    data = batches(make)
    before = logits(make(), data[0])
    found = {}
    for bits in (2, 4, 8):
        model = tsq.quantize(make(), CONFIG.changed(bits=bits, group_size=16), data)
        found[bits] = distance(logits(model, data[0]), before)
    assert 0 < found[8] < 0.02
    assert 4 * found[8] < found[4] < 0.4
    assert 2 * found[4] < found[2]


def test_loss_hardly_changes(make):
    batch = batches(make)[0]
    labels = batch["input_ids"][:, : 10 if make.original is t5 else 16].clone()
    with torch.no_grad():
        before = float(make()(**batch, labels=labels).loss)
        model = tsq.quantize(make(), CONFIG.changed(bits=8, group_size=16), batches(make))
        after = float(model(**batch, labels=labels).loss)
    assert after == pytest.approx(before, rel=0.01)
    assert after != before


def test_paired_calibration_brings_the_outputs_closer_than_rounding(make):
    data = batches(make, 12)
    before = logits(make(), data[0])
    found = {}
    for method in ("rtn", "two-stage"):
        model = tsq.quantize(make(), CONFIG.changed(bits=3, method=method), data)
        found[method] = distance(logits(model, data[0]), before)
    assert found["two-stage"] < 0.9 * found["rtn"]


def test_generation_works(make):
    model = tsq.quantize(make(), CONFIG.changed(bits=8, group_size=16), batches(make))
    prompt = {
        key: value[:2] for key, value in batches(make)[0].items() if key != "decoder_input_ids"
    }
    tokens = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert tokens.shape[0] == 2
    assert tokens.shape[1] >= 5
    without_cache = model.generate(
        **prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False
    )
    assert torch.equal(tokens, without_cache)


def test_saved_and_loaded_model_gives_the_same_bits(make, tmp_path):
    data = batches(make)
    model = tsq.quantize(make(), CONFIG, data)
    tsq.save(model, tmp_path / "model")
    loaded = tsq.load(tmp_path / "model", make())
    assert torch.equal(logits(loaded, data[0]), logits(model, data[0]))
    assert loaded.tsq_report == model.tsq_report


def test_layers_with_the_same_input_are_one_stage_across_t5s_decoder():
    torch.manual_seed(0)
    model = tsq.quantize(t5(), CONFIG, batches(t5))
    together = {f"decoder.block.{i}.layer.1.EncDecAttention.{x}" for i in range(2) for x in "kv"}
    shared = {
        layer.name: set(layer.shared_with) | {layer.name} for layer in model.tsq_report.quantized
    }
    for name in together:
        assert shared[name] == together
    assert shared["encoder.block.0.layer.0.SelfAttention.q"] == {
        f"encoder.block.0.layer.0.SelfAttention.{x}" for x in "qkv"
    }


def test_padding_on_the_right_changes_hardly_anything():
    """Rows that are cut short, and the same rows padded with a mask: the model sees the same tokens."""
    torch.manual_seed(0)
    model = llama()
    ids = torch.randint(2, 64, (32, 12))
    mask = torch.ones_like(ids)
    padded = torch.nn.functional.pad(ids, (0, 6), value=1), torch.nn.functional.pad(mask, (0, 6))
    found = []
    for tokens, which in ((ids, mask), padded):
        torch.manual_seed(0)
        model = tsq.quantize(llama(), CONFIG, [{"input_ids": tokens, "attention_mask": which}])
        found.append(model)
        assert {layer.tokens for layer in model.tsq_report.quantized} == {32 * 12}
    one, two = (m.model.layers[1].mlp.down_proj.quantized_weight().codes for m in found)
    assert (one != two).float().mean() < 0.05


class Branching(nn.Module):
    """Tokens go through an expert of their batch's choice; no batch takes the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
        self.down = nn.Linear(32, 32)

    def forward(self, ids, choice):
        x = torch.tanh(self.up(self.embed(ids)))
        for index in choice:
            x = x + torch.tanh(self.experts[index](x))
        return self.down(x)


def test_branches_that_some_batches_take_are_quantised_from_those():
    torch.manual_seed(0)
    model, generator = Branching(), torch.Generator().manual_seed(1)
    choices = [(0,), (1,), (0, 2), (2, 1), ()]
    data = [(torch.randint(64, (40, 16), generator=generator), choice) for choice in choices]
    before = [model(*batch).detach() for batch in data]
    with pytest.warns(tsq.errors.FewTokensWarning, match=r"statistics of all experts: experts\.3;"):
        model = tsq.quantize(model, CONFIG.changed(bits=8, group_size=16), data)
    tokens = {layer.name: layer.tokens for layer in model.tsq_report.quantized}
    assert tokens == {
        "up": 3200,
        "experts.0": 1280,
        "experts.1": 1280,
        "experts.2": 1280,
        "experts.3": 0,
        "down": 3200,
    }
    assert [layer.name for layer in model.tsq_report.layers if layer.status == "fallback"] == [
        "experts.3"
    ]
    for batch, expected in zip(data, before, strict=True):
        assert 0 < distance(model(*batch).detach(), expected) < 0.02
