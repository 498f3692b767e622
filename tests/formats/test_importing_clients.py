"""Checkpoints that GPTQModel and llm-compressor write themselves: the very weights that they load."""

import pytest
import torch
from export_models import llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tsq_layers as tsq
from tsq_layers.errors import CheckpointError
from tsq_layers.layers import packed

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def source(tmp_path):
    """The directory of a float model."""
    directory = tmp_path / "float"
    llama().save_pretrained(directory)
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="a", eos_token="b", pad_token="b"
    )
    tokenizer.save_pretrained(directory)
    return directory


def samples(count=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(48, (1, 48), generator=generator) for _ in range(count)]


def by_gptqmodel(source, folder, **options):
    gptqmodel = pytest.importorskip("gptqmodel")
    options = {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "act_group_aware": False,
        **options,
    }
    config = gptqmodel.QuantizeConfig(**options, device="cpu", offload_to_disk=False)
    model = gptqmodel.GPTQModel.load(str(source), config, dtype=torch.float32)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in samples()]
    model.quantize(batches, batch_size=4)
    model.save(str(folder))
    loading = {"device": "cpu", "backend": gptqmodel.BACKEND.GPTQ_TORCH, "dtype": torch.float16}
    return gptqmodel.GPTQModel.load(str(folder), **loading).model


@pytest.mark.parametrize(
    "options",
    [
        *({"bits": bits, "sym": sym} for bits in (2, 3, 4, 8) for sym in (True, False)),
        {"group_size": -1},
        {"act_group_aware": True},
        {"format": "gptq_v2", "sym": False},
    ],
    ids=str,
)
def test_weights_of_gptqmodel_are_the_same(source, tmp_path, options):
    loaded = by_gptqmodel(source, tmp_path / "out", **options)
    found = tsq.import_checkpoint(tmp_path / "out")
    layers = {name: matrix for name, _, matrix in packed(found)}
    assert len(layers) == 14
    for name, matrix in layers.items():
        theirs = loaded.get_submodule(name).dequantize_weight().T
        assert torch.equal(matrix.dequantize(torch.float16), theirs.to(torch.float16)), name


def test_activation_order_of_gptqmodel_is_refused(source, tmp_path):
    by_gptqmodel(source, tmp_path / "out", desc_act=True)
    with pytest.raises(CheckpointError, match="by activation order"):
        tsq.import_checkpoint(tmp_path / "out")


def by_llmcompressor(source, folder, **options):
    pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    options = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        **options,
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**options))
    rows = [ids[0].tolist() for ids in samples()]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 48] * len(rows)})
    recipe = GPTQModifier(
        config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=0.01
    )
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=48,
        num_calibration_samples=len(rows),
    )
    weights = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "weight")
    }
    model.save_pretrained(folder, save_compressed=True)
    return weights  # quantised and dequantised


@pytest.mark.parametrize(
    "options",
    [
        *({"num_bits": bits, "symmetric": sym} for bits in (2, 3, 4, 8) for sym in (True, False)),
        {"strategy": "channel", "group_size": None},
        {"actorder": "static"},
    ],
    ids=str,
)
def test_weights_of_llmcompressor_are_the_same(source, tmp_path, options):
    weights = by_llmcompressor(source, tmp_path / "out", **options)
    found = tsq.import_checkpoint(tmp_path / "out")
    layers = {name: matrix for name, _, matrix in packed(found)}
    assert len(layers) == 14
    for name, matrix in layers.items():
        assert torch.equal(matrix.dequantize(torch.float32), weights[name]), name
