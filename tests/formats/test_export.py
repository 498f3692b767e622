"""What all formats share: the directory, ties, layers that cannot be held, engines, and that a
failure leaves nothing.
"""

import json
from pathlib import Path

import pytest
import torch
from export_models import TOKENS, UP, llama, quantised, tensors_of
from grid_kinds import made
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import tsq_layers as tsq
from tsq_layers.config.versions import library_versions
from tsq_layers.errors import StateError
from tsq_layers.formats import ExportError, ExportWarning, directory, export_checkpoint, exporting
from tsq_layers.formats.engines import SERVICES
from tsq_layers.runtime.linear import QuantLinear

FORMATS = ["gptq", "gptq-v1", "compressed-tensors", "gguf"]


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def float_twin(folder, model):
    """The float model that the float tensors of a directory belong to; the packed ones are left out."""
    config = config_of(folder)
    del config["quantization_config"]
    tensors = {
        key: tensor for key, tensor in tensors_of(folder).items() if key in dict(model.state_dict())
    }
    return config, tensors


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="ab")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "offsets",
            r"has float offsets, and {} holds scales with integer .* only: quantise it with zero_points='integer', or",
        ),
        (
            "row tables",
            r"has look-up tables, and {} holds .* quantise it with a method other than 'lnq', or add it to skip",
        ),
        ("group tables", r"has look-up tables, and {} holds .*"),
    ],
)
def test_offsets_and_tables_are_refused_by_name(tmp_path, form, kind, message):
    model = quantised()
    weight = made(kind, 96, 64, 4, 32)
    model.set_submodule(UP, QuantLinear.from_quantized(weight, dtype=torch.float32))
    model.get_submodule(UP).bias = None
    with pytest.raises(
        ExportError, match=f"layer '{UP}' " + message.format(form.removesuffix("-v1"))
    ):
        export_checkpoint(model, tmp_path / "out", format=form)
    assert not any(tmp_path.iterdir())


# --- the directory -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_result_is_where_it_says(tmp_path, form, tokenizer):
    written = export_checkpoint(
        quantised(), tmp_path / "new" / "out", format=form, tokenizer=tokenizer
    )
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    if form == "gguf":
        assert written == tmp_path / "new" / "out" / "model.gguf"
        assert names == {"model.gguf"}
    else:
        assert written == tmp_path / "new" / "out"
        assert names >= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_config_builds_the_same_model(tmp_path):
    model = quantised(model=llama(torch.float16))
    config = config_of(export_checkpoint(model, tmp_path / "out", format="gptq"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float16"
    assert config["hidden_size"] == 64
    assert (
        model.config.to_dict().get("quantization_config") is None
    )  # that of the model is not changed


def test_files_name_their_packer_and_are_the_same_each_time(tmp_path):
    model = quantised()
    files = [
        export_checkpoint(model, tmp_path / str(i), format="gptq") / "model.safetensors"
        for i in range(8)
    ]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "packer": f"tsq_layers {library_versions()['tsq_layers']}",
        }


def test_a_model_that_was_saved_and_loaded_gives_the_same_files(tmp_path):
    model = quantised(sizes={"tie_word_embeddings": True})
    tsq.save(model, tmp_path / "saved")
    with torch.device("meta"):
        fresh = llama(tie_word_embeddings=True)
    loaded = tsq.load(tmp_path / "saved", fresh)
    files = [
        export_checkpoint(each, tmp_path / str(i), format="gguf")
        for i, each in enumerate((model, loaded))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_files_can_be_read_by_whoever_can_read_the_folder(tmp_path):
    folder = export_checkpoint(quantised(), tmp_path / "out", format="gptq")
    modes = {path.stat().st_mode & 0o666 for path in folder.iterdir()}
    assert modes == {folder.stat().st_mode & 0o666}


def test_floats_are_in_their_dtype_and_unchanged(tmp_path):
    model = quantised(model=llama(torch.bfloat16), scale_dtype="bfloat16")
    model.model.norm.float()
    tensors = tensors_of(export_checkpoint(model, tmp_path / "out", format="compressed-tensors"))
    floats = {key: tensor for key, tensor in model.state_dict().items() if key in tensors}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= floats.keys()
    assert tensors["model.norm.weight"].dtype == torch.float32
    for key, tensor in floats.items():
        assert tensors[key].dtype == tensor.dtype, key
        assert torch.equal(tensors[key], tensor), key


def test_tensors_are_split_over_files(tmp_path):
    model = quantised()
    whole = tensors_of(export_checkpoint(model, tmp_path / "whole", format="gptq"))
    folder = export_checkpoint(model, tmp_path / "split", format="gptq", max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (folder / "model.safetensors").exists()
    for name in files:
        with safe_open(folder / name, "pt") as file:
            assert {key for key, place in index["weight_map"].items() if place == name} == set(
                file.keys()
            )
        assert (
            sum(t.numel() * t.element_size() for t in load_file(folder / name).values()) <= 20_000
        )
    found = tensors_of(folder)
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in found.values()
    )
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_tensor_that_is_larger_than_a_file_may_be_has_its_own(tmp_path):
    folder = export_checkpoint(quantised(), tmp_path / "out", format="gptq", max_shard_size=1)
    assert len(list(folder.glob("*.safetensors"))) == len(tensors_of(folder))


@pytest.mark.parametrize("size", ["", "5 apples", "-1GB", 0, "GB"])
def test_sizes_that_are_none_are_refused(tmp_path, size):
    with pytest.raises(ExportError, match="max_shard_size=.*give bytes, or a text such as '5GB'"):
        export_checkpoint(quantised(), tmp_path / "out", format="gptq", max_shard_size=size)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            OSError("disk full"),
            ExportError,
            "cannot export to .*: disk full; give a directory that can be written",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (RuntimeError("bug"), RuntimeError, "bug"),
    ],
    ids=["disk full", "Ctrl-C", "bug"],
)
def test_a_failure_leaves_nothing(tmp_path, form, error, expected, message, monkeypatch):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(directory, "write_json", fail)
    monkeypatch.setattr(exporting.gguf, "write_gguf", fail)
    with pytest.raises(expected, match=message):
        export_checkpoint(quantised(), tmp_path / "out", format=form)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    export_checkpoint(quantised(), tmp_path / "out", format="gptq")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("there", ["a file in it", "a file"])
