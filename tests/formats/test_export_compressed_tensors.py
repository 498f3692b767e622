"""compressed-tensors files: golden words and bytes, the layer's very weights by a slow reader, and what is refused."""

import json

import pytest
import torch
from export_models import TOKENS, UP, digest, llama, quantised, tensors_of, written_down
from oracles.exports import compressed_weight
from test_bitstream import GOLDEN, hexadecimal

from tsq_layers.formats import ExportError, ExportWarning, export_checkpoint

# SHA-256 of model.safetensors, by width and symmetry
DIGESTS = {
    (2, True): "c1c178d950f33171ab9782eb39acbcb32e577ea0a5100f7de4be9fb07bb0cb74",
    (3, False): "91378a46a1d5b347f3996c4f17662abe8c9859da908b06c6cfc7c9cc706d6a19",
    (4, True): "6319cdc333c036e8f13f1f2f89beeb0c0ac0a4cc3c1348887bf8110e3d70040f",
    (8, False): "0bb92a1e3dcd9042fd7b05a10df7e3d3ec4d026c3a37529653c0ce15e87836d8",
}


def exported(model, folder, **options):
    return tensors_of(
        export_checkpoint(model, folder / "out", format="compressed-tensors", **options)
    )


def quantization_config(folder):
    return json.loads((folder / "out" / "config.json").read_text(encoding="utf-8"))[
        "quantization_config"
    ]


@pytest.mark.parametrize(("bits", "symmetric"), DIGESTS)
def test_files_are_the_golden_ones(tmp_path, bits, symmetric, monkeypatch):
    model = written_down(bits, symmetric=symmetric)
    assert digest(model, tmp_path, "compressed-tensors", monkeypatch) == DIGESTS[bits, symmetric]


@pytest.mark.parametrize("bits", GOLDEN)
def test_words_are_the_golden_ones(tmp_path, bits):
    name = "model.layers.0.mlp.up_proj"
    tensors = exported(written_down(bits, symmetric=False), tmp_path)
    assert (
        hexadecimal(tensors[f"{name}.weight_packed"][0]) == GOLDEN[bits]
    )  # row 0 has the codes 0, 1, 2, …
    assert (
        hexadecimal(tensors[f"{name}.weight_zero_point"][:, 0]) == GOLDEN[bits]
    )  # row n has the zero point n
    assert tensors[f"{name}.weight_shape"].tolist() == [32, 32]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, None], ids=["groups of 32", "whole rows"])
