"""Architectures of transformers, tiny and random, go the whole way, as ``test_architectures_torch.py`` says."""

import re
import sys
from pathlib import Path

import pytest
import torch
from test_architectures_torch import (
    COMPUTED,
    CONFIG,
    NEVER,
    Case,
    check_every_layer_counts,
    distance,
    made,
    output,
    unknown,
    whole_way,
)

import tsq_layers as tsq

transformers = pytest.importorskip("transformers")
sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # benchmarks are scripts beside the package, not installed

from benchmarks import architectures  # noqa: E402

# The data are as tiny as the models.
pytestmark = pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")

V = 96  # tokens of every vocabulary
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES = {**WIDTHS, "vocab_size": V, **SPECIAL}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}


def text(index):
    """Token numbers, padded on the right."""
    ids = torch.randint(2, V, (6, 12), generator=torch.Generator().manual_seed(index))
    mask = torch.ones_like(ids)
    mask[1, 9:] = mask[4, 5:] = 0
    return {"input_ids": ids.where(mask == 1, 1), "attention_mask": mask}


def translation(index):
    return {**text(index), "decoder_input_ids": text(index + 50)["input_ids"][:, :7]}


def images(index):
    return {
        "pixel_values": torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(index))
    }


def captions(index):
    return {**text(index), **images(index)}


def speech(index):
    features = torch.randn(6, 8, 40, generator=torch.Generator().manual_seed(index))
    return {"input_features": features, "decoder_input_ids": text(index)["input_ids"][:, :7]}


def waves(index):
    return {"input_values": torch.randn(4, 320, generator=torch.Generator().manual_seed(index))}


def causal(name, **options):
    """Makes a language model."""
    config, model = (
        getattr(transformers, f"{name}Config"),
        getattr(transformers, f"{name}ForCausalLM"),
    )
    return lambda: model(config(**{**SIZES, **options}))


def masked(name, **options):
    config, model = (
        getattr(transformers, f"{name}Config"),
        getattr(transformers, f"{name}ForMaskedLM"),
    )
    return lambda: model(
        config(**SIZES, num_attention_heads=4, max_position_embeddings=16, **options)
    )


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": V, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **SPECIAL))


def t5():
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
    }
    config = transformers.T5Config(**sizes, vocab_size=V, decoder_start_token_id=0, **SPECIAL)
    return transformers.T5ForConditionalGeneration(config)


def two_sides(name, **options):
    """Makes a model of an encoder and a decoder."""
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    sides = {
        f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in sizes.items()
    }
    config, model = (
        getattr(transformers, f"{name}{end}") for end in ("Config", "ForConditionalGeneration")
    )
    return lambda: model(
        config(d_model=32, vocab_size=V, decoder_start_token_id=0, **sides, **SPECIAL, **options)
    )


def vit():
    config = transformers.ViTConfig(
        **WIDTHS, num_attention_heads=4, image_size=16, patch_size=4, num_labels=10
    )
    return transformers.ViTForImageClassification(config)


