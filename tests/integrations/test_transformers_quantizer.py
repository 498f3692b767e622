"""Quantised models go through ``save_pretrained`` and ``from_pretrained`` of transformers, and come back bit by bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertPreTrainedModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OlmoConfig,
    OlmoForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)
from transformers.utils import logging

import tsq_layers as tsq
from tsq_layers.cli import main
from tsq_layers.errors import CheckpointError, ConfigError
from tsq_layers.formats import ExportError
from tsq_layers.integrations.transformers import TsqConfig, load_causal_lm, save_causal_lm
from tsq_layers.runtime.linear import QuantLinear

SIZES = {"vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1, "max_position_embeddings": 64}
IDS = torch.arange(12).unsqueeze(0) * 3 % 48
RTN = tsq.QuantConfig(method="rtn", bits=3, group_size=32)
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, intermediate_size=96, **changes)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=64, n_layer=2, n_head=2, n_positions=64)
    ).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(**SIZES, **HEADS, intermediate_size=96, num_local_experts=4)
    ).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SIZES, intermediate_size=96)).eval()


def roberta() -> Any:
    torch.manual_seed(0)
    return XLMRobertaForMaskedLM(XLMRobertaConfig(**SIZES, intermediate_size=96)).eval()


def modernbert() -> Any:
    torch.manual_seed(0)
    special = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1
    )
    return ModernBertForMaskedLM(ModernBertConfig(**SIZES, **special, intermediate_size=96)).eval()


def siglip() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).eval()


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def quantised(model: Any = None, **changes: Any) -> Any:
    return tsq.quantize(model or llama(), _config(changes))


def _config(changes: Any) -> tsq.QuantConfig:
    return tsq.QuantConfig(**{"method": "rtn", "bits": 3, "group_size": 32, **changes})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def loaded(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model of a directory; nothing may be missing, unexpected or mismatched."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return quantised()


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, tied, gpt2, mixtral], ids=lambda build: build.__name__)
def test_logits_are_bit_equal_after_loading_and_after_saving_again(
    build: Any, tmp_path: Path
) -> None:
    original = quantised(build())
    original.save_pretrained(tmp_path / "once")
    once = loaded(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    twice = loaded(tmp_path / "twice")
    assert torch.equal(logits(once), logits(original))
    assert torch.equal(logits(twice), logits(original))
    assert not torch.equal(logits(once), logits(build()))  # it is the quantised one
    assert once.tsq_report == twice.tsq_report == original.tsq_report
    config, again = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice")
    )
    assert config == again


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 2, "symmetric": True},
        {"bits": 8, "group_size": None, "scale_dtype": "float32"},
        {"rotation": 32, "activation_bits": 8},
        {"overrides": {"*.down_proj": {"bits": 4}}, "skip": ("*.o_proj",)},
    ],
    ids=["symmetric", "float32-rows", "rotated-int8-inputs", "mixed"],
)
def test_every_form_of_layer_comes_back(changes: Any, tmp_path: Path) -> None:
    original = quantised(**changes)
    original.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(original))


@pytest.mark.parametrize(
    "tokens", [{"method": "lnq"}, {"zero_points": "float"}], ids=["tables", "offsets"]
)
def test_calibrated_forms_come_back(tokens: Any, tmp_path: Path) -> None:
    config = tsq.QuantConfig(
        **{"bits": 2, "group_size": 32, "skip": ("lm_head", "*.layers.0.*", "*attn*"), **tokens}
    )
    original = tsq.quantize(llama(), config, [torch.arange(2048).reshape(32, 64) * 7 % 48])
    original.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(original))


def test_encoder_goes_between_classes(tmp_path: Path) -> None:
    original = quantised(bert(), skip=("decoder",))
    original.save_pretrained(tmp_path / "whole")
    original.bert.save_pretrained(tmp_path / "base")
    hidden = original.bert(IDS).last_hidden_state
    assert torch.equal(
        loaded(tmp_path / "whole", AutoModelForMaskedLM)(IDS).logits, original(IDS).logits
    )
    logging.set_verbosity_error()  # a head that is not there is reported
    for folder, auto in [
        ("whole", AutoModel),
        ("base", AutoModel),
        ("base", AutoModelForSequenceClassification),
    ]:
        again = auto.from_pretrained(tmp_path / folder)
        base = getattr(again, "bert", again)
        assert torch.equal(base(IDS).last_hidden_state, hidden)
        assert isinstance(base.encoder.layer[1].output.dense, QuantLinear)
    logging.set_verbosity_warning()
    names = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"][
        "layers"
    ][0]["names"]
    assert all(name.startswith("encoder.") for name in names)
    original.save_pretrained(
        tmp_path / "again"
    )  # after its base model, with which it shares the config
    assert (tmp_path / "again/config.json").read_text() == (
        tmp_path / "whole/config.json"
    ).read_text()


def test_quantised_table_stays_tied_and_is_stored_once(tmp_path: Path) -> None:
    original = quantised(tied(), embeddings=True, skip=())
    original.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.lm_head is again.model.embed_tokens.matrix
    assert torch.equal(logits(again), logits(original))
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert sum(key.endswith(("lm_head.words", "embed_tokens.matrix.words")) for key in keys) == 1
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(original))


@pytest.mark.parametrize("build", [bert, roberta, modernbert], ids=lambda build: build.__name__)
def test_head_with_the_table_and_a_bias_that_another_module_has_too(
    build: Any, tmp_path: Path
) -> None:
    """In RoBERTa the head comes before the table; ModernBERT gives initial values to the head's weight."""
    original = quantised(build(), embeddings=True, skip=())
    original.save_pretrained(tmp_path)
    again = loaded(tmp_path, AutoModelForMaskedLM)
    head, table = again.get_output_embeddings(), again.get_input_embeddings()
    assert head is table.matrix
    assert torch.equal(logits(again), logits(original))
    assert torch.equal(logits(tsq.load(tmp_path, build())), logits(original))