def test_slow_reader_finds_the_weight(tmp_path, bits, symmetric, group_size):
    model = quantised(bits, group_size, symmetric=symmetric)
    tensors = exported(model, tmp_path)
    weight = model.get_submodule(UP).dequantize(torch.float64)
    assert torch.equal(compressed_weight(tensors, UP, bits, group_size), weight)
    groups = 2 if group_size else 1
    expected = {
        "weight_packed": (96, 64 * bits // 32),
        "weight_scale": (96, groups),
        "weight_shape": (2,),
    }
    expected |= {} if symmetric else {"weight_zero_point": (96 * bits // 32, groups)}
    assert {key: tuple(tensors[key].shape) for key in tensors if key.startswith(UP)} == {
        f"{UP}.{local}": shape for local, shape in expected.items()
    }


@pytest.mark.parametrize("key", ["weight_packed", "weight_zero_point"])
def test_slow_reader_sees_one_wrong_bit(tmp_path, key):
    model = quantised(3, symmetric=False)
    tensors = exported(model, tmp_path)
    tensors[f"{UP}.{key}"][1, 1] ^= 1 << 9
    assert not torch.equal(
        compressed_weight(tensors, UP, 3, 32), model.get_submodule(UP).dequantize(torch.float64)
    )


def test_rows_need_not_fill_words(tmp_path):
    model = quantised(3, 6, symmetric=False, model=llama(hidden_size=36, intermediate_size=42))
    tensors = exported(model, tmp_path)
    weight = model.get_submodule(UP).dequantize(torch.float64)
    assert torch.equal(compressed_weight(tensors, UP, 3, 6), weight)
    assert tensors[f"{UP}.weight_packed"].shape == (42, 4)  # 36 · 3 bits
    assert tensors[f"{UP}.weight_zero_point"].shape == (4, 6)  # 42 · 3 bits


def test_config_of_one_scheme_is_for_all_linear_layers_but_those_named(tmp_path):
    exported(quantised(4, symmetric=False, skip=("lm_head", "layers.0.mlp.up_proj")), tmp_path)
    found = quantization_config(tmp_path)
    assert found["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": 32,
            },
            "format": "pack-quantized",
        }
    }
    assert found["ignore"] == ["model.layers.0.mlp.up_proj", "lm_head"]


def test_whole_rows_are_the_strategy_channel(tmp_path):
    exported(quantised(4, None), tmp_path)
    weights = quantization_config(tmp_path)["config_groups"]["group_0"]["weights"]
    assert weights == {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}


def test_config_of_several_schemes_names_their_layers(tmp_path):
    exported(quantised(4, overrides={"*.down_proj": {"bits": 8, "symmetric": False}}), tmp_path)
    groups = quantization_config(tmp_path)["config_groups"].values()
    found = {
        (group["weights"]["num_bits"], group["weights"]["symmetric"]): group["targets"]
        for group in groups
    }
    assert found[8, False] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert len(found[4, True]) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"group_size": 48},
            r"groups of 48, .*groups that divide the row: .*QuantConfig\(bits=4, group_size=32, symmetric=True\)",
        ),
        (
            {"group_size": 40, "symmetric": False},
            r"QuantConfig\(bits=4, group_size=32, symmetric=False\)",
        ),
        (
            {"group_size": 7, "sizes": {"hidden_size": 52, "intermediate_size": 52}},
            r"groups of 7, .*QuantConfig\(bits=4, group_size=4, symmetric=True\)",
        ),
    ],
    ids=["ragged", "asymmetric", "small"],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        exported(quantised(**options), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scales_are_in_the_dtype_of_the_model(tmp_path, dtype):
    model = quantised(model=llama(dtype))
    assert exported(model, tmp_path)[f"{UP}.weight_scale"].dtype == dtype


def test_scales_that_the_dtype_of_the_model_would_round_keep_theirs_with_a_warning(tmp_path):
    model = quantised(model=llama(torch.bfloat16))
    with pytest.warns(
        ExportWarning,
        match=r"float16 scales of 14 layers exactly, but the model is bfloat16.*dtype='float16'",
    ):
        tensors = exported(model, tmp_path)
    assert tensors[f"{UP}.weight_scale"].dtype == torch.float16
    assert torch.equal(
        compressed_weight(tensors, UP, 4, 32), model.get_submodule(UP).dequantize(torch.float64)
    )


def test_scales_of_the_dtype_of_the_model_give_no_warning(tmp_path):
    model = quantised(model=llama(torch.bfloat16), scale_dtype="bfloat16")
    assert exported(model, tmp_path)[f"{UP}.weight_scale"].dtype == torch.bfloat16


# --- the client --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, None], ids=["groups of 32", "whole rows"])
def test_transformers_loads_the_same_model(tmp_path, bits, group_size):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = quantised(bits, group_size)
    exported(model, tmp_path)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        torch.testing.assert_close(
            loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"overrides": {"*.down_proj": {"bits": 8}, "*.q_proj": {"group_size": None}}}, {}),
        ({"sizes": {"tie_word_embeddings": True}}, {"max_shard_size": "20KB"}),
        ({"skip": ()}, {}),
        ({"skip": ("lm_head", "layers.0.mlp.*")}, {}),
        ({"sizes": {"mlp_bias": True, "attention_bias": True}}, {}),
        ({"embeddings": True}, {"dequantize_others": True}),
        (
            {"embeddings": True, "skip": (), "sizes": {"tie_word_embeddings": True}},
            {"dequantize_others": True},
        ),
    ],
    ids=[
        "several schemes",
        "tied, in shards",
        "packed output layer",
        "float layers",
        "biases",
        "dequantised table",
        "tied",
    ],
)
def test_transformers_loads_the_same_model_of_every_make(tmp_path, options, how):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = quantised(**options)
    exported(model, tmp_path, **how)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        torch.testing.assert_close(
            loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5
        )


def test_transformers_loads_asymmetric_layers_dequantised(tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = quantised(3, symmetric=False)
    exported(model, tmp_path)
    options = {
        "dtype": torch.float32,
        "quantization_config": CompressedTensorsConfig(dequantize=True),
    }
    with torch.no_grad(), pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options).eval()
        torch.testing.assert_close(
            loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5
        )
