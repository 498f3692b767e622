"""Every example runs, and shows what it is there to show."""

import importlib.util
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import tsq_layers as tsq
from tsq_layers.errors import FewTokensWarning

EXAMPLES = Path(__file__).parents[1] / "examples"
FAMILIES = {  # the kinds of layers that each family is quantised in
    "decoder": {"Linear"},
    "encoder": {"Linear"},
    "gpt2": {"Conv1D"},
    "speech": {"Linear", "Conv1d"},
    "vision": {"Linear", "Conv2d"},
    "experts": {"Linear"},
}
INTEGRATIONS = {
    "ahead_of_time",
    "export",
    "finetune",
    "from_pretrained",
    "harness",
    "import_gptq",
    "serve_vllm",
    "with_torch_ao",
    "with_torchao",
}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
    runpy.run_path(path, run_name="__main__")


def shown(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern!r} is not in\n{text}"
    return found[1]


def quantised_kinds(text: str) -> set[str]:
    """Kinds in the lines of the report's table that say "quantized"."""
    return set(re.findall(r"^\S+ +(\S+) +\d+×\d+ +(?:quantized|fallback) ", text, re.MULTILINE))


def test_all_families_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"any_module", *FAMILIES, *INTEGRATIONS}


def test_any_module_is_best_by_two_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("any_module", monkeypatch=monkeypatch)
    found = re.findall(r"2 bits, (\S+)\s*: cross-entropy (\d+\.\d+)", capsys.readouterr().out)
    entropy = {method: float(value) for method, value in found}
    assert entropy["two-stage"] < min(entropy["gptq"], entropy["rtn"])


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("form", ["gptq", "gptq-v1", "compressed-tensors", "gguf"])
def test_export_is_loaded_by_its_client_or_says_what_is_missing(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("export", "--format", form, "--windows", 1, "--length", 64, monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    ours = float(shown(text, r"ours: perplexity (\S+)"))
    if "not compared" not in text:
        assert float(shown(text, r", symmetric, in .*: perplexity (\S+)")) == pytest.approx(
            ours, rel=1e-3
        )


def test_imported_checkpoint_is_better_after_refinement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("import_gptq", monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    errors = [
        float(shown(text, rf"{name}: relative error of the logits (\S+)"))
        for name in ("theirs", "refined")
    ]
    assert errors[1] < 0.95 * errors[0]
    assert shown(text, r"written as gptq, loaded: same logits: (\w+)") == "True"


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_quantised_saved_and_loaded(
    family: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(family, monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert quantised_kinds(text) == FAMILIES[family]
    assert 0 < float(shown(text, r"relative error of the \w+ (\S+)")) < 0.25
    assert shown(text, r"loaded: same \w+: (\w+)") == "True"


def test_from_pretrained_and_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("from_pretrained", monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    sizes = [
        int(shown(text, rf"{name}: ([\d,]+) bytes").replace(",", ""))
        for name in ("float", "calibrated")
    ]
    assert sizes[1] < sizes[0] / 2
    assert float(shown(text, r"calibrated: perplexity (\S+)")) < float(
        shown(text, r"rounded on load: perplexity (\S+)")
    )
    assert shown(text, r"loaded: same \w+: (\w+)") == "True"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_finetune_lowers_loss_and_perplexity(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    run("finetune", monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    for name in ("trained on", "held out"):
        before, after = (
            float(shown(text, rf"text {name}, {when}: (\S+)")) for when in ("before", "after")
        )
        assert after < before
    assert shown(text, r"loaded: same \w+: (\w+)") == "True"


@pytest.mark.filterwarnings("default")  # those of the harness are its own affair
def test_harness_scores_a_quantised_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    run("harness", monkeypatch=monkeypatch)
    assert 0 <= float(shown(capsys.readouterr().out, r"what_follows: (\S+) right")) <= 1


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_torchao_applies_our_configuration_and_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    run("with_torchao", monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert re.findall(r"QuantLinear.*bits=(\d)", text) == ["4", "2"]
    assert "Int8Tensor" in text
    assert float(shown(text, r"error of the output (\S+)")) < 0.5


@pytest.mark.filterwarnings("ignore")  # torch.ao's own
def test_passes_of_torch_ao_before_and_after(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("with_torch_ao", monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert "DynamicQuantizedLSTM" in text
    assert shown(text, r"still zero: (\w+)") == "True"
    assert float(shown(text, r"error of the output (\S+)")) < 0.1


@pytest.mark.filterwarnings("ignore")  # torch.export's own
def test_an_exported_program_gives_the_same_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("ahead_of_time", monkeypatch=monkeypatch)
    assert shown(capsys.readouterr().out, r"same output: (\w+)") == "True"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.filterwarnings("ignore")  # vLLM's own
def test_a_served_model_gives_the_same_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("serve_vllm", monkeypatch=monkeypatch)
    assert shown(capsys.readouterr().out, r"served: same tokens: (\w+)") == "True"


def test_other_outputs_after_loading_are_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tsq, "load", lambda _folder, model: model
    )  # the float model, as if nothing had been saved
    run("encoder", monkeypatch=monkeypatch)
    assert shown(capsys.readouterr().out, r"loaded: same \w+: (\w+)") == "False"


def test_layers_that_were_left_alone_are_not_counted() -> None:
    lines = "layer  kind    shape  status     method\nfc     Linear  8×16  skipped    –\nconv   Conv2d  8×16  quantized  rtn"  # noqa: E501
    assert quantised_kinds(lines) == {"Conv2d"}


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A text of ten words, twenty a line."""
    numbers = torch.randint(10, (512, 20), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path / "words.txt"
    path.write_text(
        "\n".join(" ".join(WORDS[number] for number in line) for line in numbers), encoding="utf-8"
    )
    return path


def saved(model: nn.Module, directory: Path) -> Path:
    """A model directory with a tokenizer that knows the ten words."""
    vocabulary = {word: number for number, word in enumerate([*WORDS, "[UNK]", "[PAD]"])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_model_directory_and_text_are_taken(
    family: str,
    words: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {
        "vocab_size": 12,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 11}
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**sizes, **tokens))
        if family == "decoder"
        else BertModel(BertConfig(**sizes))
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FewTokensWarning
        )  # the encoder's pooler sees one token a text
        run(family, saved(model, tmp_path / "model"), words, monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert quantised_kinds(text) == {"Linear"}
    assert shown(text, r"loaded: same \w+: (\w+)") == "True"