def test_nothing_is_replaced(tmp_path, there):
    path = tmp_path / "out"
    if there == "a file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "file").write_text("mine")
    with pytest.raises(
        ExportError, match="exists and is no empty directory: an export replaces nothing"
    ):
        export_checkpoint(quantised(), path, format="gptq")
    assert (path if there == "a file" else path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ExportError, match="cannot export to .*file/out: .*; give a directory that can be written"
    ):
        export_checkpoint(quantised(), tmp_path / "file" / "out", format="gptq")


# --- ties --------------------------------------------------------------------------------------


def test_a_tied_output_layer_is_not_stored_and_comes_back_tied(tmp_path):
    model = quantised(sizes={"tie_word_embeddings": True})
    tensors = tensors_of(export_checkpoint(model, tmp_path / "out", format="gptq"))
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors


def test_an_untied_output_layer_is_stored(tmp_path):
    assert "lm_head.weight" in tensors_of(
        export_checkpoint(quantised(), tmp_path / "out", format="gptq")
    )


def test_tensors_that_share_memory_without_a_tie_are_stored_twice(tmp_path):
    model = quantised()
    model.lm_head.weight = model.model.embed_tokens.weight  # which transformers knows nothing of
    tensors = tensors_of(export_checkpoint(model, tmp_path / "out", format="gptq"))
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_a_tied_and_packed_table_is_stored_once_as_floats(tmp_path):
    model = quantised(sizes={"tie_word_embeddings": True}, skip=(), embeddings=True)
    assert model.lm_head.words is model.model.embed_tokens.matrix.words
    with pytest.raises(
        ExportError, match=r"'model.embed_tokens' \(Embedding\), 'lm_head' \(Linear\) not"
    ):
        export_checkpoint(model, tmp_path / "out", format="compressed-tensors")
    tensors = tensors_of(
        export_checkpoint(
            model, tmp_path / "out", format="compressed-tensors", dequantize_others=True
        )
    )
    assert torch.equal(tensors["model.embed_tokens.weight"], model.lm_head.weight)
    assert not any(key.startswith("lm_head") for key in tensors)


