"""Saving and loading: bit-equal, tied tensors stay tied, damage is named, and a failure changes nothing."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid_kinds import KINDS, made
from grid_kinds import assert_same as assert_same_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tsq_layers as tsq
import tsq_layers.formats.tsq
from tsq_layers.config import QuantConfig
from tsq_layers.errors import CheckpointError, StateError
from tsq_layers.formats.tsq import load, save, writing
from tsq_layers.numerics import grid
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.reports import LayerReport, Report
from tsq_layers.runtime.linear import QuantLinear

REPORT = Report(
    layers=(
        LayerReport(
            name="up",
            kind="Linear",
            rows=6,
            columns=10,
            status="quantized",
            bits=3,
            losses={"assign": 0.1},
        ),
    ),
    config=QuantConfig(bits=3, group_size=4),
    size_before=1000,
    size_after=100,
    paired=True,
    seconds=1.5,
    versions={"torch": "2"},
)


def quantized(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = 3,
    symmetric: bool = False,
    scales: torch.dtype = torch.float16,
) -> QuantLinear:
    """A float (N, K) weight rounded to the nearest codes of its min-max grid, groups of 4."""
    weight = weight.detach()
    scales_NG, zeros_NG = grid.minmax(weight.float(), bits, 4, symmetric)
    scales_NG = grid.storable(scales_NG, scales)
    codes_NK = grid.quantize(weight.float(), scales_NG, zeros_NG, bits, 4)
    record = QuantizedWeight(
        codes_NK, scales_NG.to(scales), zeros_NG.to(torch.uint8), bits, 4, symmetric
    )
    return QuantLinear.from_quantized(record, bias, dtype=weight.dtype)


class Net(nn.Module):
    """Everything that a checkpoint must keep: float layers, both kinds of buffer, a plain
    attribute, a buffer that is None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 10)
        self.up = nn.Linear(10, 6)
        self.norm = nn.BatchNorm1d(6)
        self.down = nn.Linear(6, 10, bias=False)
        self.register_buffer("shift", torch.linspace(0, 1, 10), persistent=False)
        self.register_buffer("absent", None)
        self.original_shift = self.shift

    def forward(self, tokens: Tensor) -> Tensor:
        return (
            self.down(self.up(self.embed(tokens) + self.shift) - self.norm.running_mean)
            @ self.embed.weight.T
        )