def test_bias_of_a_packed_layer_that_two_others_have_too(tmp_path: Path) -> None:
    """The packed one is first: what the others share with it, and between them, is not theirs alone."""

    class Tied(BertPreTrainedModel):
        _tied_weights_keys = {"first.bias": "a.bias", "second.bias": "a.bias"}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.a, self.first, self.second = nn.Linear(64, 64), nn.LayerNorm(64), nn.LayerNorm(64)
            self.post_init()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(self.a(x)))

    config = BertConfig(**SIZES, intermediate_size=96, tie_word_embeddings=True)
    original = Tied(config)
    nn.init.normal_(original.a.bias)
    assert original.a.bias is original.first.bias is original.second.bias
    original = quantised(original.eval())
    original.save_pretrained(tmp_path)
    x = torch.randn(3, 64)
    assert torch.equal(loaded(tmp_path, Tied)(x), original(x))


def test_model_without_a_float_parameter(tmp_path: Path) -> None:
    """OLMo has norms without weights."""
    olmo = OlmoForCausalLM(OlmoConfig(**SIZES, **HEADS, intermediate_size=96))
    with pytest.raises(
        ConfigError, match="every parameter of OlmoForCausalLM is quantised.*embeddings, skip"
    ):
        quantised(olmo, embeddings=True, skip=()).save_pretrained(tmp_path)


def test_attention_of_torch(tmp_path: Path) -> None:
    """It is one module when the model is built, and split into layers in the files."""
    original = quantised(siglip(), skip=())
    assert isinstance(original.head.attention.q_proj, QuantLinear)
    original.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = original(pixels).pooler_output
        assert torch.equal(loaded(tmp_path, SiglipVisionModel)(pixels).pooler_output, expected)
        assert torch.equal(tsq.load(tmp_path, siglip())(pixels).pooler_output, expected)


def test_float_head_stays_tied(tmp_path: Path) -> None:
    quantised(tied()).save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_shards(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(loaded(tmp_path)), logits(model))
    assert torch.equal(logits(tsq.load(tmp_path, llama())), logits(model))


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "": "cpu"}]
)
def test_device_maps(device_map: Any, model: Any, saved: Path) -> None:
    assert torch.equal(logits(loaded(saved, device_map=device_map)), logits(model))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_layers_on_disk(model: Any, saved: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    again = loaded(saved, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_changes_what_is_computed_in_and_no_grid(dtype: torch.dtype, tmp_path: Path) -> None:
    original = quantised(gpt2(), scale_dtype="float32")  # a cast through ``dtype`` would be seen
    original.save_pretrained(tmp_path)
    again = loaded(tmp_path, dtype=dtype)
    layer, expected = again.transformer.h[0].mlp.c_fc, original.transformer.h[0].mlp.c_fc
    assert layer.dtype == layer.bias.dtype == logits(again).dtype == dtype
    assert torch.equal(layer.scales, expected.scales)
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.words, expected.words)
    assert torch.equal(logits(again), logits(original.to(dtype)))


def test_what_was_loaded_can_generate_and_be_copied(saved: Path) -> None:
    again = loaded(saved)
    written = again.generate(IDS, max_new_tokens=3, do_sample=False)
    assert written.shape == (1, 15)
    assert again.hf_quantizer.is_serializable()


# --- one directory for both ---------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, tied, mixtral], ids=lambda build: build.__name__)
def test_directory_of_save_pretrained_is_loaded_by_tsq_load(build: Any, tmp_path: Path) -> None:
    original = quantised(build())
    original.save_pretrained(tmp_path)
    again = tsq.load(tmp_path, build())
    assert torch.equal(logits(again), logits(original))
    assert again.tsq_report == original.tsq_report
    assert torch.equal(logits(load_causal_lm(tmp_path)), logits(original))


@pytest.mark.parametrize("build", [llama, tied, mixtral], ids=lambda build: build.__name__)
def test_directory_of_save_causal_lm_is_loaded_by_both(build: Any, tmp_path: Path) -> None:
    original = quantised(build())
    save_causal_lm(original, None, tmp_path)
    assert torch.equal(logits(load_causal_lm(tmp_path)), logits(original))
    again = loaded(tmp_path)
    assert torch.equal(logits(again), logits(original))
    assert again.tsq_report == original.tsq_report


def test_what_tsq_load_made_can_be_saved_by_transformers(model: Any, tmp_path: Path) -> None:
    tsq.save(model, tmp_path / "plain")
    tsq.load(tmp_path / "plain", llama()).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))


