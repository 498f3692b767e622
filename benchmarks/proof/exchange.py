"""Checkpoints that go out, come in, and are refined; and the command line."""

import functools
import io
import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as pieces
from torch import nn

import tsq_layers as tsq
from benchmarks.proof.artefacts import record_export, record_model, record_state
from benchmarks.proof.case import Case
from benchmarks.proof.library import configured, write_checkpoint
from benchmarks.proof.models import MODELS, llama, output
from benchmarks.proof.record import Record

_OPTIONS = ["--bits", "4", "--group-size", "32"]
_AMOUNTS = ["--tokens", "512", "--sequence-length", "32", "--batch-size", "4"]


def cases() -> Iterator[Case]:
    """List the cases."""
    for bits in range(1, 9):
        yield Case(f"exchange/formats/{bits}", functools.partial(formats, bits=bits))
    yield Case("exchange/mixed", mixed)
    yield Case("exchange/experts", experts)
    yield Case("exchange/half", half)
    for form in ("gptq", "gptq-v1", "compressed-tensors"):
        yield Case(f"exchange/import/{form}", functools.partial(imported, form=form))
    for variant, fields in _REFINED.items():
        yield Case(f"exchange/refine/{variant}", functools.partial(refined, fields=fields))
    yield Case("exchange/refine/resumed", refined_again)
    yield Case("exchange/commands", commands)


_REFINED: dict[str, dict[str, Any] | None] = {
    "default": None,
    "joint": {"joint_rounds": 1},
    "descent": {"refine": "descent", "deviation": "none"},
}

