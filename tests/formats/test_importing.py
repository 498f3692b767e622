"""Checkpoints of other tools: every code and scale as a slow reader finds it, and what is refused."""

import json
import re

import pytest
import torch
from export_models import TOKENS, UP, llama, quantised
from oracles.exports import compressed_weight, gptq_weight
from safetensors.torch import load_file, save_file
from test_export_gptq import gpt2

import tsq_layers as tsq
from tsq_layers.errors import CheckpointError, LayerError, MissingExtraError
from tsq_layers.formats import words
from tsq_layers.formats.bitstream import pack
from tsq_layers.integrations.transformers import load_causal_lm, save_causal_lm
from tsq_layers.layers import packed

FORMATS = ["gptq", "gptq-v1", "compressed-tensors"]


def exported(model, folder, form="gptq", **options):
    return tsq.export_checkpoint(model, folder / "out", format=form, **options)


def changed_file(folder, **changes):
    """Rewrite the tensors of a directory; a value is the new tensor, or ``None`` to leave it out."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file(
        {k: t.contiguous() for k, t in tensors.items() if t is not None},
        folder / "model.safetensors",
    )
    return tensors


def changed_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def assert_same(found, model):
    """All packed layers and all logits, bit for bit."""
    layers = {name: matrix for name, _, matrix in packed(model)}
    assert {name for name, _, _ in packed(found)} == layers.keys()
    for name, _, matrix in packed(found):
        one, other = matrix.quantized_weight(), layers[name].quantized_weight()
        assert torch.equal(one.codes, other.codes), name
        assert torch.equal(one.scales.double(), other.scales.double()), name
        assert torch.equal(one.zeros, other.zeros), name
        assert (one.bits, one.group_size, one.symmetric) == (
            other.bits,
            other.group_size,
            other.symmetric,
        )
    with torch.no_grad():
        assert torch.equal(
            found.to(model.dtype)(TOKENS).logits, model(TOKENS).logits
        )  # buffers of rotary embeddings too


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_what_was_exported_comes_back(tmp_path, form, bits, symmetric):
    model = quantised(bits, symmetric=symmetric)
    if form == "gptq-v1" and not symmetric:
        for _, _, matrix in packed(model):
            weight = matrix.quantized_weight()
            zeros = weight.zeros.clamp(min=1)
            new = tsq.QuantLinear.from_quantized(type(weight)(**{**vars(weight), "zeros": zeros}))
            matrix.zero_words = new.zero_words
    assert_same(tsq.import_checkpoint(exported(model, tmp_path, form)), model)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": None},
        {"sizes": {"tie_word_embeddings": True}},
        {"sizes": {"mlp_bias": True, "attention_bias": True}},
        {"skip": ("lm_head", "layers.0.mlp.*")},
        {"sizes": {"dtype": torch.float16}},
    ],
    ids=["whole rows", "tied", "biases", "float layers", "half precision"],
)
def test_models_of_every_make_come_back(tmp_path, form, options):
    model = quantised(**options)
    assert_same(
        tsq.import_checkpoint(exported(model, tmp_path, form, max_shard_size="20KB")), model
    )


def test_several_schemes_come_back(tmp_path):
    model = quantised(overrides={"*.down_proj": {"bits": 8}, "*.q_proj": {"group_size": None}})
    assert_same(tsq.import_checkpoint(exported(model, tmp_path, "compressed-tensors")), model)


def test_gpt2_comes_back(tmp_path):
    model = gpt2()
    assert_same(tsq.import_checkpoint(exported(model, tmp_path)), model)


def test_a_changed_code_is_seen(tmp_path):
    model = quantised()
    folder = exported(model, tmp_path)
    tensors = changed_file(folder)
    changed_file(folder, **{f"{UP}.qweight": tensors[f"{UP}.qweight"] ^ 1})
    with pytest.raises(AssertionError):
        assert_same(tsq.import_checkpoint(folder), model)


@pytest.mark.parametrize("form", FORMATS)
def test_slow_reader_finds_the_same_weight(tmp_path, form):
    folder = exported(quantised(3), tmp_path, form)
    tensors = load_file(folder / "model.safetensors")
    found = tsq.import_checkpoint(folder).get_submodule(UP).dequantize(torch.float64)
    if form == "compressed-tensors":
        assert torch.equal(found, compressed_weight(tensors, UP, 3, 32))
    else:
        assert torch.equal(found, gptq_weight(tensors, UP, 3, 1 if form == "gptq-v1" else 2))


# --- layouts of others -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_unpacked(bits):
    codes = torch.randint(
        1 << bits, (3, 77), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    assert torch.equal(words.unpack(pack(codes, bits), bits, 77), codes)
    each = 32 // bits
    padded = torch.zeros(3, -(-77 // each), dtype=torch.int64)
    for k in range(77):
        padded[:, k // each] |= codes[:, k].to(torch.int64) << (bits * (k % each))
    assert torch.equal(words.unpack_padded(padded.to(torch.int32), bits, 77), codes)


def test_wrong_words_are_refused():
    with pytest.raises(
        LayerError, match=r"words are torch.int32 of shape \(1, 2\); 77 codes of 3 bits are int32"
    ):
        words.unpack(torch.zeros(1, 2, dtype=torch.int32), 3, 77)


def whole_words(zeros, bits):
    """Zero points less one as GPTQModel takes it off: from whole words, so that a borrow goes on."""
    ones = pack(torch.ones(1, 32 // bits, dtype=torch.uint8), bits)
    return pack(zeros, bits) - ones


def single_fields(zeros, bits):
    """Zero points less one, each for itself."""
    return pack((zeros.to(torch.int16) - 1).to(torch.uint8) & ((1 << bits) - 1), bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("maker", "stored"),
    [
        (["gptqmodel:7.7.0"], whole_words),
        (["autogptq:0.7.1"], single_fields),
        (None, single_fields),
    ],
    ids=["GPTQModel", "AutoGPTQ", "unknown"],
)
def test_zero_points_of_0_in_version_1_are_read_as_their_maker_wrote_them(
    tmp_path, bits, maker, stored
):
    model = quantised(bits, symmetric=False)
    zeros = torch.arange(96 * 2).remainder(1 << bits).to(torch.uint8).view(2, 96)
    weight = model.get_submodule(UP).quantized_weight()
    same = type(weight)(**{**vars(weight), "zeros": zeros.T.contiguous()})
    model.set_submodule(UP, tsq.QuantLinear.from_quantized(same))
    folder = exported(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    names = [name for name, _, _ in packed(model)]
    qzeros = {
        f"{n}.qzeros": stored(
            words.unpack(tensors[f"{n}.qzeros"], bits, tensors[f"{n}.scales"].shape[1]), bits
        )
        for n in names
    }
    changed_file(folder, **qzeros)
    changed_config(folder, checkpoint_format="gptq", meta={"quantizer": maker} if maker else None)
    assert_same(tsq.import_checkpoint(folder), model)


def test_old_words_and_unpacked_zero_points_are_read(tmp_path):
    model = quantised(3, symmetric=False)
    folder = exported(model, tmp_path, "compressed-tensors")
    changes = {}
    for name, _, matrix in packed(model):
        weight = matrix.quantized_weight()
        rows, columns = weight.codes.shape
        old = torch.zeros(rows, -(-columns // 10), dtype=torch.int64)
        for k in range(columns):
            old[:, k // 10] |= weight.codes[:, k].to(torch.int64) << (3 * (k % 10))
        changes[f"{name}.weight_packed"] = old.to(torch.int32)
        changes[f"{name}.weight_zero_point"] = (weight.zeros.to(torch.int16) - 4).to(torch.int8)
    changed_file(folder, **changes)
    assert_same(tsq.import_checkpoint(folder), model)


def test_bytes_are_read(tmp_path):
    model = quantised(8, None)
    folder = exported(model, tmp_path, "compressed-tensors")
    changes = {}
    for name, _, matrix in packed(model):
        codes = matrix.quantized_weight().codes
        changes |= {f"{name}.weight": (codes.to(torch.int16) - 128).to(torch.int8)}
        changes |= {f"{name}.weight_packed": None, f"{name}.weight_shape": None}
    changed_file(folder, **changes)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config["config_groups"]["group_0"]["format"] = "int-quantized"
    changed_config(folder, **config)
    assert_same(tsq.import_checkpoint(folder), model)


def test_configuration_may_be_in_a_file_of_its_own(tmp_path):
    model = quantised()
    folder = exported(model, tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = config.pop("quantization_config")
    del own["quant_method"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "quantize_config.json").write_text(json.dumps(own), encoding="utf-8")
    assert_same(tsq.import_checkpoint(folder), model)


# --- around it ---------------------------------------------------------------------------------


def test_a_given_model_is_filled(tmp_path):
    model, given = quantised(), llama()
    found = tsq.import_checkpoint(exported(model, tmp_path), given)
    assert found is given
    assert_same(found, model)


def test_dtype_is_as_asked(tmp_path):
    found = tsq.import_checkpoint(exported(quantised(), tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert found.get_submodule(UP).weight.dtype == torch.bfloat16
    assert found.get_submodule(UP).scale_dtype == torch.float16


def test_it_is_saved_loaded_and_reported(tmp_path):
    model = quantised(3)
    found = tsq.import_checkpoint(exported(model, tmp_path))
    report = found.tsq_report
    assert (len(report.quantized), report.config.bits, report.layers[0].method) == (14, 3, None)
    assert report.size_before > report.size_after
    assert 0 < report.coverage < 1
    assert "model.embed_tokens.weight" in {parameter.name for parameter in report.gaps()}
    save_causal_lm(found, None, tmp_path / "own")
    loaded = load_causal_lm(tmp_path / "own")
    assert_same(loaded, model)
    assert loaded.tsq_report == report
    assert found.config.quantization_config.quant_method == "tsq"  # not the file's


def test_a_tied_output_layer_stays_tied(tmp_path):
    found = tsq.import_checkpoint(
        exported(quantised(sizes={"tie_word_embeddings": True}), tmp_path)
    )
    assert found.lm_head.weight is found.model.embed_tokens.weight


# --- refusals ----------------------------------------------------------------------------------


def test_activation_order_is_refused_with_the_cure(tmp_path):
    folder = exported(quantised(), tmp_path)
    order = load_file(folder / "model.safetensors")[f"{UP}.g_idx"].flip(0)
    changed_file(folder, **{f"{UP}.g_idx": order})
    with pytest.raises(CheckpointError, match=rf"{UP}.*by activation order.*desc_act=False"):
        tsq.import_checkpoint(folder)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        (
            "gptq",
            {"quant_method": "awq"},
            "quant_method='awq' of .* is not known: checkpoints of gptq, compressed-tensors",
        ),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not known"),
        ("gptq", {"pack_dtype": "int64"}, "pack_dtype='int64' is not known"),
        ("gptq", {"group_size": 48}, "groups of 96 columns do not fit the group size 48"),
        (
            "compressed-tensors",
            {"config_groups": {"a": {"format": "float-quantized"}}},
            "format 'float-quantized'",
        ),
        (
            "compressed-tensors",
            {
                "config_groups": {
                    "a": {"format": "pack-quantized", "input_activations": {"num_bits": 8}}
                }
            },
            "quantises inputs",
        ),
        (
            "compressed-tensors",
            {"config_groups": {}},
            "no group of its quantization_config names it",
        ),
    ],
    ids=["method", "version", "words", "groups", "format", "inputs", "scheme"],
)
def test_unknown_checkpoints_are_refused(tmp_path, form, changes, message):
    folder = exported(quantised(), tmp_path, form)
    changed_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        tsq.import_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.norm.weight": None},
            "'model.norm.weight' of the model is not in the checkpoint, with 0 others",
        ),
        (
            {"model.more": torch.zeros(1)},
            "'model.more' of the checkpoint is not in the model, with 0 others",
        ),
        ({f"{UP}.qzeros": None}, f"'{UP}.qzeros' is missing in"),
        (
            {"model.norm.weight": torch.ones(3)},
            r"'model.norm.weight' has shape \(3,\) in the checkpoint and \(64,\)",
        ),
        (
            {"model.no.qweight": torch.zeros(4, 4, dtype=torch.int32)},
            "layer 'model.no' .* is not in this LlamaForCausalLM",
        ),
    ],
    ids=["missing", "unexpected", "half a layer", "shape", "other layer"],
)
def test_files_that_do_not_fit_are_refused(tmp_path, changes, message):
    folder = exported(quantised(), tmp_path)
    changed_file(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        tsq.import_checkpoint(folder)


@pytest.mark.parametrize(
    ("form", "part", "value"),
    [
        ("gptq", "g_idx", torch.zeros(0, dtype=torch.int32)),
        ("gptq", "qweight", torch.zeros(4, dtype=torch.int32)),
        ("gptq", "scales", torch.ones(2, 96, dtype=torch.float64)),
        ("gptq", "scales", torch.full((2, 96), float("nan"), dtype=torch.float16)),
        ("compressed-tensors", "weight_scale", torch.ones(7, 2)),
        ("compressed-tensors", "weight_shape", torch.tensor([96])),
        ("compressed-tensors", "weight_packed", torch.zeros(96, 8, dtype=torch.int64)),
        ("compressed-tensors", "weight_scale", torch.full((96, 2), float("inf"))),
    ],
    ids=[
        "no order",
        "flat words",
        "wide scales",
        "no numbers",
        "few scales",
        "half a shape",
        "wide words",
        "infinite",
    ],
)
def test_tensors_that_make_no_layer_are_refused_by_its_name(tmp_path, form, part, value):
    folder = exported(quantised(), tmp_path, form)
    changed_file(folder, **{f"{UP}.{part}": value})
    with pytest.raises(CheckpointError, match=f"layer '{UP}' of the checkpoint"):
        tsq.import_checkpoint(folder)


def test_descriptions_that_make_no_sense_are_refused(tmp_path):
    folder = exported(quantised(), tmp_path)
    changed_config(folder, group_size="32")
    with pytest.raises(CheckpointError, match="layer '.*' of the checkpoint"):
        tsq.import_checkpoint(folder)
    for index in ({}, {"weight_map": ["a"]}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(CheckpointError, match="has no weight_map"):
            tsq.import_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": []}), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="is a list, and an object was expected"):
        tsq.import_checkpoint(folder)


def test_a_refusal_leaves_the_given_model_alone(tmp_path):
    folder, given = exported(quantised(), tmp_path), llama()
    changed_file(folder, **{"model.norm.weight": torch.ones(3)})
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    with pytest.raises(CheckpointError):
        tsq.import_checkpoint(folder, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())


@pytest.mark.parametrize("what", ["nothing", "float", "files"])
def test_directories_without_a_checkpoint_are_refused(tmp_path, what):
    messages = {
        "nothing": "holds no config.json",
        "float": "has no quantization_config",
        "files": "no safetensors files",
    }
    if what == "float":
        llama().save_pretrained(tmp_path)
    elif what == "files":
        (exported(quantised(), tmp_path) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=messages[what]):
        tsq.import_checkpoint(tmp_path / "out" if what == "files" else tmp_path)


def test_without_transformers_a_model_is_asked_for(tmp_path, monkeypatch):
    folder = exported(quantised(), tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(
        MissingExtraError, match=re.escape('pip install "tsq_layers[hf]", or give a model')
    ):
        tsq.import_checkpoint(folder)