def test_values_that_transformers_does_not_save_are_asked_for_on_the_meta_device(
    saved: Path,
) -> None:
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(
        CheckpointError, match="non_persistent:.*inv_freq.*build the model on a real device"
    ):
        tsq.load(saved, empty)


def test_command_line_takes_the_directory(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved)]) == 0
    assert UP in capsys.readouterr().out


# --- quantising on load --------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, mixtral], ids=lambda build: build.__name__)
def test_float_checkpoint_is_rounded_on_load(build: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "float")
    again = loaded(tmp_path / "float", quantization_config=TsqConfig(RTN))
    assert torch.equal(logits(again), logits(tsq.quantize(build(), RTN)))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(again))


@pytest.mark.parametrize(
    "given",
    [
        TsqConfig(method="rtn", bits=3, group_size=32),
        {"quant_method": "tsq", "method": "rtn", "bits": 3, "group_size": 32},
    ],
)
def test_fields_can_be_given_in_the_place_of_a_config(given: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path, quantization_config=given)), logits(quantised()))


def test_method_that_needs_calibration_is_refused_with_what_to_do(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"'two-stage'.*needs calibration.*tsq_layers.quantize\(model, config, batches\)",
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TsqConfig(bits=4))


def test_config_without_anything_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="says nothing of how to quantise"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TsqConfig())


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="'bitz'"):
        TsqConfig(bitz=3)
    with pytest.raises(ConfigError, match="bits=9"):
        TsqConfig(bits=9)
    with pytest.raises(ConfigError, match="one or the other"):
        TsqConfig(RTN, bits=3)


# --- what is wrong is said ----------------------------------------------------------------------


@pytest.fixture
def copy(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def change_config(folder: Path, change: Any) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_missing_tensor_names_its_layer(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.pop(f"{UP}.scale_bits"))
    for load in (AutoModelForCausalLM.from_pretrained, lambda folder: tsq.load(folder, llama())):
        with pytest.raises(CheckpointError, match=rf"{UP}.*scale_bits"):
            load(copy)


def test_tensor_of_another_shape_names_its_layer(copy: Path) -> None:
    change_tensors(
        copy,
        lambda tensors: tensors.update(
            {f"{UP}.words": tensors[f"{UP}.words"][:, :-1].contiguous()}
        ),
    )
    for load in (AutoModelForCausalLM.from_pretrained, lambda folder: tsq.load(folder, llama())):
        with pytest.raises(CheckpointError, match=rf"{UP}.*int32 \[96, 5\]"):
            load(copy)


def test_other_bits_in_the_config_name_a_layer(copy: Path) -> None:
    change_config(copy, lambda values: values["quantization_config"]["layers"][0].update(bits=4))
    with pytest.raises(
        CheckpointError, match=r"layer 'model.layers.0.self_attn.q_proj'.*int32 \[64, 8\]"
    ):
        AutoModelForCausalLM.from_pretrained(copy)


def test_config_of_another_model_names_a_layer(copy: Path) -> None:
    change_config(copy, lambda values: values.update(num_hidden_layers=1))
    with pytest.raises(
        CheckpointError,
        match=r"'model.layers.1.self_attn.q_proj'.*config.json is that of another model",
    ):
        AutoModelForCausalLM.from_pretrained(copy)
    change_config(copy, lambda values: values.update(num_hidden_layers=2, hidden_size=32))
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_proj'.*shape"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_damaged_file_is_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors .*damaged or incomplete"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(schema_version=2), "schema_version=2"),
        (lambda q: q.pop("aliases"), "'aliases'"),
        (lambda q: q["layers"][0].pop("names"), "entry 0 of layers"),
        (lambda q: q["layers"][0].update(colour=1), "'colour'"),
        (lambda q: q["layers"][0].update(bits="3"), "bits='3'"),
    ],
    ids=["version", "section", "names", "unknown", "type"],
)
def test_outline_that_cannot_be_used_is_refused(change: Any, message: str, copy: Path) -> None:
    change_config(copy, lambda values: change(values["quantization_config"]))
    for load in (AutoModelForCausalLM.from_pretrained, lambda folder: tsq.load(folder, llama())):
        with pytest.raises(CheckpointError, match=message):
            load(copy)


