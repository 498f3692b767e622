"""GPTQ files: golden words and bytes, the layer's very weights by a slow reader, and what is refused."""

import json

import pytest
import torch
from export_models import TOKENS, UP, digest, llama, quantised, tensors_of, written_down
from oracles.exports import gptq_weight
from test_bitstream import GOLDEN, SYMMETRIC, SYMMETRIC_V1, hexadecimal
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tsq_layers.formats import ExportError, export_checkpoint
from tsq_layers.runtime.linear import QuantLinear

# SHA-256 of model.safetensors, by width and symmetry
DIGESTS = {
    ("gptq", 2, True): "79ad1ef0b4a39218eb16c37b94466a3e362e81f0f86e2a744a001c4d8c3e264d",
    ("gptq", 3, False): "7568a7247de3eff3b61f6f22cb12954cfd1e5a7cd51dbd1f042b8806a9160bf4",
    ("gptq", 4, True): "12d83e9023d890a48aa31111114fe34990dbf44f307aad21a3d486cbe92246d4",
    ("gptq", 8, False): "36dbd2ddc522b33549ae96e9709e330016149e6e2bdb06eaf9df60df058121ea",
    ("gptq-v1", 3, True): "0f356eba2f057b7a824b54319ab3658b12d12918a5ffb4744380fa0b8a95b8e3",
    ("gptq-v1", 4, True): "a77bdac0ec380e551ec16539d34eba5bdf73b127b5d4875920ec4dc54bfe3d3b",
}


def exported(model, folder, **options):
    options = {"format": "gptq", **options}
    return tensors_of(export_checkpoint(model, folder / "out", **options))


def quantization_config(folder):
    return json.loads((folder / "out" / "config.json").read_text(encoding="utf-8"))[
        "quantization_config"
    ]


@pytest.mark.parametrize(("form", "bits", "symmetric"), DIGESTS)
def test_files_are_the_golden_ones(tmp_path, form, bits, symmetric, monkeypatch):
    model = written_down(bits, symmetric=symmetric)
    assert digest(model, tmp_path, form, monkeypatch) == DIGESTS[form, bits, symmetric]


@pytest.mark.parametrize("bits", GOLDEN)
@pytest.mark.parametrize(("form", "zeros"), [("gptq", SYMMETRIC), ("gptq-v1", SYMMETRIC_V1)])
def test_words_are_the_golden_ones(tmp_path, bits, form, zeros):
    name = "model.layers.0.mlp.up_proj"
    tensors = exported(written_down(bits, symmetric=True), tmp_path, format=form)
    assert (
        hexadecimal(tensors[f"{name}.qweight"][:, 0]) == GOLDEN[bits]
    )  # row 0 has the codes 0, 1, 2, …
    assert hexadecimal(tensors[f"{name}.qzeros"][0]) == zeros[bits]
    assert tensors[f"{name}.scales"][0].tolist() == [2.0 ** -(n % 8) for n in range(32)]
    assert tensors[f"{name}.g_idx"].tolist() == [0] * 32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, None], ids=["groups of 32", "whole rows"])
