"""Fused experts of transformers, split: they compute what they did, by layers that see the tokens routed to them."""

import copy
import importlib
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import FewTokensWarning
from tsq_layers.formats.tsq.writing import composites_of
from tsq_layers.layers.expert_weights import ExpertWeights
from tsq_layers.layers.experts import EXPERTS, split_experts
from tsq_layers.numerics import grid
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.runtime.linear import QuantLinear

transformers = pytest.importorskip("transformers", minversion="5.0")

E, K, TOP = 4, 32, 2  # experts, width of the model, experts that a token goes to
SIZES = {
    "hidden_size": K,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
SIZES |= {
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "num_experts_per_tok": TOP,
}
SMALL = {"intermediate_size": 48, "moe_intermediate_size": 24}
ONE_GROUP = {"n_routed_experts": E, "n_group": 1, "topk_group": 1}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EVERY = {
    "attn_layer_period": 1,
    "attn_layer_offset": 0,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
}

MODELS = {  # architecture: (how many blocks of experts, options)
    "Mixtral": (2, {"intermediate_size": 48, "num_local_experts": E}),
    "Qwen2Moe": (2, {**SMALL, "num_experts": E, "shared_expert_intermediate_size": 24}),
    "Qwen3Moe": (2, {**SMALL, "num_experts": E, "head_dim": 8}),
    "GptOss": (2, {"intermediate_size": 48, "num_local_experts": E, "head_dim": 8}),
    "Llama4Text": (
        2,
        {
            "intermediate_size": 48,
            "intermediate_size_mlp": 48,
            "num_local_experts": E,
            "head_dim": 8,
        },
    ),
    "NemotronH": (
        1,
        {**SMALL, **ONE_GROUP, "layers_block_type": ["attention", "moe"], "head_dim": 8},
    ),
    "DeepseekV3": (
        1,
        {**SMALL, **ONE_GROUP, **LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "Jamba": (2, {**EVERY, "intermediate_size": 48, "num_experts": E, "use_mamba_kernels": False}),
}


def model_of(architecture):
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SIZES | MODELS[architecture][1])
    model = (
        getattr(transformers, f"{architecture.removesuffix('Text')}ForCausalLM")(config)
        .double()
        .eval()
    )
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def tokens():
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def with_split(model):
    """A copy in which all experts are split, and these by name."""
    model, found = copy.deepcopy(model), {}
    for name, module in list(model.named_modules()):
        if EXPERTS.matches(module):
            found[name] = EXPERTS.split(module)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, found[name])
    return model, found


@pytest.fixture(params=MODELS)
def architecture(request):
    return request.param


@torch.no_grad()
def test_a_model_computes_what_it_did(architecture):
    model = model_of(architecture)
    split, found = with_split(model)
    assert len(found) == MODELS[architecture][0]
    assert all(
        isinstance(child, nn.Linear)
        for experts in found.values()
        for child in linears(experts).values()
    )
    assert all(weight.dim() < 3 for experts in found.values() for weight in experts.parameters())
    expected = model(tokens()).logits
    torch.testing.assert_close(split(tokens()).logits, expected, rtol=1e-12, atol=1e-12)
    assert expected.std() > 0.1
    expert = next(iter(linears(next(iter(found.values()))).values()))
    expert.weight.mul_(1.001)  # the comparison sees a single expert
    assert not torch.allclose(split(tokens()).logits, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_chosen_implementation_is_of_no_account():
    model = model_of("Mixtral")
    split, _ = with_split(model)
    expected = model(tokens()).logits
    for each in (model, split):
        each.config._experts_implementation_internal = "none such"
    assert torch.equal(split(tokens()).logits, expected)
    with pytest.raises(KeyError, match="none such"):
        model(tokens())


def linears(experts):
    return {
        name: module for name, module in experts.named_modules() if isinstance(module, nn.Linear)
    }


def stacks(experts):
    return {
        name: module
        for name, module in experts.named_children()
        if isinstance(module, ExpertWeights)
    }


# single blocks of experts, called with a routing made by hand

KNOWN = {  # class: configuration, or the arguments of the class
    "mixtral.MixtralExperts": {"hidden_size": K, "intermediate_size": 24, "num_local_experts": E},
    "qwen2_moe.Qwen2MoeExperts": {"hidden_size": K, "moe_intermediate_size": 24, "num_experts": E},
    "gpt_oss.GptOssExperts": {"hidden_size": K, "intermediate_size": 24, "num_local_experts": E},
    "aria.AriaExperts": {"hidden_size": K, "intermediate_size": 24, "moe_num_experts": E},
    "nemotron_h.NemotronHExperts": {
        "hidden_size": K,
        "moe_intermediate_size": 24,
        "n_routed_experts": E,
    },
    "longcat_flash.LongcatFlashExperts": {
        "hidden_size": K,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": E,
        "zero_expert_num": 0,
    },
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": {
        "hidden_size": K,
        "intermediate_size": 24,
        "num_local_experts": E,
    },
}
CONFIGS = {"aria": "AriaTextConfig", "openai_privacy_filter": "OpenAIPrivacyFilterConfig"}


def class_of(name):
    family, _, own = name.partition(".")
    return getattr(pytest.importorskip(f"transformers.models.{family}.modeling_{family}"), own)


def filled(module, dtype=torch.float64):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.to(dtype).eval()


def experts_of(name, dtype=torch.float64):
    kind = class_of(name)
    family = name.partition(".")[0]
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    configs = [
        value
        for key, value in vars(module).items()
        if key.endswith("Config") and value.__module__ == module.__name__
    ]
    config = getattr(module, CONFIGS[family]) if family in CONFIGS else configs[0]
    config = config(**KNOWN[name])
    config._experts_implementation_internal = "eager"
    return filled(kind(config), dtype)


def routing(rows=10):
    """Inputs, experts and their weights of every token; the last expert gets none."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, K, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(E - 1, generator=generator)[:TOP] for _ in range(rows)])
    return x, chosen, torch.rand(rows, TOP, generator=generator, dtype=torch.float64)


@pytest.fixture(params=KNOWN)
def known(request):
    """Name and dtype; the privacy filter computes in float32."""
    return request.param, torch.float32 if "Privacy" in request.param else torch.float64


def test_a_block_computes_what_it_did_and_gives_the_same_gradients(known):
    experts = experts_of(*known)
    x, chosen, weights = routing()
    split = split_experts(experts)
    expected, found = (
        each(x.to(known[1]), chosen, weights.to(known[1])) for each in (experts, split)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, stack in stacks(split).items():
        gradient = experts.get_parameter(name).grad
        for own, child in zip(gradient.mT if stack.transposed else gradient, stack, strict=True):
            given = torch.zeros_like(own) if child.weight.grad is None else child.weight.grad
            torch.testing.assert_close(given, own, rtol=1e-12, atol=1e-12)


def test_every_layer_sees_the_tokens_that_are_routed_to_it(known):
    experts = experts_of(*known)
    x, chosen, weights = routing()
    x = x.to(known[1])
    split = split_experts(experts)
    seen = {}
    for name, child in linears(split).items():
        child.register_forward_hook(
            lambda _, args, y, name=name: seen.setdefault(name, []).append((args[0], y))
        )
    split(x, chosen, weights.to(known[1]))
    first, second = stacks(split)
    assert set(seen) == {
        f"{stack}.{expert}" for stack in (first, second) for expert in range(E - 1)
    }  # the last is not called
    for expert in range(E - 1):
        ((rows, y),) = seen[f"{first}.{expert}"]
        expected = torch.cat([x[(chosen[:, place] == expert)] for place in range(TOP)])
        assert torch.equal(rows, expected)
        matrix = experts.get_parameter(first)[expert]
        torch.testing.assert_close(
            y, expected @ (matrix if split.get_submodule(first).transposed else matrix.T)
        )
        ((inner, _),) = seen[f"{second}.{expert}"]
        assert len(inner) == len(expected) > 0


def test_memory_is_shared_and_the_original_left_alone(known):
    experts = experts_of(*known)
    names, children = [
        list(dict(items)) for items in (experts.named_parameters(), experts.named_modules())
    ]
    split = split_experts(experts)
    assert type(split) is type(experts)
    for name, stack in stacks(split).items():
        whole = experts.get_parameter(name)
        assert (stack.shape, stack.dtype, stack.device) == (whole.shape, whole.dtype, whole.device)
        assert [child.weight.data_ptr() for child in stack] == [part.data_ptr() for part in whole]
    for name in set(names) - stacks(split).keys():
        assert split.get_parameter(name) is experts.get_parameter(name)
    assert names == list(dict(experts.named_parameters()))
    assert children == list(dict(experts.named_modules()))
    x, chosen, weights = routing()
    given = (x.to(known[1]), chosen, weights.to(known[1]))
    with torch.no_grad():
        experts.down_proj.mul_(2)
    torch.testing.assert_close(split(*given), experts(*given), rtol=1e-12, atol=1e-12)


def test_deepcopy_and_state_dict():
    split = split_experts(experts_of("gpt_oss.GptOssExperts"))
    given = routing()
    expected, state = split(*given), split.state_dict()
    assert set(state) == {
        f"{name}.{expert}.weight" for name in ("gate_up_proj", "down_proj") for expert in range(E)
    } | {
        "gate_up_proj_bias",
        "down_proj_bias",
    }
    assert state["gate_up_proj.3.weight"].shape == (48, K)
    other = copy.deepcopy(split)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(split(*given), expected)
    assert not other(*given).any()
    other.load_state_dict(state)
    assert torch.equal(other(*given), expected)


def quantized(linear):
    weight = linear.weight.detach().float()
    scales, zeros = grid.minmax(weight, bits=4, group_size=8, symmetric=False)
    scales = grid.storable(scales, torch.float16)
    codes = grid.quantize(weight, scales, zeros, bits=4, group_size=8)
    return QuantLinear.from_float(
        linear, QuantizedWeight(codes, scales.half(), zeros.to(torch.uint8), 4, 8, symmetric=False)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral.MixtralExperts", "gpt_oss.GptOssExperts"])
def test_a_quantised_layer_changes_its_own_expert_only(name):
    experts = experts_of(name)
    x, chosen, weights = routing()
    split = split_experts(experts)
    packed = quantized(split.down_proj.get_submodule("1"))
    split.down_proj.add_module("1", packed)
    assert split.down_proj.shape == experts.down_proj.shape
    rounded = copy.deepcopy(experts)
    rounded.down_proj[1] = packed.weight.T if split.down_proj.transposed else packed.weight
    found, expected, before = (each(x, chosen, weights) for each in (split, rounded, experts))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    routed = (chosen == 1).any(dim=1)
    assert routed.any()
    assert not routed.all()
    assert torch.equal(found[~routed], before[~routed])
    assert ((found - before)[routed].abs().amax(dim=1) > 1e-3).all()


def test_all_layers_quantised():
    split = split_experts(
        experts_of("openai_privacy_filter.OpenAIPrivacyFilterExperts", torch.float32)
    )
    for stack in stacks(split).values():
        for number, child in enumerate(list(stack)):
            stack.add_module(str(number), quantized(child))
        assert stack.dtype == torch.float32
        assert stack.device == torch.device("cpu")
    x, chosen, weights = routing()
    assert split(x.float(), chosen, weights.float()).isfinite().all()


# experts that are called in other ways


def test_batched_experts_get_a_slice_each():
    config = transformers.Llama4TextConfig(hidden_size=K, intermediate_size=24, num_local_experts=E)
    experts = filled(class_of("llama4.Llama4TextExperts")(config))
    split = split_experts(experts)
    x = torch.randn(E * 5, K, dtype=torch.float64)
    seen = []
    for child in split.gate_up_proj:
        child.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.testing.assert_close(split(x), experts(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat(seen), x)


def test_batched_experts_with_transposed_weights():
    kind = class_of("inkling.InklingSharedExperts")
    config = SimpleNamespace(
        n_shared_experts=E, moe_intermediate_size=24, hidden_size=K, hidden_act="silu"
    )
    experts = filled(kind(config))
    split = split_experts(experts)
    assert set(stacks(split)) == {"gate_proj", "up_proj", "down_proj"}
    x, gammas = torch.randn(2, 3, K, dtype=torch.float64), torch.rand(2, 3, E, dtype=torch.float64)
    # their sum goes through float32
    torch.testing.assert_close(split(x, gammas), experts(x, gammas), rtol=1e-6, atol=1e-6)


def test_experts_that_are_all_called():
    experts = filled(class_of("jetmoe.JetMoeParallelExperts")(E, K, 24))
    split = split_experts(experts)
    x, sizes = torch.randn(9, K, dtype=torch.float64), [2, 0, 4, 3]
    torch.testing.assert_close(split(x, sizes), experts(x, sizes), rtol=1e-12, atol=1e-12)


def test_a_grouped_linear_layer_is_one_too():
    grouped = class_of("convbert.GroupedLinearLayer")(K, 24, E)
    filled(grouped)
    x = torch.randn(2, 3, K, dtype=torch.float64)
    torch.testing.assert_close(split_experts(grouped)(x), grouped(x), rtol=1e-12, atol=1e-12)


# what is matched


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_privacy_filter_is_matched_in_the_dtype_that_it_computes_in(dtype):
    experts = experts_of("openai_privacy_filter.OpenAIPrivacyFilterExperts", dtype)
    assert EXPERTS.matches(experts) == (dtype == torch.float32)


def test_dbrx_is_not_matched():
    pytest.importorskip("transformers.models.dbrx.modeling_dbrx")
    config = transformers.models.dbrx.configuration_dbrx.DbrxFFNConfig(
        hidden_size=8, ffn_hidden_size=8
    )
    config.hidden_size = 8
    kind = class_of("dbrx.DbrxExperts")
    assert not any(EXPERTS.matches(module) for module in kind(config).modules())


@pytest.mark.compile
@torch.no_grad()
def test_a_compiled_model_computes_the_same():
    split = split_experts(experts_of("mixtral.MixtralExperts"))
    given = routing()
    compiled = torch.compile(
        split, backend="eager"
    )  # experts are called in a loop that no graph can hold
    torch.testing.assert_close(compiled(*given), split(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")
def test_a_quantised_model_with_experts_can_be_pickled():
    model = tsq.quantize(
        model_of("Mixtral").float(), tsq.QuantConfig(bits=4, group_size=16), [tokens()]
    )
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert (
        composites_of(again)
        == composites_of(model)
        == [f"model.layers.{index}.mlp.experts" for index in range(2)]
    )


class Batched(nn.Module):
    """All experts on all tokens, with zeros for those that are not routed to one, as in Llama 4."""

    def __init__(self):
        super().__init__()
        self.num_experts = E
        self.up = nn.Parameter(torch.randn(E, K, 16) * 0.1)

    def forward(self, x):
        return torch.bmm(x, self.up)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Batched()

    def forward(self, x, chosen):
        scores = F.one_hot(chosen, E).T.to(x)
        return self.experts(x.repeat(E, 1, 1) * scores.unsqueeze(-1)).sum(0)


def test_zeros_for_what_is_not_routed_are_no_tokens():
    torch.manual_seed(0)
    chosen = torch.randint(0, 2, (1200,))
    chosen[:5] = 2
    with pytest.warns(FewTokensWarning, match="2 layers of experts saw too few tokens"):
        model = tsq.quantize(
            Routed(),
            tsq.QuantConfig(bits=3, group_size=K),
            [{"x": torch.randn(1200, K), "chosen": chosen}],
        )
    layers = model.tsq_report.quantized
    assert [layer.tokens for layer in layers] == [
        int((chosen == expert).sum()) for expert in range(E)
    ]
    assert [layer.status for layer in layers] == ["quantized", "quantized", "fallback", "fallback"]