def float_net(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def quantized_net(dtype: torch.dtype = torch.float32) -> Net:
    model = float_net(seed=0).to(dtype)
    model.norm.running_mean.copy_(torch.arange(6))
    model.up = quantized(model.up.weight, model.up.bias.detach())
    model.down = quantized(model.down.weight, bits=2, symmetric=True, scales=torch.bfloat16)
    model.tsq_report = REPORT
    return model


TOKENS = torch.tensor([0, 3, 6])


def kinds_net(kind: str | None = None, scales: torch.dtype = torch.float16) -> nn.Sequential:
    """Two layers with float offsets or look-up tables; float layers if no kind is given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 10))
    for layer in (0, 2) if kind else ():
        weight = made(kind, *model[layer].weight.shape, 3, 4, scale_dtype=scales, seed=layer)
        model[layer] = QuantLinear.from_float(model[layer], weight)
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def assert_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = values(model), values(other)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype, key
        assert torch.equal(ours[key], theirs[key]), key
    assert model.state_dict().keys() == other.state_dict().keys()


def snapshot(model: nn.Module) -> list[Any]:
    """Which objects a model is made of, and its values; equal snapshots are the same model."""
    modules = [(name, id(module), sorted(vars(module))) for name, module in model.named_modules()]
    tensors = [
        (name, id(tensor), "meta" if tensor.is_meta else tensor.tolist())
        for name, tensor in values(model).items()
    ]
    return [modules, tensors]


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = directory / "tsq.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(quantized_net(), tmp_path / "saved")
    return tmp_path / "saved"


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_round_trip_is_bit_equal(tmp_path: Path, device: str, dtype: torch.dtype) -> None:
    original = quantized_net(dtype)
    save(original, tmp_path)
    with torch.device(device):
        fresh = float_net()
    loaded = load(tmp_path, fresh)
    assert loaded is fresh
    assert_same(loaded, original)
    assert torch.equal(loaded(TOKENS), original(TOKENS))
    assert loaded(TOKENS).dtype == dtype
    assert loaded.tsq_report == REPORT


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_a_model_that_is_a_layer_comes_back_as_a_layer(
    tmp_path: Path, bits: int, symmetric: bool, scales: torch.dtype
) -> None:
    original = quantized(
        torch.randn(6, 10), torch.randn(6), bits=bits, symmetric=symmetric, scales=scales
    )
    save(original, tmp_path)
    fresh = nn.Linear(10, 6)
    before = snapshot(fresh)
    loaded = load(tmp_path, fresh)
    assert isinstance(loaded, QuantLinear)
    assert (loaded.bits, loaded.group_size, loaded.symmetric, loaded.scale_dtype) == (
        bits,
        4,
        symmetric,
        scales,
    )
    assert_same(loaded, original)
    x = torch.randn(3, 10)
    assert torch.equal(loaded(x), original(x))
    assert snapshot(fresh) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_offsets_and_tables_come_back_bit_equal(
    tmp_path: Path, kind: str, scales: torch.dtype, device: str
) -> None:
    original = kinds_net(kind, scales)
    save(original, tmp_path)
    with torch.device(device):
        fresh = kinds_net()
    loaded = load(tmp_path, fresh)
    for name in ("0", "2"):
        assert_same_weight(
            loaded.get_submodule(name).quantized_weight(),
            original.get_submodule(name).quantized_weight(),
        )
    assert_same(loaded, original)
    x = torch.randn(3, 10)
    assert torch.equal(loaded(x), original(x))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("offsets", {"offsets": True}),
        ("row tables", {"tables": "row"}),
        ("group tables", {"tables": "group"}),
    ],
)
def test_description_of_offsets_and_tables_is_pinned(
    tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    save(kinds_net(kind), tmp_path)
    content = json.loads((tmp_path / "tsq.json").read_text(encoding="utf-8"))["layers"]["0"]
    assert content == {
        "in_features": 10,
        "out_features": 6,
        "bits": 3,
        "group_size": 4,
        "symmetric": False,
        "bias": True,
        "scale_dtype": "float16",
        "dtype": "float32",
        **fields,
    }
    buffers = {"offsets": {"scale_bits", "offset_bits"}}.get(kind, {"table_bits"})
    stored = load_file(tmp_path / "model.safetensors")
    assert {key for key in stored if key.startswith("0.")} == {
        f"0.{name}" for name in {"words", "bias"} | buffers
    }


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        ("row tables", "tables", "column", r"layer '0': tables='column' is not "),
        ("row tables", "tables", 1, r"layer '0': tables=1 is not "),
        ("offsets", "offsets", "yes", r"layer '0': offsets='yes' is not bool"),
        (
            "row tables",
            "tables",
            "group",
            r"tensor '0.table_bits' is int16 \[6, 1, 8\] .* needs int16 \[6, 3, 8\]",
        ),
        (
            "row tables",
            "tables",
            None,
            r"lacks '0.scale_bits', '0.zero_words', which the model has",
        ),
        (
            "row tables",
            "bits",
            5,
            r"layer '0' in tsq.json: bits=5: look-up tables are of codes of 1 to 4 bits",
        ),
        (
            "row tables",
            "bits",
            2,
            r"tensor '0.\w+' is int.* in the checkpoint; its layer, .* needs int",
        ),
        (
            "row tables",
            "offsets",
            True,
            r"layer '0' in tsq.json: .* not both; give one of them; the file is damaged",
        ),
        ("offsets", "offsets", False, r"lacks '0.zero_words', which the model has"),
        (
            "offsets",
            "symmetric",
            True,
            r"layer '0' in tsq.json: .*float offsets has no zero points",
        ),
        ("offsets", "tables", "row", r"layer '0' in tsq.json: .* not both"),
        ("offsets", "scale_dtype", "float32", r"tensor '0.\w+' is int16 .* needs int32"),
    ],
)
def test_damage_to_offsets_and_tables_is_named(
    tmp_path: Path, kind: str, field: str, value: object, message: str
) -> None:
    save(kinds_net(kind), tmp_path)
    edit(tmp_path, lambda content: content["layers"]["0"].update({field: value}))
    fresh = kinds_net()
    before = snapshot(fresh)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, fresh)
    assert snapshot(fresh) == before


def test_saving_what_was_loaded_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    save(load(saved, float_net()), tmp_path / "again")
    for name in ("model.safetensors", "tsq.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_load_keeps_training_mode_and_requires_grad_of_the_model(saved: Path) -> None:
    fresh = float_net().train()
    fresh.embed.weight.requires_grad_(False)
    fresh.up.bias.requires_grad_(False)
    loaded = load(saved, fresh)
    assert loaded.up.training
    assert not loaded.embed.weight.requires_grad
    assert not loaded.up.bias.requires_grad
    assert loaded.norm.weight.requires_grad


def test_load_on_meta_leaves_nothing_on_meta_and_plain_attributes_follow(saved: Path) -> None:
    with torch.device("meta"):
        fresh = float_net()
    loaded = load(saved, fresh)
    assert not any(tensor.is_meta for tensor in values(loaded).values())
    assert loaded.original_shift is loaded.shift


def test_changing_a_loaded_model_does_not_reach_the_file(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    loaded = load(saved, float_net())
    loaded.up.words.fill_(-1)
    assert (saved / "model.safetensors").read_bytes() == before
    save(loaded, saved)
    assert_same(load(saved, float_net()), loaded)


def test_load_puts_all_tensors_on_the_given_device(saved: Path) -> None:
    with torch.device("meta"):
        fresh = float_net()
    assert {tensor.device.type for tensor in values(load(saved, fresh, device="cpu")).values()} == {
        "cpu"
    }


def test_load_accepts_a_weight_that_is_kept_transposed(saved: Path) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    fresh = float_net()
    fresh.up = conv1d(6, 10)
    assert_same(load(saved, fresh), quantized_net())


def test_save_takes_non_contiguous_tensors_and_parts_of_one_storage(tmp_path: Path) -> None:
    def build(whole: Tensor) -> nn.Module:
        model = nn.Module()
        model.layer = nn.Linear(10, 6)
        model.turned = nn.Parameter(whole.T)
        model.register_buffer("wide", torch.arange(3.0).expand(4, 3))
        rows = torch.arange(12.0).reshape(4, 3)
        model.register_buffer("upper", rows[:2])
        model.register_buffer("lower", rows[2:])
        columns = torch.arange(12.0).reshape(3, 4)
        model.register_buffer("left", columns[:, :2])
        model.register_buffer("right", columns[:, 2:])
        return model

    original = build(torch.randn(3, 5))
    original.layer = quantized(original.layer.weight)
    save(original, tmp_path)
    assert_same(load(tmp_path, build(torch.zeros(3, 5))), original)


def test_a_model_without_a_report_loads_without_one(tmp_path: Path) -> None:
    model = quantized_net()
    del model.tsq_report
    save(model, tmp_path)
    assert not hasattr(load(tmp_path, float_net()), "tsq_report")


def test_buffers_that_are_not_persistent_may_differ(saved: Path) -> None:
    fresh = float_net()
    del fresh.shift
    fresh.register_buffer("cache", torch.ones(2), persistent=False)
    loaded = load(saved, fresh)
    assert not hasattr(loaded, "shift")
    assert torch.equal(loaded.cache, torch.ones(2))


# Tied tensors


def tied_net(*, tie: bool = True) -> nn.Module:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(6, 10),
            "layer": nn.Linear(10, 6),
            "head": nn.Linear(10, 6, bias=False),
        }
    )
    if tie:
        model["head"].weight = model["embed"].weight
    return model


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_tensors_are_stored_once_and_tied_again(
    tmp_path: Path, tie: bool, device: str
) -> None:
    original = tied_net()
    original["layer"] = quantized(original["layer"].weight)
    save(original, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "head.weight" not in file.keys()
    with torch.device(device):
        fresh = tied_net(tie=tie)
    loaded = load(tmp_path, fresh)
    assert loaded["head"].weight is loaded["embed"].weight
    assert_same(loaded, original)


def test_tensors_that_were_not_tied_come_apart_in_a_model_that_ties_them(tmp_path: Path) -> None:
    original = tied_net(tie=False)
    original["layer"] = quantized(original["layer"].weight)
    save(original, tmp_path)
    assert_same(load(tmp_path, tied_net()), original)


def test_a_quantized_layer_under_two_names_is_one_layer_again(tmp_path: Path) -> None:
    layer = quantized(torch.randn(6, 6), torch.randn(6))
    save(nn.Sequential(layer, nn.ReLU(), layer), tmp_path)
    shared = nn.Linear(6, 6)
    loaded = load(tmp_path, nn.Sequential(shared, nn.ReLU(), shared))
    assert loaded[0] is loaded[2]
    apart = load(tmp_path, nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    assert apart[0] is apart[2]


def test_load_refuses_one_module_for_two_stored_values(tmp_path: Path) -> None:
    save(
        nn.ModuleDict(
            {"a": nn.LayerNorm(4), "b": nn.LayerNorm(4), "layer": quantized(torch.randn(6, 10))}
        ),
        tmp_path,
    )
    norm = nn.LayerNorm(4)
    with pytest.raises(
        CheckpointError,
        match=r"'a.weight' and 'b.weight' belong to one module in this model but are two tensors",
    ):
        load(tmp_path, nn.ModuleDict({"a": norm, "b": norm, "layer": nn.Linear(10, 6)}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tied_llama_stays_tied_and_gives_the_same_outputs(tmp_path: Path, device: str) -> None:
    transformers = pytest.importorskip("transformers")

    def build() -> nn.Module:
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        config = transformers.LlamaConfig(vocab_size=32, **sizes, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config).eval()

    original = build()
    linears = [
        name
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    for name in linears:
        original.set_submodule(name, quantized(original.get_submodule(name).weight))
    save(original, tmp_path)
    with torch.device(device):
        fresh = build()
    loaded = load(tmp_path, fresh)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(loaded, original)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, original(tokens).logits)


# The files


def test_description_layout_is_pinned(saved: Path) -> None:
    content = json.loads((saved / "tsq.json").read_text(encoding="utf-8"))
    assert list(content) == [
        "format",
        "schema_version",
        "library_version",
        "header_sha256",
        "layers",
        "composites",
        "aliases",
        "tensors",
        "report",
    ]
    assert (content["format"], content["schema_version"]) == ("tsq_layers", 1)
    assert content["layers"]["up"] == {
        "in_features": 10,
        "out_features": 6,
        "bits": 3,
        "group_size": 4,
        "symmetric": False,
        "bias": True,
        "scale_dtype": "float16",
        "dtype": "float32",
    }
    assert (
        content["layers"]["down"] | {"symmetric": True, "bias": False, "scale_dtype": "bfloat16"}
        == content["layers"]["down"]
    )
    assert content["tensors"]["embed.weight"] == {"dtype": "float32", "shape": [7, 10]}
    assert content["tensors"]["non_persistent:shift"] == {"dtype": "float32", "shape": [10]}
    assert content["aliases"] == {}
    assert content["report"] == REPORT.to_dict()


def test_aliases_are_pinned(tmp_path: Path) -> None:
    model = tied_net()
    model["layer"] = quantized(model["layer"].weight)
    save(model, tmp_path)
    assert json.loads((tmp_path / "tsq.json").read_text(encoding="utf-8"))["aliases"] == {
        "head.weight": "embed.weight"
    }


def test_tensor_names_are_pinned(saved: Path) -> None:
    stored = load_file(saved / "model.safetensors")
    norm = {
        f"norm.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    layers = {f"up.{name}" for name in ("words", "scale_bits", "zero_words", "bias")} | {
        "down.words",
        "down.scale_bits",
    }
    assert set(stored) == {"embed.weight", "non_persistent:shift"} | norm | layers
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_save_leaves_other_files_alone_and_nothing_of_its_own(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    save(quantized_net(torch.bfloat16), saved)
    assert sorted(file.name for file in saved.iterdir()) == [
        "model.safetensors",
        "tokenizer.json",
        "tsq.json",
    ]
    assert_same(load(saved, float_net()), quantized_net(torch.bfloat16))


def test_both_files_have_the_permissions_of_any_new_file(saved: Path) -> None:
    (saved / "other").write_text("")
    assert {file.stat().st_mode for file in saved.iterdir()} == {(saved / "other").stat().st_mode}


@pytest.mark.parametrize("step", ["save_file", "header_digest", "_flush"])
def test_an_interrupted_save_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(quantized_net(torch.bfloat16), saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"cannot save to .*saved: No space left on device; give a directory"
    ):
        save(quantized_net(torch.bfloat16), saved)
    assert_same(load(saved, float_net()), quantized_net())


def test_a_crash_between_the_two_renames_is_noticed(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def once(source: Path, target: Path) -> None:
        real(source, target)
        raise KeyboardInterrupt

    changed = quantized_net()
    del changed.tsq_report  # the same tensors: only the two files' bond can tell
    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        save(changed, saved)
    with pytest.raises(
        CheckpointError, match=r"are of different saves; copy the whole directory again"
    ):
        load(saved, float_net())


def test_nothing_here_can_execute_what_it_reads() -> None:
    for file in Path(tsq_layers.formats.tsq.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        modules = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert not names & {"eval", "exec", "compile", "__import__"}
        assert not modules & {"pickle", "marshal", "shelve", "importlib", "yaml"}
        assert not calls & {"torch.load", "torch.save"}


# What cannot be saved


def test_save_refuses_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"Net holds no QuantLinear: call tsq.quantize"):
        save(float_net(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_save_refuses_tensors_without_values(tmp_path: Path) -> None:
    with pytest.raises(
        StateError, match=r"tensor '0.weight' is on the meta device and has no values"
    ):
        save(nn.Sequential(nn.LayerNorm(4, device="meta"), quantized(torch.randn(6, 10))), tmp_path)


def test_save_refuses_extra_state(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

    with pytest.raises(CheckpointError, match=r"module '1' \(Extra\) keeps extra state"):
        save(nn.Sequential(quantized(torch.randn(6, 10)), Extra()), tmp_path)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")
def test_save_refuses_what_a_later_pass_keeps_elsewhere(tmp_path: Path) -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 8), "fc": quantized(torch.randn(6, 10))})
    save(model, tmp_path)
    torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, torch.qint8, inplace=True)
    with pytest.raises(
        CheckpointError,
        match=r"module 'rnn.*keeps 'rnn.*save the model before the pass that makes it",
    ):
        save(model, tmp_path)


def test_save_takes_a_model_that_calls_its_tensors_otherwise(tmp_path: Path) -> None:
    model = nn.Sequential(quantized(torch.randn(6, 10)), nn.LayerNorm(6))

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
        state[f"{prefix}norm.weight"] = state.pop(f"{prefix}1.weight")

    model.register_state_dict_post_hook(rename)
    save(model, tmp_path)
    again = load(tmp_path, nn.Sequential(nn.Linear(10, 6), nn.LayerNorm(6)))
    assert torch.equal(again[1].weight, model[1].weight)


def test_save_refuses_tensors_that_overlap_without_being_the_same(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), quantized(torch.randn(6, 10))
    )
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    with pytest.raises(
        CheckpointError,
        match=r"tensors '0.weight' and '1.weight' share memory but are not the same tensor.*clone",
    ):
        save(model, tmp_path)


def test_save_refuses_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot save to .*file: .*; give a directory"):
        save(quantized_net(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# Damaged files


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def store(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return damage


def change(*path: str, to: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        def apply(content: dict[str, Any]) -> None:
            for step in path[:-1]:
                content = content[step]
            content[path[-1]] = to

        edit(directory, apply)

    return damage


DAMAGE = {
    "no directory": (
        lambda directory: directory.rename(directory.with_name("moved")),
        r"no tsq.json in .*saved: give the directory",
    ),
    "no description": (
        remove("tsq.json"),
        r"no tsq.json in .*saved: give the directory that tsq.save wrote",
    ),
    "no tensors": (
        remove("model.safetensors"),
        r"no model.safetensors in .*saved, only tsq.json; copy the whole directory",
    ),
    "empty tensors": (
        overwrite("model.safetensors", b""),
        r"model.safetensors in .* cannot be read, it is damaged or incomplete",
    ),
    "foreign tensors": (
        overwrite("model.safetensors", b"\xff" * 400),
        r"model.safetensors in .* cannot be read, it is damaged",
    ),
    "truncated tensors": (
        truncate,
        r"model.safetensors in .* cannot be read, it is damaged or incomplete: .*save the model again",
    ),
    "tensor removed": (
        store(lambda tensors: tensors.pop("up.words")),
        r"tensor 'up.words' is missing in model.safetensors: .* different saves",
    ),
    "tensor added": (
        store(lambda tensors: tensors.update(more=torch.ones(1))),
        r"tensor 'more' is missing in tsq.json: .* different saves",
    ),
    "rewritten tensors": (
        store(lambda tensors: None),
        r"model.safetensors and tsq.json in .* are of different saves",
    ),
    "binary description": (overwrite("tsq.json", b"\xff\xfe"), r"cannot read tsq.json in .*utf-8"),
    "cut description": (
        overwrite("tsq.json", b'{"format": "tsq'),
        r"tsq.json is not JSON: .* damaged or was changed by hand",
    ),
    "list": (
        overwrite("tsq.json", b"[]"),
        r"not a checkpoint of tsq.save; give the directory that tsq.save wrote",
    ),
    "foreign": (change("format", to="gguf"), r"not a checkpoint of tsq.save"),
    "newer": (
        change("schema_version", to=2),
        r"schema_version=2, written by tsq_layers .*; this version reads 1: upgrade tsq_layers",
    ),
    "unknown key": (change("extra", to=1), r"tsq.json has unknown key 'extra'"),
    "type": (change("layers", to=[]), r"tsq.json has a list under 'layers'"),
    "missing key": (
        lambda directory: edit(directory, lambda content: content.pop("aliases")),
        r"tsq.json lacks key 'aliases'",
    ),
    "unknown layer key": (
        change("layers", "up", "rank", to=1),
        r"layer 'up' has unknown key 'rank'",
    ),
    "layer type": (change("layers", "up", "bits", to="3"), r"layer 'up': bits='3' is not int"),
    "layer bits": (change("layers", "up", "bits", to=11), r"layer 'up' in tsq.json: .*11"),
    "layer dtype": (
        change("layers", "up", "dtype", to="float64"),
        r"tensor 'up.bias' is float32 \[6\] in the checkpoint; .* needs float64 \[6\]",
    ),
    "layer no dtype": (
        change("layers", "up", "scale_dtype", to="load"),
        r"layer 'up' in tsq.json: 'load' is not a dtype",
    ),
    "layer group": (
        change("layers", "up", "group_size", to=5),
        r"tensor 'up.\w+' is int.* in the checkpoint; its layer, as tsq.json describes it, needs",
    ),
    "layer symmetry": (
        change("layers", "up", "symmetric", to=True),
        r"checkpoint holds 'up.zero_words', which the model does not have",
    ),
    "layer bias": (
        change("layers", "down", "bias", to=True),
        r"checkpoint lacks 'down.bias', which the model has",
    ),
    "tensor type": (
        change("tensors", "up.bias", to=3),
        r"tensor 'up.bias' is int, not a JSON object",
    ),
    "tensor key": (
        change("tensors", "up.bias", "rank", to=3),
        r"tensor 'up.bias' has unknown key 'rank'",
    ),
    "tensor dtype": (
        change("tensors", "embed.weight", "dtype", to="int8"),
        r"'embed.weight' is float32 \[7, 10\] in model.safetensors and int8 \[7, 10\] in tsq.json",
    ),
    "alias target": (
        change("aliases", "a", to="b"),
        r"alias 'a' of 'b' does not lead to a stored tensor",
    ),
    "alias type": (
        change("aliases", "a", to=[]),
        r"alias 'a' of \[\] does not lead to a stored tensor",
    ),
    "report": (change("report", "paired", to="yes"), r"the report: paired='yes' is not bool"),
    "report config": (change("report", "config", "bits", to=9), r"the report: config: bits=9"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_model_stays_as_it_was(saved: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(saved)
    fresh = float_net()
    before = snapshot(fresh)
    with pytest.raises(CheckpointError, match=message):
        load(saved, fresh)
    assert snapshot(fresh) == before


# Other models


def without(name: str) -> Callable[[nn.Module], object]:
    return lambda model: delattr(model, name)


def having(name: str, module: nn.Module) -> Callable[[nn.Module], object]:
    return lambda model: setattr(model, name, module)


OTHER = {
    "no layer": (
        without("up"),
        r"layer 'up' of the checkpoint is not in this Net; build the model with the configuration",
    ),
    "other width": (
        having("up", nn.Linear(12, 6)),
        r"layer 'up' of this Net has a weight matrix of shape \(6, 12\), in the checkpoint it is \(6, 10\)",
    ),
    "no weight": (
        having("up", nn.ReLU()),
        r"layer 'up' of this Net is a ReLU, no layer that can be quantised",
    ),
    "quantized": (
        having("up", QuantLinear(10, 6, bits=3, group_size=4)),
        r"layer 'up' of this Net is quantised already; give a freshly built",
    ),
    "other size": (
        having("embed", nn.Embedding(8, 10)),
        r"tensor 'embed.weight' has shape \(8, 10\) in this model and \(7, 10\) in the checkpoint",
    ),
    "more": (
        having("more", nn.Linear(2, 2)),
        r"the checkpoint lacks 'more.bias', 'more.weight', which the model has",
    ),
    "many more": (
        having("more", nn.LSTM(2, 2)),
        r"the checkpoint lacks 'more.bias_hh_l0', .* and 1 more, which the model has",
    ),
    "less": (
        without("norm"),
        r"the checkpoint holds 'norm.bias', .* and 2 more, which the model does not have",
    ),
    "meta attribute": (
        lambda model: setattr(model, "table", torch.ones(2, device="meta")),
        r"attribute 'table' of module '' \(Net\) is a tensor on the meta",
    ),
    "meta buffer": (
        lambda model: model.register_buffer(
            "table", torch.ones(2, device="meta"), persistent=False
        ),
        r"the checkpoint lacks 'non_persistent:table', which the model has",
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", OTHER)
def test_another_model_is_refused_and_stays_as_it_was(saved: Path, case: str, device: str) -> None:
    alter, message = OTHER[case]
    with torch.device(device):
        fresh = float_net()
    alter(fresh)
    before = snapshot(fresh)
    with pytest.raises(CheckpointError, match=message):
        load(saved, fresh)
    assert snapshot(fresh) == before


def test_a_prepared_model_is_not_loaded_into(tmp_path):
    made = nn.Sequential(nn.Linear(32, 16))
    tsq.save(tsq.quantize(made, tsq.QuantConfig(bits=4, group_size=16, method="rtn")), tmp_path)
    model = tsq.prepare(nn.Sequential(nn.Linear(32, 16)), tsq.QuantConfig(bits=4, group_size=16))
    with pytest.raises(StateError, match=r"call unprepare\(model\) before load"):
        tsq.load(tmp_path, model)
    tsq.load(tmp_path, tsq.unprepare(model))