def test_slow_reader_finds_the_weight(tmp_path, bits, symmetric, group_size):
    model = quantised(bits, group_size, symmetric=symmetric)
    layer = model.get_submodule(UP)
    tensors = exported(model, tmp_path)
    assert torch.equal(gptq_weight(tensors, UP, bits, version=2), layer.dequantize(torch.float64))
    expected = {
        "qweight": (64 * bits // 32, 96),
        "scales": (2 if group_size else 1, 96),
        "g_idx": (64,),
    }
    expected["qzeros"] = (expected["scales"][0], 96 * bits // 32)
    assert {key: tuple(tensors[f"{UP}.{key}"].shape) for key in expected} == expected
    assert {tensors[f"{UP}.{key}"].dtype for key in ("qweight", "qzeros", "g_idx")} == {torch.int32}
    assert tensors[f"{UP}.scales"].dtype == torch.float16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_stores_zero_points_less_one(tmp_path, bits):
    model = quantised(bits)
    tensors = exported(model, tmp_path, format="gptq-v1")
    weight = model.get_submodule(UP).dequantize(torch.float64)
    assert torch.equal(gptq_weight(tensors, UP, bits, version=1), weight)
    assert not torch.equal(gptq_weight(tensors, UP, bits, version=2), weight)


@pytest.mark.parametrize("key", ["qweight", "qzeros"])
def test_slow_reader_sees_one_wrong_bit(tmp_path, key):
    model = quantised(3, symmetric=False)
    tensors = exported(model, tmp_path)
    tensors[f"{UP}.{key}"][1, 2] ^= 1 << 9
    assert not torch.equal(
        gptq_weight(tensors, UP, 3, version=2), model.get_submodule(UP).dequantize(torch.float64)
    )


def test_asymmetric_version_1_needs_zero_points_of_at_least_1(tmp_path):
    model = quantised(4, symmetric=False)
    layer = model.get_submodule(UP)
    with pytest.raises(
        ExportError,
        match="has zero points of 0, which version 1 of gptq stores as −1: the nearest is format='gptq'",
    ):
        exported(_with_zero(model, 0), tmp_path, format="gptq-v1")
    tensors = exported(_with_zero(model, 1), tmp_path, format="gptq-v1")
    assert torch.equal(gptq_weight(tensors, UP, 4, version=1), layer.dequantize(torch.float64))


def _with_zero(model, value):
    """The model with ``value`` as every zero point."""
    for module in model.modules():
        if getattr(module, "zero_words", None) is not None:
            module.zero_words.fill_(value * 0x11111111)
    return model


@pytest.mark.parametrize(
    ("form", "symmetric", "expected"),
    [
        ("gptq", True, {"checkpoint_format": "gptq_v2", "sym": True}),
        ("gptq", False, {"checkpoint_format": "gptq_v2", "sym": False}),
        ("gptq-v1", True, {"checkpoint_format": "gptq", "sym": True}),
    ],
)
def test_config_says_what_was_written(tmp_path, form, symmetric, expected):
    exported(quantised(4, symmetric=symmetric), tmp_path, format=form)
    expected |= {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "lm_head": False,
    }
    found = quantization_config(tmp_path)
    assert {key: found[key] for key in expected} == expected
    assert found["block_name_to_quantize"] == "model.layers"
    assert found["meta"]["quantizer"][0].startswith("tsq_layers:")
    assert "dynamic" not in found


def test_whole_rows_are_group_size_minus_1(tmp_path):
    exported(quantised(4, None), tmp_path)
    assert quantization_config(tmp_path)["group_size"] == -1


def test_groups_that_only_some_rows_are_longer_than_are_one_size(tmp_path):
    model = quantised(
        4, 64
    )  # rows of 64 are one group; down_proj has 96 columns, which 64 does not divide
    with pytest.raises(
        ExportError, match=r"down_proj' \(64×96\) has 4 bits, symmetric, groups of 64"
    ):
        exported(model, tmp_path)
    model = quantised(4, 64, model=llama(intermediate_size=128))
    tensors = exported(model, tmp_path)
    assert quantization_config(tmp_path)["group_size"] == 64
    assert tensors["model.layers.0.mlp.down_proj.scales"].shape == (2, 64)
    assert tensors["model.layers.0.mlp.up_proj.scales"].shape == (1, 128)


def test_linear_layers_that_stay_float_are_named_for_each_loader(tmp_path):
    exported(quantised(4, skip=("lm_head", "layers.0.mlp.up_proj")), tmp_path)
    found = quantization_config(tmp_path)
    assert found["dynamic"] == {r"-:^model\.layers\.0\.mlp\.up_proj$": {}}
    (names,) = found["modules_in_block_to_quantize"]
    assert UP in names
    assert "model.layers.0.mlp.up_proj" not in names
    assert len(names) == 13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bits": 5},
            r"5 bits, .*2, 3, 4 or 8 bits.*: the nearest that it holds is QuantConfig\(bits=8, group_size=32, symmetric=True\)",  # noqa: E501
        ),
        (
            {"group_size": 48},
            r"groups of 48, .*QuantConfig\(bits=4, group_size=32, symmetric=True\)",
        ),
        (
            {"group_size": 96, "sizes": {"intermediate_size": 192, "hidden_size": 192}},
            r"groups of 96, .*group_size=64",
        ),
        (
            {"group_size": 16},
            r"groups of 16, .*QuantConfig\(bits=4, group_size=32, symmetric=True\)",
        ),
        (
            {"scale_dtype": "float32"},
            r"float32 scales that float16, .* would round: quantise with scale_dtype='float16'",
        ),
        (
            {"overrides": {"*.down_proj": {"bits": 8}}},
            r"q_proj' has 4 bits.*down_proj' has 8 bits.*one width and one group size: .*format='compressed-tensors'",
        ),
        (
            {"overrides": {"*.q_proj": {"group_size": None}}},
            "one group a row.*one width and one group size",
        ),
        (
            {"sizes": {"hidden_size": 48}},
            r"\(48×48\).*a multiple of 32 rows: no configuration changes its shape",
        ),
        (
            {"skip": ()},
            r"gptq holds linear layers in the blocks of a model only, and 'lm_head' \(Linear\) not",
        ),
    ],
    ids=[
        "width",
        "ragged",
        "no kernel",
        "small groups",
        "scales",
        "two widths",
        "two group sizes",
        "shape",
        "output layer",
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        exported(quantised(**options), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_output_layer_is_written_as_floats_if_asked(tmp_path):
    model = quantised(skip=())
    tensors = exported(model, tmp_path, dequantize_others=True)
    assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight)
    assert "model.layers.0.mlp.up_proj.qweight" in tensors


def gpt2():
    config = GPT2Config(vocab_size=48, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return quantised(model=model)


def test_bias_and_gpt2_layers_are_held(tmp_path):
    model = gpt2()
    name = "transformer.h.0.mlp.c_fc"
    tensors = exported(model, tmp_path)
    assert torch.equal(
        gptq_weight(tensors, name, 4, version=2),
        model.get_submodule(name).dequantize(torch.float64),
    )
    assert torch.equal(tensors[f"{name}.bias"], model.get_submodule(name).bias)
    assert quantization_config(tmp_path)["block_name_to_quantize"] == "transformer.h"


# --- clients -----------------------------------------------------------------------------------

CASES = [("gptq", bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
CASES += [("gptq-v1", bits, True) for bits in (2, 3, 4, 8)]


def assert_same_weights(loaded, model):
    """Every packed layer of both, bit for bit in float16; the first is of GPTQModel's kernels."""
    packed = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)
    }
    assert packed
    for name, layer in packed.items():
        assert torch.equal(
            loaded.get_submodule(name).dequantize_weight().T, layer.dequantize(torch.float16)
        ), name


def assert_same_logits(loaded, model):
    """In float16."""
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(TOKENS).logits, model.half()(TOKENS).logits, rtol=0.01, atol=1e-3
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("form", "bits", "symmetric"), CASES)
def test_gptqmodel_loads_the_same_model(tmp_path, form, bits, symmetric):
    gptqmodel = pytest.importorskip("gptqmodel")
    model = quantised(bits, symmetric=symmetric)
    exported(model, tmp_path, format=form, tokenizer=tokenizer())
    options = {"device": "cpu", "backend": gptqmodel.BACKEND.GPTQ_TORCH, "dtype": torch.float16}
    loaded = gptqmodel.GPTQModel.load(str(tmp_path / "out"), **options).model
    assert_same_weights(loaded, model)
    assert_same_logits(loaded, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("form", "bits", "symmetric"), CASES)
def test_transformers_loads_the_same_model(tmp_path, form, bits, symmetric):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM

    model = quantised(bits, symmetric=symmetric)
    exported(model, tmp_path, format=form)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16).eval()
    assert_same_weights(loaded, model)
    assert_same_logits(loaded, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loader", ["gptqmodel", "transformers"])
def test_layers_that_stay_float_are_loaded_as_such(tmp_path, loader):
    gptqmodel = pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM

    model = quantised(4, skip=("lm_head", "layers.0.mlp.up_proj"))
    exported(model, tmp_path, tokenizer=tokenizer())
    if loader == "gptqmodel":
        options = {"device": "cpu", "backend": gptqmodel.BACKEND.GPTQ_TORCH, "dtype": torch.float16}
        loaded = gptqmodel.GPTQModel.load(str(tmp_path / "out"), **options).model
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16).eval()
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert_same_weights(loaded, model)
    assert_same_logits(loaded, model)


@pytest.mark.filterwarnings("ignore")
def test_gptqmodel_loads_the_same_gpt2(tmp_path):
    gptqmodel = pytest.importorskip("gptqmodel")
    model = gpt2()
    exported(model, tmp_path, tokenizer=tokenizer())
    options = {"device": "cpu", "backend": gptqmodel.BACKEND.GPTQ_TORCH, "dtype": torch.float16}
    loaded = gptqmodel.GPTQModel.load(str(tmp_path / "out"), **options).model
    assert_same_weights(loaded, model)
    assert_same_logits(loaded, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["whole rows", "zero points"])
def test_transformers_loads_the_same_model_of_other_grids(tmp_path, case):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM, GPTQConfig

    model = (
        quantised(4, None) if case == "whole rows" else _with_zero(quantised(4, symmetric=False), 1)
    )
    exported(model, tmp_path, format="gptq-v1")
    options = {
        "dtype": torch.float16,
        "quantization_config": GPTQConfig(bits=4, backend="gptq_torch"),
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options).eval()
    assert_same_weights(loaded, model)
    assert_same_logits(loaded, model)


def tokenizer():
    """Without one in the directory GPTQModel does not load it."""
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="a", eos_token="b", pad_token="b"
    )
