"""The command line from end to end on a tiny Llama, and its one-line errors."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
)

import tsq_layers as tsq
from tsq_layers import cli
from tsq_layers.cli import evaluation, program
from tsq_layers.errors import CheckpointError, ConfigError, MissingExtraError
from tsq_layers.evaluation import perplexity
from tsq_layers.integrations import causal_lm
from tsq_layers.integrations.transformers import (
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    save_causal_lm,
    windows,
)
from tsq_layers.planning import Plan

SENTENCE = "The quick brown fox jumps over the lazy dog, and the state of our union is strong. "

pytestmark = pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")


@pytest.fixture(scope="module")
def float_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers with random weights and a byte-level tokenizer trained on one sentence."""
    directory = tmp_path_factory.mktemp("float")
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(
        [SENTENCE],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(SENTENCE * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantised_directory(
    float_directory: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("quantised") / "model"
    with torch.compiler.set_stance(
        "force_eager"
    ):  # conftest has it for each test, not for what a module shares
        assert cli.main(quantize_arguments(float_directory, directory, text)) == 0
    return directory


def quantize_arguments(source: Path, out: Path, text: Path, *more: str) -> list[str]:
    data = ["--text", str(text), "--tokens", "256", "--sequence-length", "32"]
    return [
        "quantize",
        str(source),
        "--out",
        str(out),
        "--bits",
        "3",
        "--group-size",
        "16",
        *data,
        *more,
    ]


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a command which fails writes."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tsq: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_quantize_writes_a_model_that_loads_with_the_same_logits(quantised_directory: Path) -> None:
    assert {
        "model.safetensors",
        "tsq.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    } <= {path.name for path in quantised_directory.iterdir()}
    first, second = load_causal_lm(quantised_directory), load_causal_lm(quantised_directory)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
    assert not any(tensor.is_meta for tensor in [*first.parameters(), *first.buffers()])
    assert {layer.bits for layer in first.tsq_report.quantized} == {3}
    assert len(first.tsq_report.quantized) == 14


def test_quantize_summarises_on_stdout(
    float_directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert (
        cli.main(quantize_arguments(float_directory, out, text, "--method", "gptq", "--symmetric"))
        == 0
    )
    captured = capsys.readouterr()
    assert re.match(
        r"14 of \d+ layers quantised, .*; 4\.067 bits per weight\n", captured.out
    )  # 3 + 16 / 16
    assert f"saved in {out}" in captured.out
    assert captured.err == ""


def test_rtn_needs_no_text(
    float_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(
            [
                "quantize",
                str(float_directory),
                "--out",
                str(tmp_path / "model"),
                "--method",
                "rtn",
                "--group-size",
                "none",
            ]
        )
        == 0
    )
    assert "14 of " in capsys.readouterr().out
    assert load_causal_lm(tmp_path / "model").tsq_report.config == tsq.QuantConfig(
        method="rtn", group_size=None
    )


def test_options_change_a_configuration_file(float_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        tsq.QuantConfig(
            method="rtn", bits=5, group_size=8, symmetric=True, skip=("lm_head", "*.q_proj")
        ).to_json(),
        encoding="utf-8",
    )
    assert (
        cli.main(
            [
                "quantize",
                str(float_directory),
                "--out",
                str(tmp_path / "model"),
                "--config",
                str(file),
                "--bits",
                "6",
                "--no-symmetric",
            ]
        )
        == 0
    )
    expected = tsq.QuantConfig(
        method="rtn", bits=6, group_size=8, symmetric=False, skip=("lm_head", "*.q_proj")
    )
    assert load_causal_lm(tmp_path / "model").tsq_report.config == expected


def plan_arguments(source: Path, *more: str) -> list[str]:
    return [
        "plan",
        str(source),
        "--bits",
        "3",
        "--group-size",
        "16",
        "--tokens",
        "256",
        "--sequence-length",
        "32",
        *more,
    ]


def test_plan_needs_no_weights_and_gives_the_size_that_is_saved(
    float_directory: Path,
    quantised_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_bytes((float_directory / "config.json").read_bytes())
    assert cli.main(plan_arguments(tmp_path, "--json")) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = Plan.from_json(captured.out)
    stored = load_file(quantised_directory / "model.safetensors").values()
    assert found.size_after == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert (found.batches, found.paired, found.measured_by) == (2, True, "fake pass")
    assert {stage.tokens for stage in found.stages} == {256}


def test_plan_in_words(float_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(plan_arguments(float_directory, "--offload", "cpu", "--dtype", "bfloat16")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["peak", "model", "time"]
    assert "offloaded" in next(line for line in lines if line.startswith("layers "))
    assert lines[-1].startswith("model.layers.1.mlp.down_proj ")


def test_plan_of_rounding_needs_no_pass(
    float_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(plan_arguments(float_directory, "--method", "rtn")) == 0
    assert "0 batches" in capsys.readouterr().out


def test_plan_of_experts_loads_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MixtralConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    capsys.readouterr()  # drops the progress bar of saving
    assert cli.main(plan_arguments(tmp_path, "--json")) == 0
    assert Plan.from_json(capsys.readouterr().out).measured_by == "real pass"


def test_plan_that_cannot_be_made_is_one_line(
    float_directory: Path,
    quantised_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "is quantised already: give the float model" in error_of(
        capsys, plan_arguments(quantised_directory)
    )
    assert "is less than one sequence" in error_of(
        capsys, plan_arguments(float_directory, "--tokens", "31")
    )
    assert "length=0: give a positive integer" in error_of(
        capsys, plan_arguments(float_directory, "--sequence-length", "0")
    )
    assert "holds no config.json" in error_of(capsys, plan_arguments(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    assert "is not a causal language model" in error_of(capsys, plan_arguments(tmp_path))


def test_eval_gives_the_perplexity_of_the_library(
    quantised_directory: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(
            ["eval", str(quantised_directory), "--text", str(text), "--window", "32", "--json"]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    tokens = read_tokens(text, load_tokenizer(quantised_directory))
    assert result == {
        "perplexity": perplexity(load_causal_lm(quantised_directory), tokens, window=32),
        "tokens": tokens.numel(),
        "window": 32,
    }


def test_eval_of_the_float_model_in_words(
    float_directory: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(
            ["eval", str(float_directory), "--text", str(text), "--tokens", "128", "--window", "32"]
        )
        == 0
    )
    tokens = torch.cat(
        [
            batch["input_ids"].flatten()
            for batch in windows(read_tokens(text, load_tokenizer(float_directory)), 32, 4)
        ]
    )
    expected = perplexity(load_causal_lm(float_directory), tokens, window=32)
    assert capsys.readouterr().out == f"perplexity {expected:.6f} on 128 tokens in windows of 32\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--window", "0"], "--window 0: give at least 2 tokens"),
        (["--window", "32", "--tokens", "5"], "--tokens 5 is less than one window of --window 32"),
        (["--tokens", "-5"], "--tokens -5 is less than one window"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_amounts_that_cannot_be_evaluated_are_one_line(
    float_directory: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert message in error_of(capsys, ["eval", str(float_directory), "--text", str(text), *more])


def test_sequences_longer_than_learned_positions_are_one_line() -> None:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = OPTForCausalLM(
        OPTConfig(
            **sizes,
            word_embed_proj_dim=16,
            max_position_embeddings=24,
            bos_token_id=1,
            pad_token_id=1,
        )
    )
    causal_lm.check_length(model, 24, "--window")
    with pytest.raises(
        ConfigError, match="--window 25: this OPTForCausalLM has learned positions for 24 tokens"
    ):
        causal_lm.check_length(model, 25, "--window")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    roberta = RobertaForCausalLM(
        RobertaConfig(**sizes, num_attention_heads=1, max_position_embeddings=18, is_decoder=True)
    )
    with pytest.raises(ConfigError, match="positions for 16 tokens"):
        causal_lm.check_length(roberta, 17, "--window")
    roberta(torch.full((1, 16), 5))


def test_eval_takes_tokens_from_a_file(
    float_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = torch.arange(100)
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    assert (
        cli.main(
            [
                "eval",
                str(float_directory),
                "--token-file",
                str(tmp_path / "tokens.safetensors"),
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["perplexity"] == perplexity(
        load_causal_lm(float_directory), tokens
    )


def test_inspect_shows_every_layer_with_bits_size_losses_and_objectives(
    quantised_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(quantised_directory)]) == 0
    summary, table = capsys.readouterr().out.split("\n\n")
    assert "14 of " in summary
    header, *lines = table.splitlines()
    titles = [
        "bits",
        "group",
        "size",
        "initialize loss",
        "assign loss",
        "refine loss",
        "assign objective",
        "descent objective",
        "exact objective",
    ]
    assert [header.index(title) for title in titles] == sorted(
        header.index(title) for title in titles
    )
    report = load_causal_lm(quantised_directory).tsq_report
    assert [line.split()[0] for line in lines] == [layer.name for layer in report.layers]
    for line, layer in zip(lines, report.layers, strict=True):
        if layer.status != "quantized":
            continue
        for value in (*layer.losses.values(), *layer.objective.values()):
            assert f" {value:.4g} " in line
        assert set(layer.losses) == {"initialize", "assign", "refine"}
        assert {"descent", "exact"} <= set(layer.objective)


def test_inspect_as_json_is_the_report(
    quantised_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(quantised_directory), "--json"]) == 0
    assert (
        capsys.readouterr().out == load_causal_lm(quantised_directory).tsq_report.to_json() + "\n"
    )


def test_inspect_writes_a_page_and_a_picture(
    quantised_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "report.svg"
    assert (
        cli.main(["inspect", str(quantised_directory), "--html", str(page), "--plot", str(picture)])
        == 0
    )
    summary, lines = capsys.readouterr().out.split("\n\n")
    assert "14 of " in summary
    assert lines.splitlines() == [f"page: {page}", f"picture: {picture}"]
    text = page.read_text(encoding="utf-8")
    assert f"<h1>{quantised_directory.name}</h1>" in text
    assert all(
        layer.name in re.sub(r"</?span>", "", text)
        for layer in load_causal_lm(quantised_directory).tsq_report.layers
    )
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_inspect_as_json_with_a_page_is_only_json(
    quantised_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(
            ["inspect", str(quantised_directory), "--json", "--html", str(tmp_path / "report.html")]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["schema_version"] == 1
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        (
            "--html",
            "none/report.html",
            r"cannot write .*none/report.html: No such file or directory",
        ),
        ("--plot", "none/report.png", r"cannot write .*none/report.png: No such file or directory"),
        (
            "--plot",
            "report.txt",
            r"cannot draw into .*report.txt: give a file name that ends in .png, .svg, .pdf",
        ),
    ],
    ids=["page", "picture", "suffix"],
)
def test_report_that_cannot_be_written_is_one_line(
    quantised_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
    message: str,
) -> None:
    assert re.search(
        message,
        error_of(capsys, ["inspect", str(quantised_directory), option, str(tmp_path / name)]),
    )


@pytest.mark.parametrize(("option", "package"), [("--html", "jinja2"), ("--plot", "matplotlib")])
def test_missing_report_extra_is_one_line(
    quantised_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    package: str,
) -> None:
    for module in (package, f"{package}.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    message = error_of(
        capsys, ["inspect", str(quantised_directory), option, str(tmp_path / "report.svg")]
    )
    assert f'this needs {package}: pip install "tsq_layers[report]"' in message


def test_module_runs_in_a_process_of_its_own(quantised_directory: Path) -> None:
    command = [sys.executable, "-m", "tsq_layers", "inspect", str(quantised_directory)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "14 of " in result.stdout


def test_missing_directory_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    assert f"no directory {tmp_path / 'none'}" in error_of(
        capsys, ["eval", str(tmp_path / "none"), "--text", str(text)]
    )
    assert "holds no config.json: give the directory of a transformers model" in error_of(
        capsys, ["eval", str(tmp_path), "--text", str(text)]
    )
    assert (
        "holds no tsq.json that describes its tensors: give a directory that tsq quantize or tsq.save wrote"
        in error_of(capsys, ["inspect", str(tmp_path)])
    )


def test_missing_and_foreign_text_is_one_line(
    float_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    command = ["eval", str(float_directory), "--text"]
    assert f"cannot read {tmp_path / 'none'}: No such file or directory" in error_of(
        capsys, [*command, str(tmp_path / "none")]
    )
    assert "latin.txt is not UTF-8 text: unexpected end of data at byte 3" in error_of(
        capsys, [*command, str(tmp_path / "latin.txt")]
    )
    assert "empty.txt has no tokens" in error_of(capsys, [*command, str(tmp_path / "empty.txt")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits", "9"], "bits=9: give an integer from 1 to 8"),
        (
            ["--group-size", "0"],
            "group_size=0: give a positive integer, or None for one group per row",
        ),
        (["--tokens", "16"], "--tokens 16 is less than one sequence of --sequence-length 32"),
        (["--tokens", "100000"], "tokens, too few for 3125 windows of 32: give more text"),
        (["--batch-size", "0"], "batch_size=0: give a positive integer"),
        (["--device", "nowhere"], "--device nowhere: "),
        (["--offload", "nowhere"], "--offload nowhere: "),
        (["--config", "none.json"], "cannot read none.json: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_line(
    float_directory: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert message in error_of(
        capsys, quantize_arguments(float_directory, tmp_path / "model", text, *more)
    )
    assert not (tmp_path / "model").exists()


def test_calibration_text_is_asked_for(
    float_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(capsys, ["quantize", str(float_directory), "--out", str(tmp_path / "model")])
    assert (
        "method='two-stage' needs calibration text: give --text FILE, or a configuration that needs none"
        in message
    )
    file = tmp_path / "config.json"
    file.write_text(tsq.QuantConfig(method="rtn", distill_epochs=2).to_json(), encoding="utf-8")
    message = error_of(
        capsys,
        ["quantize", str(float_directory), "--out", str(tmp_path / "model"), "--config", str(file)],
    )
    assert "distill_epochs=2 needs calibration text" in message


def test_float_model_is_not_overwritten(
    float_directory: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is the directory of the float model" in error_of(
        capsys, quantize_arguments(float_directory, float_directory, text)
    )


def test_model_of_another_kind_is_one_line(
    float_directory: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_tokenizer(float_directory).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    BertModel(config).save_pretrained(tmp_path)
    capsys.readouterr()  # drops the progress bar of saving
    assert "are not a BertLMHeadModel: " in error_of(
        capsys, ["eval", str(tmp_path), "--text", str(text)]
    )
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a causal language model that transformers knows"):
        load_causal_lm(tmp_path)


def test_missing_weights_are_named(float_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((float_directory / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_causal_lm(tmp_path)
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_unknown_dtype_is_refused(float_directory: Path) -> None:
    with pytest.raises(
        ConfigError, match="dtype='float64': give one of 'float32', 'float16', 'bfloat16'"
    ):
        load_causal_lm(float_directory, "float64")


def test_only_transformers_models_are_saved_as_such(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Linear has no transformers config; save it with tsq\.save"
    ):
        save_causal_lm(torch.nn.Linear(2, 2), None, tmp_path)


def test_missing_transformers_names_the_extra(
    float_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "tsq_layers\[hf\]"'):
        load_causal_lm(float_directory)


def test_network_is_never_asked(
    float_directory: Path, quantised_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for directory in (float_directory, quantised_directory):
        load_causal_lm(directory)
        load_tokenizer(directory)


def test_foreign_description_and_token_file_are_one_line(
    float_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tsq.json").write_text("{}", encoding="utf-8")
    assert "this is not a checkpoint of tsq.save" in error_of(capsys, ["inspect", str(tmp_path)])
    save_file({"other": torch.zeros(1)}, tmp_path / "tokens.safetensors")
    message = error_of(
        capsys, ["eval", str(float_directory), "--token-file", str(tmp_path / "tokens.safetensors")]
    )
    assert "tokens.safetensors is not a safetensors file with 'tokens'" in message


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        [],
        ["eval", "somewhere"],
        ["quantize", "a", "--out", "b", "--group-size", "many"],
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    assert (
        "'many': give a positive integer, or none for one group per row" in capsys.readouterr().err
    )


def test_interruption_exits_with_130(
    float_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: Path,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "perplexity", interrupt)
    assert cli.main(["eval", str(float_directory), "--text", str(text)]) == 130
    assert capsys.readouterr().err == "tsq: interrupted\n"


def test_reader_that_stops_reading_is_no_error(quantised_directory: Path) -> None:
    command = [sys.executable, "-m", "tsq_layers", "inspect", str(quantised_directory), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()  # type: ignore[union-attr]
        assert process.stderr.read() == ""  # type: ignore[union-attr]
    assert process.returncode == 0


def test_warnings_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    program.show_warning(UserWarning("few tokens"), UserWarning, "file.py", 1)
    assert stream.getvalue() == "tsq: warning: few tokens\n"


def test_windows_are_disjoint_even_and_the_same_each_time() -> None:
    tokens = torch.arange(1003)
    batches = windows(tokens, 32, 30, batch_size=4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 4, 4, 4, 4, 2]
    starts = torch.cat([batch["input_ids"][:, 0] for batch in batches])
    gaps = starts.diff()
    assert int(gaps.min()) >= 32
    assert int(gaps.max() - gaps.min()) <= 1
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    assert ids.unique().numel() == ids.numel() == 30 * 32
    assert all(
        torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(batches, windows(tokens, 32, 30, batch_size=4), strict=True)
    )


def test_windows_may_fill_the_text_but_not_more() -> None:
    assert torch.equal(
        torch.cat([batch["input_ids"] for batch in windows(torch.arange(12), 4, 3)]).flatten(),
        torch.arange(12),
    )
    with pytest.raises(ConfigError, match="the text has 11 tokens, too few for 3 windows of 4"):
        windows(torch.arange(11), 4, 3)