def clip():
    language = {"vocab_size": V, "num_attention_heads": 4, "max_position_embeddings": 16, **SPECIAL}
    vision = {"num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    config = transformers.CLIPConfig(
        text_config={**WIDTHS, **language}, vision_config={**WIDTHS, **vision}, projection_dim=24
    )
    return transformers.CLIPModel(config)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SIZES,
        num_attention_heads=4,
        conv_dim=(16, 16),
        conv_kernel=(8, 4),
        conv_stride=(4, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.Wav2Vec2ForCTC(config)


DEEPSEEK = {
    "num_attention_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA2 = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4}
JAMBA = {
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
FALCON = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
}
QWEN_NEXT = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}


def router(place, kind):
    return {f"model.layers.0.{place}.weight": unknown(kind)}


CASES = {
    "llama": Case(causal("Llama", **HEADS), text),
    "qwen2": Case(causal("Qwen2", **HEADS), text),
    "phi3": Case(causal("Phi3", **HEADS), text),
    "gemma2": Case(causal("Gemma2", **HEADS, head_dim=8, sliding_window=4), text),
    "gpt2": Case(gpt2, text),
    "gpt neox": Case(causal("GPTNeoX", num_attention_heads=4), text),
    "falcon": Case(
        causal("Falcon", num_attention_heads=4, new_decoder_architecture=True, num_kv_heads=2), text
    ),
    "bert": Case(masked("Bert"), text),
    "albert": Case(masked("Albert", embedding_size=16), text),
    "t5": Case(t5, translation),
    "bart": Case(two_sides("Bart", max_position_embeddings=16), translation),
    "whisper": Case(
        two_sides("Whisper", num_mel_bins=8, max_source_positions=20, max_target_positions=16),
        speech,
        device="cpu",
    ),
    "wav2vec2": Case(
        wav2vec2,
        waves,
        {"wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0": COMPUTED},
        coverage=0.85,
    ),
    "vit": Case(
        vit,
        images,
        {
            "vit.embeddings.cls_token": unknown("ViTEmbeddings"),
            "vit.embeddings.position_embeddings": unknown("ViTEmbeddings"),
        },
    ),
    "clip": Case(clip, captions),
    "mixtral": Case(
        causal("Mixtral", **HEADS, num_local_experts=4, num_experts_per_tok=2),
        text,
        router("mlp.gate", "MixtralTopKRouter"),
    ),
    "qwen2 moe": Case(
        causal("Qwen2Moe", **HEADS, **EXPERTS), text, router("mlp.gate", "Qwen2MoeTopKRouter")
    ),
    "gpt-oss": Case(
        causal(
            "GptOss",
            **HEADS,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
        ),
        text,
        {
            **router("mlp.router", "GptOssTopKRouter"),
            "model.layers.0.mlp.experts.gate_up_proj_bias": "bias",
            "model.layers.0.mlp.experts.down_proj_bias": "bias",
        },
    ),
    "deepseek v3": Case(
        causal("DeepseekV3", **DEEPSEEK, num_key_value_heads=4),
        text,
        router("mlp.gate", "DeepseekV3TopkRouter"),
    ),
    "mamba": Case(
        causal("Mamba", state_size=4),
        text,
        {
            "backbone.layers.0.mixer.A_log": unknown("MambaMixer"),
            "backbone.layers.0.mixer.conv1d.weight": NEVER,
            "backbone.layers.0.mixer.dt_proj.weight": NEVER,
        },
        never_called=4,
    ),
    "mamba2": Case(
        causal("Mamba2", **MAMBA2),
        text,
        {"backbone.layers.0.mixer.conv1d.weight": NEVER},
        never_called=2,
    ),
    "rwkv": Case(
        causal("Rwkv", attention_hidden_size=32, context_length=16),
        text,
        {
            **{
                f"rwkv.blocks.0.attention.time_mix_{x}": unknown("RwkvSelfAttention")
                for x in ("key", "value", "receptance")
            },
            **{
                f"rwkv.blocks.0.feed_forward.time_mix_{x}": unknown("RwkvFeedForward")
                for x in ("key", "receptance")
            },
        },
    ),
    "recurrent gemma": Case(
        causal(
            "RecurrentGemma", **HEADS, num_hidden_layers=3, lru_width=32, attention_window_size=8
        ),
        text,
        {
            **{
                f"model.layers.0.temporal_block.rg_lru.{x}_gate_weight": unknown(
                    "RecurrentGemmaRglru"
                )
                for x in ("input", "recurrent")
            },
            **{
                f"model.layers.0.temporal_block.rg_lru.{x}_gate_bias": "bias"
                for x in ("input", "recurrent")
            },
        },
    ),
    "jamba": Case(
        causal("Jamba", **HEADS, **JAMBA),
        text,
        {
            "model.layers.0.mamba.A_log": unknown("JambaMambaMixer"),
            "model.layers.0.mamba.conv1d.weight": NEVER,
            "model.layers.0.mamba.dt_proj.weight": NEVER,
            **router("feed_forward.router", "JambaTopKRouter"),
        },
        never_called=2,
    ),
    "falcon h1": Case(
        causal("FalconH1", **HEADS, **FALCON),
        text,
        {"model.layers.0.mamba.conv1d.weight": NEVER},
        never_called=2,
    ),
    "qwen3 next": Case(
        causal("Qwen3Next", **HEADS, **EXPERTS, **QWEN_NEXT),
        text,
        {
            "model.layers.0.linear_attn.conv1d.weight": NEVER,
            **router("mlp.gate", "Qwen3NextTopKRouter"),
        },
        never_called=1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_model_goes_the_whole_way(name, tmp_path):
    whole_way(CASES[name], tmp_path)


def test_weights_that_are_read_without_a_call_can_be_rounded():
    """Rounding to the nearest needs no data, and a quantised layer still has a weight to read."""
    batch = text(0)
    model = made(CASES["mamba"])
    before = output(model, batch)
    model = tsq.quantize(model, CONFIG.changed(method="rtn"))
    names = {layer.name for layer in model.tsq_report.quantized}
    assert {
        f"backbone.layers.{i}.mixer.{x}" for i in range(2) for x in ("conv1d", "dt_proj")
    } <= names
    after = output(model, batch)
    assert 0 < distance(after, before) < 0.025
    check_every_layer_counts(model, batch, after)


@pytest.mark.parametrize(
    ("head", "name", "reached", "why"),
    [
        ("causal", "llama", "done", ""),
        ("image", "resnet", "quantising", "LayerError: .* cannot be rounded to 8 bits"),
        ("image-text", "blip", "floats", "missing 1 required positional argument"),
    ],
)
def test_benchmark_of_all_architectures_says_how_far_one_came(head, name, reached, why):
    row = architectures.row(
        head, name, tsq.QuantConfig(**architectures.CONFIG, method="rtn", activation_bits=8)
    )
    assert row.reached == reached
    assert re.search(why, row.why)
