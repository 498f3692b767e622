"""Commands that exchange models with other tools: quantize --format, export, import, refine; and completion."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from export_models import llama
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tsq_layers as tsq
from tsq_layers import cli
from tsq_layers.cli import completion, program
from tsq_layers.cli.models import load
from tsq_layers.config import QuantConfig
from tsq_layers.errors import ExportError
from tsq_layers.formats.configurations import LIMITS, check_configuration
from tsq_layers.formats.exporting import FORMATS
from tsq_layers.integrations.causal_lm import load_tokenizer
from tsq_layers.layers import packed
from tsq_layers.workflow import pipeline as workflow

WORDS = [f"w{number}" for number in range(47)]

pytestmark = pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a float model, with a tokenizer of 47 words."""
    directory = tmp_path_factory.mktemp("source") / "float"
    llama().save_pretrained(directory)
    special = {"unk_token": "?"}
    plain = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*WORDS, "?"])}, unk_token="?")
    )
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    numbers = torch.randint(47, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(WORDS[number] for number in numbers), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantised(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantise(source, tmp_path_factory.mktemp("quantised") / "own")


def quantise(source: Path, out: Path, *more: str) -> Path:
    options = ["--bits", "4", "--group-size", "32", "--method", "rtn", "--symmetric"]
    assert cli.main(["quantize", str(source), "--out", str(out), *options, *more]) == 0
    return out


def amounts(text: Path) -> list[str]:
    return ["--text", str(text), "--tokens", "256", "--sequence-length", "32"]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command which fails writes."""
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: matrix.dequantize(torch.float32) for name, _, matrix in packed(load(directory))}


def assert_same(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


# --- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_quantize_writes_any_format(
    source: Path, quantised: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = quantise(source, tmp_path / "out", "--format", form)
    assert f"saved as {form} in {out}" in capsys.readouterr().out
    assert (out / "tokenizer.json").exists()
    assert not (out / "tsq.json").exists()
    assert_same(out, quantised)


def test_quantize_tells_programs_what_it_wrote(
    source: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "quantize",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--bits",
        "3",
        "--group-size",
        "32",
    ]
    assert cli.main([*arguments, *amounts(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["out"], found["format"], found["quantized"]) == (str(tmp_path / "out"), "tsq", 14)
    assert found["mean_losses"]["refine"] <= found["mean_losses"]["assign"]
    assert found["size_after"] < found["size_before"]


def test_quantize_by_the_best_method(
    source: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "quantize",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--bits",
        "2",
        "--group-size",
        "32",
    ]
    assert cli.main([*arguments, "--method", "best", *amounts(text)]) == 0
    config = load(tmp_path / "out").tsq_report.config
    assert (config.rotation, config.options.zero_points, config.options.joint_rounds) == (
        64,
        "float",
        2,
    )
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert "refine loss" in (table := capsys.readouterr().out)
    assert "joint loss" in table


def test_the_best_method_in_the_format_of_another_library(
    source: Path, tmp_path: Path, text: Path
) -> None:
    out = quantise(source, tmp_path / "out", *amounts(text), "--method", "best", "--format", "gptq")
    layers = [
        layer
        for layer in tsq.import_checkpoint(out).modules()
        if isinstance(layer, tsq.QuantLinear)
    ]
    assert len(layers) == 14
    assert all(layer.basis is None and layer.offsets is None for layer in layers)


def test_a_format_that_cannot_hold_the_configuration_is_refused_before_the_work(
    source: Path,
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tsq, "quantize", None)
    start = ("quantize", source, "--out", tmp_path / "out", *amounts(text))
    config = tmp_path / "config.json"
    config.write_text(tsq.QuantConfig(method="best").to_json(), encoding="utf-8")
    message = error_of(capsys, *start, "--config", config, "--format", "gptq")
    assert "zero_points='float', rotation=64: gptq files hold plain codes and scales" in message
    assert "give zero_points='integer', rotation=None" in message
    assert "bits=5: gptq holds 2, 3, 4 or 8 bits" in error_of(
        capsys, *start, "--bits", 5, "--format", "gptq"
    )
    assert "symmetric=False: gguf holds" in error_of(capsys, *start, "--format", "gguf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    start = ("quantize", source, "--out", tmp_path / "full", *amounts(text))
    assert "exists and is no empty directory" in error_of(
        capsys, *start, "--symmetric", "--format", "gptq"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--format", "gptq", "--group-size", "64"],
            "QuantConfig(bits=4, group_size=32, symmetric=True)",
        ),
        (
            ["--format", "gguf", "--embeddings", "--config", "SKIP"],
            "its model is WordLevel, and only BPE is known",
        ),
        (
            ["--format", "compressed-tensors", "--embeddings"],
            "'model.embed_tokens' (Embedding) not; leave such layers out",
        ),
        (
            ["--format", "gptq", "--config", "MIXED"],
            "a gptq file holds one width and one group size",
        ),
        (
            ["--format", "gptq", "--config", "WIDE"],
            "scale_dtype='float32': gptq holds float16 scales; set it to 'float16'",
        ),
        (["--min-coverage", "0.999"], "min_coverage=0.999 asks for more"),
        (
            ["--sequence-length", "32", "--format", "gptq", "--checkpoint-dir", "OUT/run"],
            "is in --out",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_format_cannot_hold_of_a_model_is_refused_before_the_work(
    source: Path,
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(workflow, "calibrate", None)
    files = {
        "SKIP": QuantConfig(skip=()),
        "MIXED": QuantConfig(overrides={"*.up_proj": {"bits": 8}}),
        "WIDE": QuantConfig(scale_dtype="float32"),
    }
    for name, config in files.items():
        (tmp_path / name).write_text(config.to_json(), encoding="utf-8")
    given = [
        str(tmp_path / option) if option in files else option.replace("OUT", str(tmp_path / "out"))
        for option in options
    ]
    start = (
        "quantize",
        source,
        "--out",
        tmp_path / "out",
        *amounts(text),
        "--bits",
        4,
        "--symmetric",
    )
    grouped = () if "--group-size" in options else ("--group-size", 32)
    assert message in error_of(capsys, *start, *grouped, *given)
    assert not (tmp_path / "out").exists()


def test_layers_that_a_format_cannot_hold_are_written_as_floats_if_asked(
    source: Path, tmp_path: Path
) -> None:
    options = ("--format", "compressed-tensors", "--embeddings", "--dequantize-others")
    assert "model.embed_tokens" not in weights(quantise(source, tmp_path / "out", *options))


def test_what_is_refused_only_by_its_values_is_kept(
    source: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "float")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].abs_()  # least values of 0: zero points of 0
    save_file(tensors, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    start = (
        "quantize",
        tmp_path / "float",
        "--out",
        tmp_path / "out",
        *amounts(text),
        "--bits",
        4,
        "--group-size",
        32,
    )
    message = error_of(capsys, *start, "--format", "gptq-v1")
    assert "has zero points of 0" in message
    (kept,) = tmp_path.glob("out-tsq-*")
    assert f"The quantised model is in {kept}, which tsq export reads" in message
    assert (
        cli.main(["export", str(kept), "--format", "gptq", "--out", str(tmp_path / "other")]) == 0
    )


@pytest.mark.parametrize(
    ("command", "form"), [("quantize", "tsq"), ("quantize", "gptq"), ("export", "gptq")]
)
def test_a_place_that_cannot_be_written_is_named_first(
    source: Path,
    quantised: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    form: str,
) -> None:
    (tmp_path / "file").touch()
    arguments = (command, source if command == "quantize" else quantised, "--format", form)
    for out in (tmp_path / "file" / "x", "/proc/none/x"):
        assert "cannot be written" in error_of(capsys, *arguments, "--out", out)
    reason = "cannot be written" if form == "tsq" else "exists and is no empty directory"
    assert reason in error_of(capsys, *arguments, "--out", tmp_path / "file")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "changes",
    [
        {"zero_points": "float"},
        {"method": "lnq"},
        {"rotation": 32},
        {"method": "quantease", "outliers": 0.01},
        {"method": "quantease", "outlier_columns": 2},
        {"activation_bits": 8},
        {"channel_scaling": True},
        {"overrides": {"*.up_proj": {"rotation": 16}}},
    ],
    ids=str,
)
def test_configurations_that_no_format_holds_are_refused(
    form: str, changes: dict[str, object]
) -> None:
    assert LIMITS.keys() == FORMATS.keys()
    symmetric = changes.get("method") != "lnq" and "zero_points" not in changes
    check_configuration(QuantConfig(bits=4, group_size=64, symmetric=True), form)
    with pytest.raises(ExportError, match="files hold plain codes and scales; give"):
        check_configuration(
            QuantConfig(**{"bits": 4, "group_size": 64, "symmetric": symmetric, **changes}), form
        )


# --- export, import, eval, inspect ---------------------------------------------------------------


@pytest.mark.parametrize("form", ["gptq", "gptq-v1", "compressed-tensors"])
def test_a_model_goes_out_and_comes_back(
    quantised: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(
            ["export", str(quantised), "--format", form, "--out", str(tmp_path / "out"), "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["quantized"]) == (form, 14)
    assert (
        cli.main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["format"] == "tsq"
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert_same(tmp_path / "back", quantised)


def test_checkpoints_of_others_go_from_format_to_format(quantised: Path, tmp_path: Path) -> None:
    for source, form in ((quantised, "gptq"), (tmp_path / "gptq", "compressed-tensors")):
        assert (
            cli.main(["export", str(source), "--format", form, "--out", str(tmp_path / form)]) == 0
        )
    assert_same(tmp_path / "compressed-tensors", quantised)


def test_checkpoints_of_others_are_evaluated_and_inspected(
    quantised: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(["export", str(quantised), "--format", "gptq", "--out", str(tmp_path / "out")])
        == 0
    )
    values = []
    for directory in (quantised, tmp_path / "out"):
        capsys.readouterr()
        assert (
            cli.main(["eval", str(directory), "--text", str(text), "--window", "32", "--json"]) == 0
        )
        values.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert values[0] == values[1]
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert "14 of 14 layers quantised" in capsys.readouterr().out


@pytest.mark.filterwarnings("always::tsq_layers.formats.ExportWarning")
def test_an_engine_that_does_not_serve_it_is_named(
    quantised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "export",
        str(quantised),
        "--format",
        "gptq",
        "--out",
        str(tmp_path / "out"),
        "--engine",
        "vllm",
    ]
    assert cli.main(arguments) == 0
    assert "tsq: warning: vllm does not serve gptq files" in capsys.readouterr().err


def test_exchange_errors_are_one_line(
    source: Path, quantised: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    assert "no directory" in error_of(capsys, "import", tmp_path / "none", *out)
    assert "holds no checkpoint of another tool" in error_of(capsys, "import", source, *out)
    message = error_of(capsys, "export", source, "--format", "gptq", *out)
    assert f"{source} holds a float model: quantise it first, with tsq quantize" in message
    assert "is the directory of the model that is read" in error_of(
        capsys, "export", quantised, "--format", "gptq", "--out", quantised
    )
    gguf = error_of(capsys, "export", quantised, "--format", "gguf", *out)
    assert "llama.cpp would not split texts as this" in gguf
    assert (
        cli.main(["export", str(quantised), "--format", "gptq", "--out", str(tmp_path / "gptq")])
        == 0
    )
    message = error_of(capsys, "quantize", tmp_path / "gptq", *out, *amounts(text))
    assert "holds a model that is quantised already: give the float model" in message


# --- refine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tsq", "gptq"])
def test_refine_lowers_the_loss_of_a_checkpoint_of_another_tool(
    source: Path,
    quantised: Path,
    tmp_path: Path,
    text: Path,
    form: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        cli.main(["export", str(quantised), "--format", "gptq", "--out", str(tmp_path / "theirs")])
        == 0
    )
    capsys.readouterr()
    arguments = [
        "refine",
        str(tmp_path / "theirs"),
        str(source),
        "--out",
        str(tmp_path / "out"),
        *amounts(text),
    ]
    assert cli.main([*arguments, "--format", form, "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)["mean_losses"]
    assert losses["refine"] < losses["assign"]
    before, after = load(tmp_path / "theirs"), load(tmp_path / "out")
    for (_, _, one), (_, _, other) in zip(packed(before), packed(after), strict=True):
        assert torch.equal(one.words, other.words)
        assert not torch.equal(one.scales, other.scales)


def test_refine_keeps_the_dtypes_of_the_checkpoint(
    source: Path, quantised: Path, tmp_path: Path, text: Path
) -> None:
    tsq.export_checkpoint(
        load(quantised).half(), tmp_path / "theirs", format="gptq", tokenizer=load_tokenizer(source)
    )
    arguments = [
        "refine",
        str(tmp_path / "theirs"),
        str(source),
        "--out",
        str(tmp_path / "out"),
        *amounts(text),
    ]
    assert cli.main([*arguments, "--format", "gptq"]) == 0

    def dtypes(directory: Path) -> dict[str, torch.dtype]:
        return {
            name: tensor.dtype
            for name, tensor in load_file(directory / "model.safetensors").items()
        }

    found = dtypes(tmp_path / "out")
    assert found["model.norm.weight"] == torch.float16
    assert found == dtypes(tmp_path / "theirs")


def test_refine_refuses_another_float_model(
    quantised: Path, tmp_path: Path, text: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "other")
    torch.manual_seed(7)
    model = llama()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "other")
    message = error_of(
        capsys, "refine", quantised, tmp_path / "other", "--out", tmp_path / "out", *amounts(text)
    )
    assert "give the float model that it was quantised from" in message


# --- completion ------------------------------------------------------------------------------------


def completed(script: str, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in ("tsq", *words))
    code = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _tsq; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_their_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "") == {*program.COMMANDS, "completion"}
    assert completed(script, "ex") == {"export"}
    assert {"--bits", "--format", "--symmetric", "--no-symmetric"} <= completed(
        script, "quantize", "--"
    )
    assert completed(script, "quantize", "model", "--method", "q") == {"quantease"}
    assert completed(script, "export", "--format", "gptq") == {"gptq", "gptq-v1"}
    assert completed(script, "completion", "f") == {"fish"}
    assert completed(script, "quantize", "--text", "") == set()  # the shell then offers files


def test_scripts_of_all_shells_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    names = [*program.COMMANDS, "completion"]
    for shell in completion.SHELLS:
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(name in script for name in names)
        assert "token-file" not in script  # an option that is not shown
        if shell == "fish" and shutil.which("fish"):
            subprocess.run(["fish", "-n"], input=script, text=True, check=True)


def test_every_option_is_described() -> None:
    for command in completion.commands(program.parser()):
        assert command.text
        for option in command.options:
            assert option.text, (command.name, option.names)


def test_help_and_version_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in program.COMMANDS)):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
    assert "tsq_layers" in capsys.readouterr().out