# --- layers that cannot be held ----------------------------------------------------------------


class ToyConfig(PreTrainedConfig):
    model_type = "toy"


class Toy(PreTrainedModel):
    """A block with every kind of layer that is no linear one."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(9, 32)
        block = {"conv": nn.Conv1d(32, 32, 3), "up": nn.Linear(32, 32)}
        block["attention"] = nn.MultiheadAttention(32, 2)
        block["other"] = nn.MultiheadAttention(
            32, 2, kdim=64, vdim=64, bias=False, add_bias_kv=True
        )
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.post_init()


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_other_kinds_are_refused_by_name_or_written_as_floats(tmp_path, form):
    model = quantised(model=Toy(ToyConfig()), embeddings=True)
    message = rf"{form} holds linear layers(?: in the blocks of a model)? only, and 'table' \(Embedding\), 'blocks.0.conv' \(Conv1d\), 'blocks.0.attention.q_proj' \(MultiheadAttention\) and 7 more not; .*dequantize_others=True"  # noqa: E501
    with pytest.raises(ExportError, match=message):
        export_checkpoint(model, tmp_path / "out", format=form)
    tensors = tensors_of(
        export_checkpoint(model, tmp_path / "out", format=form, dequantize_others=True)
    )
    twin = Toy(ToyConfig())
    floats = {key: tensor for key, tensor in tensors.items() if not key.startswith("blocks.0.up.")}
    assert floats.keys() == {key for key in twin.state_dict() if not key.startswith("blocks.0.up.")}
    twin.load_state_dict(floats, strict=False)
    ours, theirs = model.blocks[0], twin.blocks[0]
    assert torch.equal(theirs["conv"].weight, ours["conv"].weight)
    assert torch.equal(twin.table.weight, model.table.weight)
    x, y = torch.randn(5, 1, 32), torch.randn(5, 1, 64)
    for name, arguments in (("attention", (x, x, x)), ("other", (x, y, y))):
        torch.testing.assert_close(theirs[name](*arguments)[0], ours[name](*arguments)[0])
    assert not torch.allclose(
        Toy(ToyConfig()).blocks[0]["attention"](x, x, x)[0], ours["attention"](x, x, x)[0]
    )


def test_attention_that_was_only_split_is_written_as_it_was(tmp_path):
    model = quantised(model=Toy(ToyConfig()), skip=("table", "conv", "attention.*", "other.*"))
    tensors = tensors_of(export_checkpoint(model, tmp_path / "out", format="compressed-tensors"))
    assert torch.equal(
        tensors["blocks.0.attention.in_proj_weight"], model.blocks[0]["attention"].in_proj_weight
    )


def mixtral():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_local_experts": 4,
    }
    config = MixtralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64
    )
    return MixtralForCausalLM(config).eval()


def test_experts_are_refused_by_name_or_written_as_floats(tmp_path):
    model = quantised(model=mixtral())
    with pytest.raises(
        ExportError, match=r"'model.layers.0.mlp.experts.gate_up_proj.0' \(Experts\)"
    ):
        export_checkpoint(model, tmp_path / "out", format="gptq")
    tensors = tensors_of(
        export_checkpoint(model, tmp_path / "out", format="gptq", dequantize_others=True)
    )
    experts = model.model.layers[0].mlp.experts
    stacked = torch.stack([layer.weight for layer in experts.gate_up_proj])
    assert torch.equal(tensors["model.layers.0.mlp.experts.gate_up_proj"], stacked)
    assert tensors.keys() >= {key for key in mixtral().state_dict() if "self_attn" not in key}


def test_transformers_loads_experts_that_were_written_as_floats(tmp_path):
    model = quantised(model=mixtral())
    folder = export_checkpoint(
        model, tmp_path / "out", format="compressed-tensors", dequantize_others=True
    )
    config = config_of(folder)
    assert "model.layers.0.mlp.gate" in config["quantization_config"]["ignore"]  # the router
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key.rpartition(".")[2] for key in info["unexpected_keys"]} == {
        "weight_packed",
        "weight_scale",
        "weight_shape",
    }
    ours, theirs = model.model.layers[0].mlp, loaded.model.layers[0].mlp
    x = torch.randn(1, 7, 64)
    torch.testing.assert_close(theirs(x), ours(x))


def test_composites_of_the_user_are_refused(tmp_path):
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    class Split(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.inner = nn.Linear(32, 32)
            self.inner.weight, self.inner.bias = module.weight, module.bias

    model = Toy(ToyConfig())
    model.blocks[0]["halved"] = Half(32, 32)
    tsq.layers.register(
        tsq.layers.Composite(name="Half", matches=lambda module: type(module) is Half, split=Split)
    )
    try:
        model = quantised(model=model, skip=("conv", "attention.*", "other.*"))
    finally:
        tsq.layers.unregister("Half")
    with pytest.raises(
        ExportError,
        match=r"'blocks.0.halved' \(Split\) was split into layers by a composite of your own",
    ):
        export_checkpoint(model, tmp_path / "out", format="gptq", dequantize_others=True)


# --- what cannot be exported at all ------------------------------------------------------------


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(
        StateError, match="LlamaForCausalLM holds no QuantLinear: call tsq.quantize"
    ):
        export_checkpoint(llama(), tmp_path / "out", format="gptq")


def test_other_modules_than_those_of_transformers_are_refused(tmp_path):
    model = quantised(model=nn.Sequential(nn.Linear(32, 32)))
    with pytest.raises(
        ExportError, match="Sequential has no transformers config.*save it with tsq.save"
    ):
        export_checkpoint(model, tmp_path / "out", format="gptq")


@pytest.mark.parametrize("where", ["model", "model.norm"])
def test_tensors_without_values_are_refused(tmp_path, where):
    model = quantised()
    model.get_submodule(where).to("meta")
    with pytest.raises(StateError, match="is on the meta device and has no values to export"):
        export_checkpoint(model, tmp_path / "out", format="gptq")


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(
        ExportError,
        match="format='awq': give one of 'gptq', 'gptq-v1', 'compressed-tensors', 'gguf'",
    ):
        export_checkpoint(quantised(), tmp_path / "out", format="awq")


# --- engines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "form", "options", "message"),
    [
        (
            "vllm",
            "gptq-v1",
            {"bits": 3},
            "vllm cannot serve layer .* with 3 bits, symmetric.*it serves 4 bits symmetric",
        ),
        (
            "vllm",
            "compressed-tensors",
            {"bits": 8},
            "it serves 4 bits symmetric and 4 bits asymmetric",
        ),
        ("vllm", "gguf", {}, "vllm does not serve gguf files: it serves"),
        (
            "transformers",
            "compressed-tensors",
            {"symmetric": False},
            r"CompressedTensorsConfig\(dequantize=True\)",
        ),
        (
            "gptqmodel",
            "compressed-tensors",
            {},
            "gptqmodel does not serve compressed-tensors files: it serves gptq, gptq-v1",
        ),
    ],
    ids=["3 bits", "8 bits", "gguf", "asymmetric", "format"],
)
def test_an_engine_that_cannot_serve_is_warned_of(tmp_path, engine, form, options, message):
    with pytest.warns(ExportWarning, match=message):
        export_checkpoint(quantised(**options), tmp_path / "out", format=form, engine=engine)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("engine", "form"), [(engine, form) for engine in SERVICES for form in SERVICES[engine]]
)
def test_an_engine_that_serves_gives_no_warning(tmp_path, engine, form):
    export_checkpoint(quantised(), tmp_path / "out", format=form, engine=engine)


def test_services_are_of_known_formats_and_described():
    assert set(SERVICES) == {"transformers", "gptqmodel", "vllm", "llama.cpp"}
    assert {form for known in SERVICES.values() for form in known} == set(FORMATS)
    assert all(f'"{form}"' in export_checkpoint.__doc__ for form in FORMATS)


def test_unknown_engines_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        ExportError,
        match="engine='tgi': give one of 'transformers', 'gptqmodel', 'vllm', 'llama.cpp', or None",
    ):
        export_checkpoint(quantised(), tmp_path / "out", format="gptq", engine="tgi")
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_not_changed(tmp_path):
    model = quantised()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(TOKENS).logits
        for form in FORMATS:
            export_checkpoint(model, Path(tmp_path, form), format=form)
        assert torch.equal(model(TOKENS).logits, logits)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