_HELD: dict[str, tuple[tuple[int, bool], ...]] = {
    "gptq": tuple((bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    "gptq-v1": tuple((bits, True) for bits in (2, 3, 4, 8)),
    "compressed-tensors": tuple((b, symmetric) for b in range(1, 9) for symmetric in (True, False)),
    "gguf": ((4, True), (5, True), (8, True)),
}
"""Format → bits, and whether symmetric, that it holds."""


def tokenizer() -> Any:
    """Make a tokenizer of bytes, of which the first are in the vocabulary of the models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    plain = Tokenizer(pieces.BPE(vocab={**vocabulary, "<end>": len(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    special = {"eos_token": "<end>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def wide_llama() -> nn.Module:
    """Build a decoder that knows all tokens of the tokenizer."""
    torch.manual_seed(0)
    return llama(vocab_size=257).eval()


def formats(record: Record, bits: int) -> None:
    """Write rounded models in every format that holds them."""
    kind = MODELS["llama"]
    for symmetric in (True, False):
        config = configured(method="rtn", bits=bits, group_size=32, symmetric=symmetric)
        model = tsq.quantize(kind.build(), config)
        name = "symmetric" if symmetric else "asymmetric"
        for form, held in _HELD.items():
            if (bits, symmetric) in held:
                folder = record.folder / name / form
                folder.parent.mkdir(exist_ok=True)
                write_checkpoint(model, folder, format=form)
                record.files(f"{name}/{form}", folder)


def mixed(record: Record) -> None:
    """Write layers of several widths, a tokenizer, shards, for an engine that cannot serve it."""
    overrides = {"down_proj": {"bits": 8}, "o_proj": {"group_size": None}}
    fields = {"bits": 4, "group_size": 32, "symmetric": True, "overrides": overrides}
    config = configured(method="rtn", embeddings=True, skip=[], **fields)
    model = tsq.quantize(wide_llama(), config)
    options: dict[str, Any] = {"tokenizer": tokenizer(), "dequantize_others": True}
    record_export(record, model, record.folder / "gguf", "gguf", engine="vllm", **options)
    options |= {"max_shard_size": 60_000, "engine": "vllm"}
    record_export(record, model, record.folder / "tensors", "compressed-tensors", **options)


def experts(record: Record) -> None:
    """Write experts as floats where a format cannot hold them."""
    kind = MODELS["mixtral"]
    config = configured(method="rtn", bits=4, group_size=16, symmetric=True)
    model = tsq.quantize(kind.build(), config)
    form = "compressed-tensors"
    record_export(record, model, record.folder / "out", form, dequantize_others=True)


def half(record: Record) -> None:
    """Write a model in half precision, whose scales engines would round."""
    model = MODELS["llama"].build().to(torch.bfloat16)
    config = configured(method="rtn", bits=4, group_size=32, symmetric=True)
    model = tsq.quantize(model, config)
    for form in ("gptq", "compressed-tensors", "gguf"):
        record_export(record, model, record.folder / form, form)


def quantized(**fields: Any) -> nn.Module:
    """Quantise a model by GPTQ."""
    kind = MODELS["llama"]
    given = {"method": "gptq", "bits": 4, "group_size": 32, **fields}
    return tsq.quantize(kind.build(), configured(**given), kind.batches())


def imported(record: Record, form: str) -> None:
    """Read what was written, into a model that is given and into one that is built; refine it."""
    kind, folder = MODELS["llama"], record.folder / "out"
    symmetric = form == "gptq-v1"
    write_checkpoint(quantized(symmetric=symmetric), folder, format=form)
    record_model(record, tsq.import_checkpoint(folder), kind.batches()[0])
    model = tsq.import_checkpoint(folder, kind.build(), dtype=torch.float32)
    record_state(record, model, "given/")
    tsq.refine(model, kind.build(), kind.batches(), held_out=kind.batches(1, seed=2))
    record_state(record, model, "refined/")
    record_export(record, model, record.folder / "again", form)


def refined(record: Record, fields: dict[str, Any] | None) -> None:
    """Refine a saved model."""
    kind, folder = MODELS["llama"], record.folder / "save"
    tsq.save(quantized(bits=3), folder)
    model = tsq.load(folder, kind.build())
    config = None if fields is None else configured(**fields)
    model = tsq.refine(model, kind.build(), kind.batches(), config=config)
    record_state(record, model)
    record.tensors("output", {"output": output(model, kind.batches()[0])})


def refined_again(record: Record) -> None:
    """Refine twice with one directory: the second time all is restored."""
    kind, folder = MODELS["llama"], record.folder / "journal"
    for prefix in ("", "again/"):
        model = quantized(bits=3)
        tsq.refine(model, kind.build(), kind.batches(), checkpoint_dir=folder)
        record_state(record, model, prefix)


# --- the command line ----------------------------------------------------------------------------


def commands(record: Record) -> None:
    """Run every command on a directory."""
    folder, source = record.folder, record.folder / "float"
    wide_llama().save_pretrained(source)
    tokenizer().save_pretrained(source)
    text = folder / "text.txt"
    text.write_text("The state of the union is as it was. " * 60, encoding="utf-8")
    config = folder / "config.json"
    config.write_text(configured(method="two-stage", bits=3, joint_rounds=1).to_json())
    amounts = ["--text", "@text.txt", *_AMOUNTS]
    lines: dict[str, list[str]] = {
        "plan": ["plan", "@float", *_OPTIONS, *_AMOUNTS, "--json"],
        "quantize": ["quantize", "@float", "--out", "@own", "--config", "@config.json", *amounts],
        "best": ["quantize", "@float", "--out", "@best", *_OPTIONS, "--method", "best", *amounts],
        "gptq": ["quantize", "@float", "--out", "@gptq", *_OPTIONS, *amounts, "--format", "gptq"],
        "inspect": ["inspect", "@own", "--json"],
        "inspect-text": ["inspect", "@gptq"],
        "eval": ["eval", "@own", "--text", "@text.txt", "--window", "48", "--json"],
        "export": ["export", "@own", "--out", "@exported", "--format", "compressed-tensors"],
        "import": ["import", "@gptq", "--out", "@imported", "--json"],
        "refine": ["refine", "@gptq", "@float", "--out", "@refined", *amounts, "--json"],
        "refused": ["export", "@best", "--out", "@refused", "--format", "gptq"],
        "completion": ["completion", "bash"],
        "help": ["quantize", "--help"],
    }
    for name, line in lines.items():
        status, said = command(folder, line)
        record.values(f"{name}/status", status)
        if name not in ("help", "completion"):  # words, of which a version may have others
            _note_said(record, f"{name}/said", said)
    for name in ("own", "best", "gptq", "exported", "imported", "refined"):
        record.files(name, folder / name)


def _note_said(record: Record, key: str, said: str) -> None:
    if said.startswith("{"):
        record.values(key, json.loads(said))
    else:
        record.text(key, said)


def command(folder: Path, line: list[str]) -> tuple[int, str]:
    """Run a command in this process, in a folder; its exit status, and what it has said."""
    said, status = io.StringIO(), 0
    program = ["tsq", *(_in_folder(folder, word) for word in line)]
    with (
        mock.patch.object(sys, "argv", program),
        redirect_stdout(said),
        redirect_stderr(io.StringIO()),
    ):
        try:
            runpy.run_module("tsq_layers", run_name="__main__")
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
    return status, said.getvalue()


def _in_folder(folder: Path, word: str) -> str:
    """Make the name of a place whole; the others stay."""
    return str(folder / word[1:]) if word.startswith("@") else word
