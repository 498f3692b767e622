"""LoRA adapters of PEFT on packed layers."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import tsq_layers as tsq
from tsq_layers.errors import ConfigError, StateError
from tsq_layers.integrations.peft import LoraQuantLinear, add_lora, knowing_packed_layers, load_lora
from tsq_layers.runtime.linear import QuantLinear

# PEFT 0.21 asks transformers for something under its old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IDS = torch.arange(16).reshape(2, 8) * 5 % 48
TARGETS = ["q_proj", "v_proj", "down_proj"]


def quantised(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = tsq.QuantConfig(**{"method": "rtn", "bits": 2, "group_size": 32, **changes})
    return tsq.quantize(LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), config)


def adapted(model: Any = None, **changes: Any) -> Any:
    model = quantised() if model is None else model
    torch.manual_seed(1)
    config = LoraConfig(
        **{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **changes}
    )
    return add_lora(model, config)


def packed(model: Any) -> dict[str, torch.Tensor]:
    """Copies of everything that is packed."""
    return {
        f"{name}.{local}": buffer.clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for local, buffer in module.named_buffers()
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_only_adapters_are_trained_and_packed_weights_stay() -> None:
    model = adapted()
    before = packed(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    after = packed(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_gradients_are_those_of_the_dequantised_layer() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 32)
    layer = tsq.quantize(
        torch.nn.Sequential(plain), tsq.QuantConfig(method="rtn", bits=3, group_size=32)
    )
    adapter = adapted(layer, target_modules=["0"]).base_model.model[0]
    x = torch.randn(40, 64, requires_grad=True)
    adapter(x).square().sum().backward()
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    own = x.detach().double().requires_grad_()
    a2, b2 = (w.detach().double().requires_grad_() for w in (a, b))
    y = own @ layer[0].base_layer.weight.double().T + plain.bias.double() + 2 * (own @ a2.T) @ b2.T
    y.square().sum().backward()
    for found, expected in [(x.grad, own.grad), (a.grad, a2.grad), (b.grad, b2.grad)]:
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_nothing_as_large_as_a_weight_is_kept_for_the_gradient() -> None:
    """Beside the packed weights a training step holds activations and adapters, no float copy of a weight."""
    model, kept = adapted(), []
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(IDS, labels=IDS).loss
    floats = [
        tensor for tensor in kept if tensor.is_floating_point() and tensor.data_ptr() not in own
    ]
    smallest = min(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear)
    )
    assert floats
    assert max(tensor.numel() for tensor in floats) < smallest
    loss.backward()
    packed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in packed(model).values())
    assert packed_bytes * 8 < 5 * sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear)
    )


def test_adapters_are_saved_alone_and_come_back(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = load_lora(quantised(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(quantised()))
    assert not any(p.requires_grad for p in again.parameters())
    assert any(
        p.requires_grad for p in load_lora(quantised(), tmp_path, is_trainable=True).parameters()
    )


def test_quantised_model_from_pretrained_takes_adapters(tmp_path: Path) -> None:
    import tsq_layers.integrations.transformers  # noqa: F401

    quantised().save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(adapted(base)), logits(adapted()))


def test_own_adapters_of_transformers_are_saved_without_the_base(tmp_path: Path) -> None:
    model = quantised()
    model.add_adapter(
        knowing_packed_layers(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    )
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_merging_is_refused_with_what_to_do() -> None:
    model = adapted()
    before = packed(model)
    with pytest.raises(StateError, match="cannot be merged into packed weights: keep them beside"):
        model.merge_and_unload()
    with pytest.raises(StateError, match="cannot be merged"):
        model.merge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in packed(model).items())


def test_merging_is_refused_before_anything_is_merged() -> None:
    model = adapted(
        quantised(skip=("lm_head", "*.q_proj"))
    )  # PEFT would merge the float layers first
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(StateError, match="cannot be merged"):
            merge()
    assert torch.equal(logits(model), before)
    assert sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()) == 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "'lm_head' is packed, and would be trained"),
        (
            {"modules_to_save": ["embed_tokens"]},
            "'model.embed_tokens' is packed, and would be trained",
        ),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "'lm_head' is the very packed matrix of 'model.embed_tokens'",
        ),
        (
            {"trainable_token_indices": [3, 5]},
            "'lm_head' is the very packed matrix of 'model.embed_tokens'",
        ),
    ],
    ids=["head", "table", "tied head", "tokens"],
)
def test_what_would_silently_not_be_trained_is_refused(
    changes: dict[str, Any], reason: str
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    model = tsq.quantize(
        model, tsq.QuantConfig(method="rtn", bits=4, group_size=32, skip=(), embeddings=True)
    )
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=reason):
        adapted(model, **changes)
    assert [name for name, _ in model.named_modules()] == before


def test_a_packed_head_of_a_classifier_is_refused() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(**SIZES, num_labels=32, pad_token_id=0)
    ).eval()
    model = tsq.quantize(model, tsq.QuantConfig(method="rtn", bits=4, group_size=32))
    with pytest.raises(
        ConfigError, match="'score' is packed.*task_type=.*SEQ_CLS.*with it in skip"
    ):
        adapted(model, task_type="SEQ_CLS")


def test_unloading_gives_the_quantised_model_back() -> None:
    assert torch.equal(logits(adapted().unload()), logits(quantised()))


def test_adapter_can_be_switched_off() -> None:
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(quantised()))
    assert not torch.equal(logits(model), logits(quantised()))


def test_embedding_takes_an_adapter_and_is_not_merged() -> None:
    model = adapted(quantised(embeddings=True), target_modules=["embed_tokens"])
    assert not torch.equal(logits(model), logits(quantised(embeddings=True)))
    with pytest.raises(StateError, match="cannot be merged"):
        model.merge_and_unload()


def test_conv1d_of_gpt2() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=64, n_layer=1, n_head=2, n_positions=16)
    ).eval()
    base = tsq.quantize(base, tsq.QuantConfig(method="rtn", bits=4, group_size=32))
    plain = logits(base)
    model = adapted(base, target_modules=["c_attn"])
    assert isinstance(model.base_model.model.transformer.h[0].attn.c_attn, LoraQuantLinear)
    assert not torch.equal(logits(model), plain)


def test_all_linear_means_packed_layers_too() -> None:
    model = adapted(quantised(skip=("lm_head", "*.o_proj")), target_modules="all-linear")
    wrapped = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert wrapped == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_what_would_change_packed_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="init_lora_weights='olora' changes the weights"):
        adapted(init_lora_weights="olora")


def test_given_config_is_not_changed() -> None:
    config = LoraConfig(r=4, target_modules="all-linear")
    add_lora(quantised(), config)
    assert config.target_modules == "all-linear"
    assert config._custom_modules is None


def test_without_this_module_peft_refuses_packed_layers() -> None:
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(quantised(), LoraConfig(r=4, target_modules=TARGETS))


def test_half_precision_computes_and_trains(tmp_path: Path) -> None:
    model = adapted(quantised().to(torch.bfloat16))
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    model.save_pretrained(tmp_path)
    assert isinstance(load_lora(quantised().to(torch.bfloat16), tmp_path), PeftModel)