def test_outline_without_layers_is_refused(copy: Path) -> None:
    change_config(copy, lambda values: values["quantization_config"].pop("layers"))
    with pytest.raises((ConfigError, CheckpointError)):
        AutoModelForCausalLM.from_pretrained(copy)


# --- without the import ---------------------------------------------------------------------------


def elsewhere(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


PLAIN = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
print("loaded")
"""


@pytest.mark.parametrize("build", [llama, mixtral], ids=lambda build: build.__name__)
def test_without_the_import_loading_is_an_error_and_not_a_model_with_random_weights(
    build: Any, tmp_path: Path
) -> None:
    quantised(
        build(), **({"skip": ("lm_head", "*attn*")} if build is mixtral else {})
    ).save_pretrained(tmp_path)
    found = elsewhere(PLAIN, tmp_path)
    assert found.returncode == 1
    assert "loaded" not in found.stdout
    assert "RuntimeError" in found.stderr
    assert "Unknown quantization type, got tsq" in found.stderr


def test_with_the_import_a_fresh_process_has_the_same_logits(model: Any, saved: Path) -> None:
    script = """
import sys, torch
import tsq_layers.integrations.transformers
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
save_file({"logits": model(torch.arange(12).unsqueeze(0) * 3 % 48).logits.detach()}, sys.argv[2])
"""
    found = elsewhere(script, saved, saved / "logits")
    assert found.returncode == 0, found.stderr
    assert torch.equal(load_file(saved / "logits")["logits"], logits(model))


def test_saving_needs_no_import(tmp_path: Path) -> None:
    script = """
import sys
import tsq_layers as tsq
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
model = tsq.quantize(LlamaForCausalLM(LlamaConfig(**sizes)), tsq.QuantConfig(method="rtn"))
model.save_pretrained(sys.argv[1])
"""
    found = elsewhere(script, tmp_path)
    assert found.returncode == 0, found.stderr
    assert (
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"]
        == "tsq"
    )
    assert isinstance(loaded(tmp_path).model.layers[0].mlp.up_proj, QuantLinear)


# --- directories that were written before -----------------------------------------------------------------------------


def test_what_save_pretrained_writes_over_a_directory_of_ours_is_what_is_read(
    tmp_path: Path,
) -> None:
    first, second = (
        tsq.quantize(llama(), RTN),
        tsq.quantize(llama(), tsq.QuantConfig(method="rtn", bits=4, group_size=32)),
    )
    save_causal_lm(first, None, tmp_path)
    second.save_pretrained(tmp_path)
    assert torch.equal(logits(tsq.load(tmp_path, llama())), logits(second))
    assert torch.equal(logits(load_causal_lm(tmp_path)), logits(second))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).tsq_report.layers[0].bits == 4
    llama().save_pretrained(tmp_path)
    assert torch.equal(logits(load_causal_lm(tmp_path)), logits(llama()))
    with pytest.raises(CheckpointError, match="of different saves"):
        tsq.load(tmp_path, llama())


def test_a_save_into_a_directory_with_shards_of_another_is_what_is_read(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    model = tsq.quantize(llama(), RTN)
    save_causal_lm(model, None, tmp_path)
    for again in (
        tsq.load(tmp_path, llama()),
        load_causal_lm(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits(again), logits(model))


def test_what_the_base_model_is_loaded_as_is_exported_as_the_same_kind(tmp_path: Path) -> None:
    tsq.quantize(gpt2(), RTN).save_pretrained(tmp_path / "model")
    base = AutoModel.from_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match="'h.0.attn.c_attn' .Conv1D."):
        tsq.export_checkpoint(base, tmp_path / "out", format="compressed-tensors")
