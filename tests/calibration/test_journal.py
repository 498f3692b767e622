"""The journal: what was solved comes back bit by bit or not at all, whatever happens to the process and the files.

Run as a program, this file kills processes of its own; see ``main``.
"""

import contextlib
import dataclasses
import enum
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import OrderedDict, UserDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from tsq_layers.calibration.journal import (
    HELD_OUT,
    Fingerprint,
    Journal,
    digests,
    files,
    fingerprint_batch,
    fingerprint_data,
    fingerprint_weights,
)
from tsq_layers.calibration.journal import record as stage
from tsq_layers.errors import CalibrationError, CheckpointError, JournalWarning, StateError
from tsq_layers.reports import LayerReport
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.spec import LayerSpec

needs_fcntl = pytest.mark.skipif(files.fcntl is None, reason="kills and locks of POSIX")


def packed(rows=6, columns=20, seed=0, bias=False, **options):
    """A layer of random bits: among its scales are NaN, infinities and negative zeros."""
    options = {"bits": 3, "group_size": 8, **options}
    layer = QuantLinear(columns, rows, bias=bias, **options)
    generator = torch.Generator().manual_seed(seed)
    for buffer in (
        layer.words,
        layer.scale_bits,
        layer.zero_words,
        layer.offset_bits,
        layer.table_bits,
    ):
        if buffer is not None:
            bits = torch.iinfo(buffer.dtype).bits
            buffer.copy_(
                torch.randint(
                    -(1 << bits - 1), (1 << bits - 1) - 1, buffer.shape, generator=generator
                )
            )
    return layer


def report(name, **values):
    losses = {"assign": 0.1, "refine": 1e-300, "initialize": float("inf")}
    return LayerReport(
        name=name,
        kind="Linear",
        rows=6,
        columns=20,
        status="quantized",
        bits=3,
        damping=0.01,
        losses=losses,
        seconds={"solve": 1 / 3},
        shared_with=("other",),
        **values,
    )


STAGES = 3
NAMES = [("q", "k"), ("o",), ("down",)]
ALL_NAMES = [name for names in NAMES for name in names]


def solved(number):
    """What a stage gives: another value for every layer, the same one in every process."""
    return {
        name: (
            packed(rows=4 + number, seed=10 * number + index, symmetric=number == 1),
            report(name),
        )
        for index, name in enumerate(NAMES[number])
    }


WEIGHT = {"kind": "Linear", "shape": [6, 20], "dtype": "float32", "checksum": "00"}
RUN = Fingerprint(
    config={"bits": 3, "skip": ["lm_head"], "damping": 0.01, "overrides": {"4": {"bits": 4}}},
    layers=dict.fromkeys(ALL_NAMES, WEIGHT),
    tensors={"norm.weight": {"shape": [6], "dtype": "float32", "checksum": "01"}},
    options={"paired": True, "versions": {"torch": "2.13"}},
    data=("a0", "a1", "a2", HELD_OUT + "b0"),
)


def filled(directory, stages=STAGES, run=RUN):
    with Journal(directory, run) as journal:
        for number in range(stages):
            journal.write(solved(number))
    return directory


def assert_same(layer, other):
    assert LayerSpec.of(layer) == LayerSpec.of(other)
    for name, buffer in layer.named_buffers():
        again = getattr(other, name)
        assert (buffer.dtype, buffer.device, buffer.shape) == (
            again.dtype,
            again.device,
            again.shape,
        ), name
        assert torch.equal(buffer, again), name
    assert layer.bias is other.bias is None


def assert_holds(journal, stages):
    """The journal has restored exactly the first stages, and every bit of them."""
    assert list(journal.restored) == [name for names in NAMES[:stages] for name in names]
    for number in range(stages):
        for name, (layer, its_report) in solved(number).items():
            assert name in journal.restored
            restored, restored_report = journal.restored[name]
            assert_same(restored, layer)
            assert restored_report == its_report


def stage_files(directory):
    return sorted(path for path in directory.iterdir() if path.name.startswith("stage-"))


# --- round trips ---------------------------------------------------------------------------------


def test_what_was_written_is_restored_bit_by_bit_in_its_order(tmp_path):
    directory = filled(tmp_path / "new" / "deep")
    with Journal(directory, RUN) as journal:
        assert_holds(journal, STAGES)
        assert len(journal.restored) == len(ALL_NAMES)


def test_the_comparison_sees_a_single_bit():
    layer, other = packed(), packed()
    assert_same(layer, other)
    other.scale_bits[2, 1] ^= 1
    with pytest.raises(AssertionError):
        assert_same(layer, other)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_matrix_is_restored(tmp_path, bits, symmetric, scales, dtype):
    layer = packed(bits=bits, symmetric=symmetric, scale_dtype=scales, dtype=dtype)
    with Journal(tmp_path, RUN) as journal:
        journal.write({"q": (layer, report("q"))})
    with Journal(tmp_path, RUN) as journal:
        assert_same(journal.restored["q"][0], layer)


@pytest.mark.parametrize(
    "kind",
    [
        {"offsets": True},
        {"tables": "row"},
        {"tables": "group"},
        {"tables": "row", "scale_dtype": torch.float32},
    ],
)
def test_offsets_and_tables_are_restored(tmp_path, kind):
    layer = packed(**kind)
    with Journal(tmp_path, RUN) as journal:
        journal.write({"q": (layer, report("q"))})
    with Journal(tmp_path, RUN) as journal:
        assert_same(journal.restored["q"][0], layer)


def test_slices_of_one_tensor_are_stored_each(tmp_path):
    whole, first, second = packed(rows=8), packed(rows=4), packed(rows=4)
    for buffer in ("words", "scale_bits", "zero_words"):
        for layer, rows in ((first, slice(0, 4)), (second, slice(2, 6))):
            setattr(layer, buffer, getattr(whole, buffer)[rows])
    with Journal(tmp_path, RUN) as journal:
        journal.write({"q": (first, report("q")), "k": (second, report("k"))})
    with Journal(tmp_path, RUN) as journal:
        assert_same(journal.restored["q"][0], first)
        assert_same(journal.restored["k"][0], second)


def test_a_bias_is_not_stored(tmp_path):
    layer = packed(bias=True)
    with Journal(tmp_path, RUN) as journal:
        journal.write({"q": (layer, report("q"))})
    with Journal(tmp_path, RUN) as journal:
        restored, _ = journal.restored["q"]
    assert restored.bias is None
    assert torch.equal(restored.words, layer.words)


def test_restored_layers_do_not_need_the_directory_any_more(tmp_path):
    with Journal(filled(tmp_path / "j"), RUN) as journal:
        layer, _ = journal.restored["q"]
        for path in stage_files(tmp_path / "j"):
            path.write_bytes(bytes(path.stat().st_size))
    shutil.rmtree(tmp_path / "j")
    assert_same(layer, solved(0)["q"][0])


def test_a_layer_of_an_unusual_name_is_restored(tmp_path):
    names = ["", "__metadata__", "a b/ü\n\"'", "0.words"]
    run = dataclasses.replace(RUN, layers=dict.fromkeys(names, WEIGHT))
    with Journal(tmp_path, run) as journal:
        journal.write({name: (packed(seed=seed), report(name)) for seed, name in enumerate(names)})
    with Journal(tmp_path, run) as journal:
        assert list(journal.restored) == names
        for seed, name in enumerate(names):
            assert_same(journal.restored[name][0], packed(seed=seed))


def test_a_run_goes_on_where_it_stopped_and_ends_as_if_it_had_not(tmp_path):
    whole, resumed = filled(tmp_path / "whole"), filled(tmp_path / "resumed", stages=2)
    with Journal(resumed, RUN) as journal:
        assert_holds(journal, 2)
        journal.write(solved(2))
        assert_holds(journal, 2)  # what this run writes is not restored
    assert [path.name for path in stage_files(resumed)] == [
        path.name for path in stage_files(whole)
    ]
    for path in stage_files(whole):
        assert (resumed / path.name).read_bytes() == path.read_bytes()


def test_an_empty_stage_is_no_stage(tmp_path):
    with Journal(tmp_path, RUN) as journal:
        journal.write({})
    assert stage_files(tmp_path) == []


# --- the format ----------------------------------------------------------------------------------

GOLDEN = """{
 "format": "tsq_layers calibration",
 "schema_version": 3,
 "sha256": "a0d1df62072a7e2f9e47e5655d174f844ecca662b4bc2e7d0dd43e61a9c9055f",
 "fingerprint": {
  "config": {
   "bits": 3
  },
  "layers": {},
  "options": {
   "paired": true
  },
  "tensors": {},
  "data": [
   "ab"
  ]
 }
}
"""


def test_journal_json_is_the_golden_one(tmp_path):
    Journal(
        tmp_path, Fingerprint(config={"bits": 3}, layers={}, options={"paired": True}, data=("ab",))
    ).close()
    assert (tmp_path / "journal.json").read_text(encoding="utf-8") == GOLDEN


def test_a_stage_file_holds_what_it_should(tmp_path):
    run = dataclasses.replace(RUN, data=("x",))
    with Journal(tmp_path, run) as journal:
        journal.write({"q": (packed(), report("q")), "k": (packed(symmetric=True), report("k"))})
    (path,) = stage_files(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {
            "0.words",
            "0.scale_bits",
            "0.zero_words",
            "1.words",
            "1.scale_bits",
        }
        values = json.loads(file.metadata().pop("tsq_journal"))
    assert (values["run"], values["stage"]) == (run.digest(), 0)
    assert [layer["name"] for layer in values["layers"]] == ["q", "k"]
    assert values["layers"][0]["spec"] == LayerSpec.of(packed()).to_dict()
    assert values["layers"][0]["report"] == report("q").to_dict()


def test_fingerprint_survives_json_and_does_not_depend_on_the_order_of_keys():
    again = Fingerprint.from_dict(json.loads(json.dumps(RUN.to_dict())))
    assert again == RUN
    assert again.digest() == RUN.digest()
    backwards = dataclasses.replace(RUN, config=dict(reversed(RUN.config.items())))
    assert backwards.digest() == RUN.digest()
    assert dataclasses.replace(RUN, data=None).digest() != RUN.digest()


def test_fingerprint_takes_tuples_for_lists_and_refuses_what_json_lacks():
    assert dataclasses.replace(RUN, config={**RUN.config, "skip": ("lm_head",)}) == RUN
    with pytest.raises(TypeError):
        dataclasses.replace(RUN, options={"device": torch.device("cpu")})
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(RUN, options={"x": float("nan")})


# --- another run ---------------------------------------------------------------------------------


def changed(**fields):
    return dataclasses.replace(RUN, **fields)


def layers_with(name, **values):
    return {**RUN.layers, name: {**WEIGHT, **values}}


OTHER_RUNS = {
    "config field": (
        changed(config={**RUN.config, "bits": 4}),
        "config.bits is 3 there and 4 here",
    ),
    "config flag": (
        changed(config={**RUN.config, "bits": True}),
        "config.bits is 3 there and True here",
    ),
    "config list": (
        changed(config={**RUN.config, "skip": []}),
        r"config.skip is \['lm_head'\] there and \[\] here",
    ),
    "config override": (
        changed(config={**RUN.config, "overrides": {"4": {"bits": 2}}}),
        r"config.overrides\['4'\].bits is 4 there and 2 here",
    ),
    "config override gone": (
        changed(config={**RUN.config, "overrides": {}}),
        r"config.overrides\['4'\] is {'bits': 4} there and missing here",
    ),
    "config field new": (
        changed(config={**RUN.config, "x": None}),
        "config.x is missing there and None here",
    ),
    "option": (
        changed(options={**RUN.options, "paired": False}),
        "option paired is True there and False here",
    ),
    "version": (
        changed(options={**RUN.options, "versions": {"torch": "3"}}),
        "option versions.torch is '2.13' there and '3' here",
    ),
    "layer gone": (
        changed(layers=dict.fromkeys(ALL_NAMES[1:], WEIGHT)),
        "layer 'q' is there and not here",
    ),
    "layer new": (changed(layers=layers_with("z")), "layer 'z' is here and not there"),
    "layer shape": (
        changed(layers=layers_with("k", shape=[6, 21])),
        r"layer 'k': shape is \[6, 20\] there and \[6, 21\] here",
    ),
    "layer dtype": (
        changed(layers=layers_with("k", dtype="float16")),
        "layer 'k': dtype is 'float32' there and 'float16'",
    ),
    "layer kind": (
        changed(layers=layers_with("k", kind="Conv1D")),
        "layer 'k': kind is 'Linear' there and 'Conv1D' here",
    ),
    "layer values": (changed(layers=layers_with("k", checksum="ff")), "layer 'k' has other values"),
    "tensor values": (
        changed(tensors={"norm.weight": {**RUN.tensors["norm.weight"], "checksum": "ff"}}),
        "tensor 'norm.weight' has other values",
    ),
    "tensor gone": (changed(tensors={}), "tensor 'norm.weight' is there and not here"),
    "batch": (
        changed(data=("a0", "XX", "a2", HELD_OUT + "b0")),
        "(?<!held-out )batch 1 is other data",
    ),
    "batches fewer": (
        changed(data=("a0", "a1", HELD_OUT + "b0")),
        "the number of batches is 3 there and 2 here",
    ),
    "batches more": (
        changed(data=("a0", "a1", "a2", "a3", HELD_OUT + "b0")),
        "of batches is 3 there and 4 here",
    ),
    "batches shuffled": (
        changed(data=("a2", "a1", "a0", HELD_OUT + "b0")),
        "the batches come in another order",
    ),
    "held-out batch": (
        changed(data=("a0", "a1", "a2", HELD_OUT + "XX")),
        "held-out batch 0 is other data",
    ),
    "held-out gone": (
        changed(data=("a0", "a1", "a2")),
        "the number of held-out batches is 1 there and 0 here",
    ),
}


@pytest.mark.parametrize(("other", "message"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_a_directory_of_another_run_is_refused_and_the_difference_named(tmp_path, other, message):
    directory = filled(tmp_path / "j", stages=1)
    before = {
        path: path.read_bytes() for path in directory.iterdir() if path.name != files.LOCK_FILE
    }
    with pytest.raises(
        CheckpointError, match=message + ".*(give another checkpoint_dir|must not shuffle)"
    ) as caught:
        Journal(directory, other)
    assert str(directory) in str(caught.value)
    late = dataclasses.replace(other, data=None)
    if other.data != RUN.data:
        with Journal(directory, late) as journal, pytest.raises(CheckpointError, match=message):
            journal.check_data(other.data)
    else:
        with pytest.raises(CheckpointError, match=message):
            Journal(directory, late)
    assert before == {
        path: path.read_bytes() for path in directory.iterdir() if path.name != files.LOCK_FILE
    }
    with Journal(directory, RUN) as journal:  # it was released, and is as it was
        assert_holds(journal, 1)


def test_every_field_of_a_fingerprint_is_among_the_differences():
    seen = {
        f.name
        for f in dataclasses.fields(RUN)
        for other, _ in OTHER_RUNS.values()
        if getattr(other, f.name) != getattr(RUN, f.name)
    }
    assert seen == {f.name for f in dataclasses.fields(Fingerprint)}


def test_many_differences_are_counted(tmp_path):
    filled(tmp_path / "j", stages=0)
    other = changed(
        layers={name: {**WEIGHT, "checksum": "ff"} for name in ALL_NAMES}, options={}, tensors={}
    )
    with pytest.raises(CheckpointError, match="layer 'o' has other values; and 2 more differences"):
        Journal(tmp_path / "j", other)


def test_equal_numbers_are_no_difference(tmp_path):
    filled(tmp_path / "j")
    other = changed(config={**RUN.config, "bits": 3.0})
    with Journal(tmp_path / "j", other) as journal:
        assert_holds(journal, STAGES)


@pytest.mark.parametrize("stored", [True, False], ids=["known there", "not known there"])
def test_nothing_is_restored_or_written_before_the_data_are_known(tmp_path, stored):
    late = changed(data=None)
    filled(tmp_path / "j", stages=2) if stored else Journal(tmp_path / "j", late).close()
    with Journal(tmp_path / "j", late) as journal:
        with pytest.raises(StateError, match="check_data"):
            _ = journal.restored
        with pytest.raises(StateError, match="check_data"):
            journal.write(solved(2))
        journal.check_data(RUN.data)
        journal.check_data(RUN.data)
        assert_holds(journal, 2 if stored else 0)
        with pytest.raises(CheckpointError, match="batch 0 is other data"):
            journal.check_data(("zz", *RUN.data[1:]))
    with Journal(tmp_path / "j", RUN) as journal:
        assert_holds(journal, 2 if stored else 0)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "stage-000000-x.safetensors", "sub"])
def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).mkdir() if name == "sub" else (tmp_path / name).write_text("mine")
    with pytest.raises(
        CheckpointError, match=f"holds '{name}' and no journal.json.*give an empty directory"
    ):
        Journal(tmp_path, RUN)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_files_beside_a_journal_are_left_alone(tmp_path):
    filled(tmp_path / "j")
    (tmp_path / "j" / "notes.txt").write_text("mine")
    with Journal(tmp_path / "j", RUN) as journal:
        assert_holds(journal, STAGES)
    assert (tmp_path / "j" / "notes.txt").read_text() == "mine"


def test_stages_without_their_journal_are_refused(tmp_path):
    filled(tmp_path / "j")
    (tmp_path / "j" / "journal.json").unlink()
    with pytest.raises(CheckpointError, match="no journal.json"):
        Journal(tmp_path / "j", RUN)


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot use checkpoint_dir"):
        Journal(tmp_path / "file", RUN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged"),
        ("[]", "is not of a calibration"),
        ('{"format": "other"}', "is not of a calibration"),
        (
            '{"format": "tsq_layers calibration", "schema_version": 1}',
            "schema_version=1, this version .* reads 3",
        ),
        ('{"format": "tsq_layers calibration", "schema_version": 3}', "is damaged"),
    ],
)
def test_a_journal_that_cannot_be_read_is_refused(tmp_path, content, message):
    (tmp_path / "journal.json").write_text(content)
    with pytest.raises(CheckpointError, match=message + ".*delete this one to start again"):
        Journal(tmp_path, RUN)


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Name → bytes of a complete directory."""
    directory = filled(tmp_path_factory.mktemp("complete") / "j")
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.name != files.LOCK_FILE
    }


def damaged(content, how, place, value):
    """``content`` with damage at a place between 0 and 1."""
    at = min(int(place * len(content)), len(content) - 1)
    if how == "cut":
        return content[:at]
    if how == "grown":
        return content + bytes([value]) * (at + 1)
    if how == "zeros":
        return content[:at] + bytes(len(content) - at)
    if how == "hole":
        return content[:at] + content[at + 1 :]
    return content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]


def restored_after(contents, file, content):
    """Open a directory in which one file is damaged; the number of stages that are left, every bit of them compared."""
    with tempfile.TemporaryDirectory() as directory:
        for name, original in contents.items():
            Path(directory, name).write_bytes(content if name == file else original)
        names = list(contents)
        stages = (
            names.index(file) - 1
            if file.startswith("stage") and content != contents[file]
            else STAGES
        )
        expect = pytest.warns(JournalWarning, match=f"stage {stages} .*{STAGES - stages} files")
        with (
            expect if stages < STAGES else contextlib.nullcontext(),
            Journal(directory, RUN) as journal,
        ):
            assert_holds(journal, stages)
            assert len(stage_files(Path(directory))) == stages
            for number in range(stages, STAGES):
                journal.write(solved(number))
        assert [path.name for path in stage_files(Path(directory))] == [
            n for n in names if n.startswith("stage")
        ]
        return stages


@settings(max_examples=60, deadline=None)
@given(
    file=st.integers(0, STAGES),
    how=st.sampled_from(["cut", "grown", "zeros", "hole", "flipped"]),
    place=st.floats(0, 1),
    value=st.integers(1, 255),
)
def test_damage_anywhere_never_gives_wrong_values(contents, file, how, place, value):
    name = sorted(contents)[file]
    content = damaged(contents[name], how, place, value)
    if name == "journal.json":
        try:
            assert restored_after(contents, name, content) == STAGES
        except CheckpointError:
            return
        assert json.loads(content) == json.loads(contents[name])  # white space was damaged
    else:
        restored_after(contents, name, content)


def test_an_undamaged_directory_is_restored_whole(contents):
    name = sorted(contents)[1]
    assert restored_after(contents, name, contents[name]) == STAGES


def test_without_the_check_damage_would_give_wrong_values(contents, monkeypatch):
    """So that the test above is one of the check, and not of something else that happens to see damage."""
    monkeypatch.setattr(
        stage,
        "_file_name",
        lambda number, digest: next(n for n in contents if f"-{number:06d}-" in n),
    )
    name = sorted(contents)[1]
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        restored_after(contents, name, damaged(contents[name], "flipped", 1.0, 1))


def test_a_stage_that_is_gone_ends_what_is_restored(tmp_path):
    directory = filled(tmp_path / "j")
    stage_files(directory)[1].unlink()
    with (
        pytest.warns(JournalWarning, match="stage 1 .*its file is missing.*1 files"),
        Journal(directory, RUN) as journal,
    ):
        assert_holds(journal, 1)
    assert len(stage_files(directory)) == 1


def test_stages_of_another_run_or_place_are_not_taken(tmp_path):
    other = filled(tmp_path / "other", run=changed(data=("other",)))
    mine = filled(tmp_path / "mine", stages=1)
    shutil.copy(stage_files(other)[1], mine)
    with (
        pytest.warns(JournalWarning, match="belongs to another run"),
        Journal(mine, RUN) as journal,
    ):
        assert_holds(journal, 1)
    whole = filled(tmp_path / "whole")
    moved = stage_files(whole)[2]
    moved.rename(mine / moved.name.replace("000002", "000001"))
    with (
        pytest.warns(JournalWarning, match="belongs to another run"),
        Journal(mine, RUN) as journal,
    ):
        assert_holds(journal, 1)


def test_two_files_of_a_stage_are_not_taken(tmp_path):
    directory = filled(tmp_path / "j", stages=2)
    shutil.copy(stage_files(directory)[1], directory / f"stage-000001-{'0' * 64}.safetensors")
    with pytest.warns(JournalWarning, match="several files"), Journal(directory, RUN) as journal:
        assert_holds(journal, 1)


def test_a_stage_of_unknown_or_repeated_layers_is_not_taken(tmp_path):
    for number, layers in enumerate(
        ({"q": (packed(), report("q"))}, {"strange": (packed(), report("strange"))})
    ):
        directory = filled(tmp_path / str(number), stages=1)
        name, content = stage.encode(layers, 1, RUN.digest())
        (directory / name).write_bytes(content)
        with (
            pytest.warns(JournalWarning, match="is not a layer of this run or"),
            Journal(directory, RUN) as journal,
        ):
            assert_holds(journal, 1)


def test_a_stage_that_cannot_be_read_is_not_removed(tmp_path, monkeypatch):
    directory = filled(tmp_path / "j")

    def failing(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(stage.hashlib, "file_digest", failing)
        with pytest.raises(CheckpointError, match="Input/output error"):
            Journal(directory, RUN)
    with Journal(directory, RUN) as journal:
        assert_holds(journal, STAGES)


def test_a_file_that_changes_after_opening_is_named(tmp_path):
    with Journal(filled(tmp_path / "j"), RUN) as journal:
        path = stage_files(tmp_path / "j")[0]
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CheckpointError, match="'q' cannot be read from .*stage-000000"):
            _ = journal.restored["q"]
        path.unlink()
        with pytest.raises(CheckpointError, match="'q' cannot be read from .*stage-000000"):
            _ = journal.restored["q"]
        with pytest.raises(KeyError):
            _ = journal.restored["nothing"]


def test_what_a_killed_write_left_is_removed(tmp_path):
    directory = filled(tmp_path / "j", stages=1)
    (directory / files.TEMPORARY).write_bytes(b"half")
    with Journal(directory, RUN) as journal:
        assert_holds(journal, 1)
        assert not (directory / files.TEMPORARY).exists()
    for leftover in (files.TEMPORARY, files.LOCK_FILE):  # killed before there was a journal
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / leftover).write_bytes(b"half")
        with Journal(tmp_path / leftover, RUN) as journal:
            assert_holds(journal, 0)


# --- writing -------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_write_returns(
    tmp_path, monkeypatch
):
    events = []
    with Journal(tmp_path, RUN) as journal:
        fsync, replace = os.fsync, os.replace

        def noted_fsync(descriptor):
            path = (
                Path(f"/proc/self/fd/{descriptor}").readlink()
                if Path("/proc/self/fd").exists()
                else tmp_path
            )
            size = path.stat().st_size
            events.append(
                ("fsync", "directory" if path.is_dir() else path.name, path.is_dir() or size > 1000)
            )
            fsync(descriptor)

        def noted_replace(source, target):
            events.append(("replace", Path(source).name, Path(target).name[:12]))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)
        journal.write(solved(0))
    if sys.platform == "linux":
        temporary = files.TEMPORARY
        assert events == [
            ("fsync", temporary, True),
            ("replace", temporary, "stage-000000"),
            ("fsync", "directory", True),
        ]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"]
)
def test_a_write_that_fails_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch, step, error):
    with Journal(tmp_path, RUN) as journal:
        journal.write(solved(0))

        def failing(*_):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, step, failing)
            full = pytest.raises(CheckpointError, match="No space left.*start again to go on")
            with full if isinstance(error, OSError) else pytest.raises(KeyboardInterrupt):
                journal.write(solved(1))
        assert not (tmp_path / files.TEMPORARY).exists()
        assert len(stage_files(tmp_path)) == 1
        journal.write(solved(1))
    with Journal(tmp_path, RUN) as journal:
        assert_holds(journal, 2)


def test_a_layer_is_written_once(tmp_path):
    filled(tmp_path / "j", stages=1)
    with Journal(tmp_path / "j", RUN) as journal:
        journal.write(solved(1))
        for name, problem in (
            ("q", "in the journal already"),
            ("o", "in the journal already"),
            ("x", "not a layer"),
        ):
            with pytest.raises(StateError, match=f"'{name}' is {problem}"):
                journal.write({"down": (packed(), report("down")), name: (packed(), report(name))})
    with Journal(tmp_path / "j", RUN) as journal:
        assert_holds(journal, 2)


def test_a_closed_journal_says_so(tmp_path):
    journal = Journal(tmp_path, RUN)
    journal.close()
    journal.close()
    with pytest.raises(StateError, match="is closed"):
        journal.write(solved(0))
    with pytest.raises(StateError, match="is closed"):
        journal.check_data(RUN.data)


# --- one run at a time ---------------------------------------------------------------------------


def test_a_second_journal_in_the_same_process_is_refused_until_the_first_is_closed(tmp_path):
    with Journal(tmp_path, RUN):
        (tmp_path / "link").symlink_to(tmp_path)
        for path in (tmp_path, tmp_path / "link"):
            with pytest.raises(
                StateError, match=r"another run uses .*this process.*another checkpoint_dir"
            ):
                Journal(path, RUN)
    Journal(tmp_path, RUN).close()


LOCK = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True); input()"  # noqa: E501


@needs_fcntl
def test_a_directory_that_another_process_uses_is_refused_until_it_is_killed(tmp_path):
    filled(tmp_path / "j")
    lock = tmp_path / "j" / files.LOCK_FILE
    command = [sys.executable, "-c", LOCK, str(lock)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        lock.write_text(f"{process.pid}\n")
        for _ in range(2):  # asking does not break the lock
            with pytest.raises(StateError, match=rf"another run uses .*process {process.pid}\)"):
                Journal(tmp_path / "j", RUN)
        process.kill()
    with Journal(tmp_path / "j", RUN) as journal:
        assert_holds(journal, STAGES)
        assert lock.read_text() == f"{os.getpid()}\n"


def test_without_fcntl_an_open_file_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    filled(tmp_path / "j")
    with Journal(
        tmp_path / "j", RUN
    ) as journal:  # the file of the first was left behind, and is no obstacle
        assert_holds(journal, STAGES)
    unlink = Path.unlink

    def refused(path, missing_ok=False):  # as where open files cannot be deleted
        if path.name == files.LOCK_FILE:
            raise PermissionError(13, "in use")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(StateError, match=rf"another run uses .*process {os.getpid()}\)"):
        Journal(tmp_path / "j", RUN)


def test_a_journal_that_was_forgotten_does_not_block(tmp_path):
    with pytest.warns(ResourceWarning):
        Journal(tmp_path, RUN)
    Journal(tmp_path, RUN).close()


# --- digests of batches --------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    ONE = 1


@dataclasses.dataclass
class Sample:
    x: object
    y: object = 0


class Pair(NamedTuple):
    x: int
    y: int


DIFFERENT = {
    "float tensor": torch.arange(6.0),
    "its bfloat16": torch.arange(6.0, dtype=torch.bfloat16),
    "its float16": torch.arange(6.0, dtype=torch.float16),
    "its integers": torch.arange(6),
    "another shape": torch.arange(6.0).view(2, 3),
    "a shape with 1": torch.arange(6.0).view(1, 6),
    "another value": torch.tensor([0.0, 1, 2, 3, 4, 6]),
    "another order": torch.arange(6.0).flip(0),
    "complex": torch.arange(6.0) + 0j,
    "conjugated": (torch.arange(6.0) * 1j).conj(),
    "not conjugated": torch.arange(6.0) * 1j,
    "booleans": torch.tensor([True, False]),
    "scalar tensor": torch.tensor(1),
    "empty": torch.empty(0),
    "empty 2-D": torch.empty(0, 3),
    "zero": torch.zeros(1),
    "negative zero": -torch.zeros(1),
    "None": None,
    "True": True,
    "1": 1,
    "IntEnum": Level.ONE,
    "1.0": 1.0,
    "1j": 1j,
    "nan": float("nan"),
    "text": "1",
    "bytes": b"1",
    "text of None": "None",
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "member": Colour.RED,
    "other member": Colour.BLUE,
    "list": [1, 2],
    "longer list": [1, 2, 0],
    "nested list": [[1], 2],
    "other nesting": [1, [2]],
    "tuple": (1, 2),
    "set": {1, 2},
    "empty list": [],
    "empty tuple": (),
    "empty mapping": {},
    "mapping": {"a": 1, "b": 2},
    "other keys": {"a": 1, "c": 2},
    "values changed": {"a": 2, "b": 1},
    "integer keys": {1: 2},
    "text keys": {"1": 2},
    "items": [["a", 1], ["b", 2]],
    "dataclass": Sample(1),
    "other dataclass": Sample(2),
    "array": np.arange(6),
    "array of floats": np.arange(6.0),
    "array of another shape": np.arange(6).reshape(2, 3),
    "array of text": np.array(["a", "b"]),
}

SAME = {
    "strides": (torch.arange(6).view(2, 3).T, torch.tensor([[0, 3], [1, 4], [2, 5]])),
    "storage": (torch.arange(10)[2:6], torch.arange(2, 6)),
    "gradients": (torch.ones(3, requires_grad=True), torch.ones(3)),
    "parameter": (torch.nn.Parameter(torch.ones(3)), torch.ones(3)),
    "lazy conjugate": (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
    "lazy negative": (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
    "order of keys": ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
    "kind of mapping": ({"a": 1, "b": 2}, OrderedDict(b=2, a=1)),
    "user mapping": ({"a": torch.ones(2)}, UserDict(a=torch.ones(2))),
    "named tuple": ((1, 2), Pair(1, 2)),
    "order of a set": ({3, 100, 7}, {100, 7, 3}),
    "nan": ([float("nan")], [float("nan")]),
    "order of an array": (
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(6).reshape(2, 3),
    ),
    "slice of an array": (np.arange(12)[::2], np.arange(0, 12, 2)),
    "memory": (memoryview(np.arange(3)), np.arange(3)),
}


def test_different_batches_have_different_digests():
    found = {name: fingerprint_batch(value) for name, value in DIFFERENT.items()}
    clashes = [(a, b) for a, b in itertools.combinations(found, 2) if found[a] == found[b]]
    assert clashes == []
    assert all(len(digest) == 64 for digest in found.values())


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME)
def test_equal_batches_have_equal_digests(one, other):
    assert fingerprint_batch(one) == fingerprint_batch(other)


@pytest.mark.parametrize("value", DIFFERENT.values(), ids=DIFFERENT)
def test_a_digest_is_repeated(value):
    assert (
        fingerprint_batch({"x": [value]})
        == fingerprint_batch({"x": [value]})
        != fingerprint_batch({"x": value})
    )


def test_a_digest_is_the_golden_one():
    batch = {"input_ids": torch.arange(4).view(1, 4), "flag": True, "scale": (0.5, None, "x")}
    assert (
        fingerprint_batch(batch)
        == "365c41f765d2176f2846ab1b061974c8e47e31b02ca83edf28429d59cd60b649"
    )


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        (object(), "batch", "a object"),
        ({"a": [1, object()]}, r"batch\['a'\]\[1\]", "a object"),
        ({object(): 1}, "a key of batch", "a object"),
        (Sample(lambda: 0), "batch.x", "a function"),
        (torch.Generator(), "batch", "a Generator"),
        (iter([1]), "batch", "a list_iterator"),
        (Sample, "batch", "a type"),
        (np.array([object()]), "batch", "a ndarray of objects"),
        (torch.empty(2, device="meta"), "batch", "a tensor that is on the meta device"),
        (torch.ones(2).to_sparse(), "batch", "a tensor that is sparse"),
    ],
    ids=[
        "object",
        "nested",
        "key",
        "field",
        "generator",
        "iterator",
        "class",
        "objects",
        "meta",
        "sparse",
    ],
)
def test_what_has_no_stable_bytes_is_refused_with_its_place(value, where, what):
    with pytest.raises(CalibrationError, match=f"^{where} is {what}.*leave checkpoint_dir out"):
        fingerprint_batch(value)


def test_digests_of_data_name_the_batch_and_mark_what_is_held_out():
    one, two = torch.ones(2), torch.zeros(2)
    assert fingerprint_data(iter([one, two]), [one]) == [
        fingerprint_batch(one),
        fingerprint_batch(two),
        "held-out:" + fingerprint_batch(one),
    ]
    with pytest.raises(CalibrationError, match=r"^batch 1\['x'\] is"):
        fingerprint_data([one, {"x": object()}])
    with pytest.raises(CalibrationError, match="^held-out batch 0 is"):
        fingerprint_data([one], [object()])


# --- checksums of weights ------------------------------------------------------------------------


def checksum(weight):
    return fingerprint_weights({"w": weight})["w"]["checksum"]


def multiplier(index, seed):
    """SplitMix64's finaliser with Python's integers, arithmetic shifts of signed values."""
    mask = (1 << 64) - 1

    def signed(value):
        value &= mask
        return value - (1 << 64) if value >> 63 else value

    value = signed((index + 1) * 0x9E3779B97F4A7C15 + seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = signed((value ^ (value >> shift)) * factor)
    return (value ^ (value >> 31)) | 1


def checksum_oracle(weight):
    """The sum as its formula says it, entry by entry."""
    integers = weight.view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    )
    total = 0
    for i, row in enumerate(integers.tolist()):
        for j, bits in enumerate(row):
            product = bits * multiplier(j, 1) % (1 << 64)
            product -= (product >> 63) << 64
            total += multiplier(i, 0) * (product ^ (product >> 32))
    return f"{total % (1 << 64):016x}"


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8],
)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 3)])
def test_checksum_is_the_sum_that_it_says(dtype, shape, monkeypatch):
    weight = (torch.randn(shape) * 10).to(dtype)
    before = weight.clone()
    expected = checksum_oracle(weight)
    assert checksum(weight) == expected
    monkeypatch.setattr(digests, "_CHUNK", 7)  # in many parts it is the same
    assert checksum(weight) == expected
    assert torch.equal(weight.view(torch.int8), before.view(torch.int8))


def test_checksum_sees_every_single_bit_and_every_exchange():
    weight = torch.randn(6, 5)
    seen = {checksum(weight)}
    cases = 1
    for index, bit in itertools.product(range(30), range(32)):
        changed_weight = weight.clone()
        changed_weight.view(-1).view(torch.int32)[index] ^= torch.tensor(1 << bit).to(torch.int32)
        seen.add(checksum(changed_weight))
        cases += 1
    for dimension, size in enumerate(weight.shape):
        for one, other in itertools.combinations(range(size), 2):
            order = list(range(size))
            order[one], order[other] = other, one
            seen.add(checksum(weight.index_select(dimension, torch.tensor(order))))
            cases += 1
    seen.add(checksum(-weight))
    seen.add(checksum(weight.view(5, 6)))
    assert len(seen) == cases + 2


def test_sums_of_values_would_not_see_an_exchange():
    weight = torch.randn(6, 5).bfloat16()
    exchanged = weight.flip(0)
    for power in (1, 2):
        assert (weight.double() ** power).sum() == (exchanged.double() ** power).sum()
    assert checksum(weight) != checksum(exchanged)


def test_checksum_does_not_depend_on_strides():
    weight = torch.randn(6, 10)
    assert (
        checksum(weight.T.contiguous().T)
        == checksum(torch.cat([weight, weight], 1)[:, :10])
        == checksum(weight)
    )


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.empty(0),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.arange(5),
        torch.randn(2, 3, 4, 5),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(3, dtype=torch.complex128),
    ],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
)
def test_any_parameter_or_buffer_has_a_checksum(tensor):
    found = fingerprint_weights({"w": tensor})["w"]
    assert found == {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype)[6:],
        "checksum": checksum(tensor.clone()),
    }
    if tensor.numel():
        assert checksum(torch.zeros_like(tensor)) != found["checksum"]


@pytest.mark.parametrize(
    "tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"]
)
def test_a_tensor_without_bytes_has_no_checksum(tensor):
    with pytest.raises(CheckpointError, match="^w: the tensor is .*leave checkpoint_dir out"):
        fingerprint_weights({"w": tensor})


def test_all_weights_are_read_with_one_copy(monkeypatch):
    reads = []
    monkeypatch.setattr(
        digests, "to_host", lambda *values: reads.append(len(values)) or [0.0] * len(values)
    )
    with FakeTensorMode():  # here any other read of a value raises
        fingerprint_weights({str(index): torch.randn(4, 4 + index) for index in range(5)})
    assert reads == [10]


# --- killed --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What this file saw as a program; whatever it found wrong fails the test that asks first."""
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_fcntl
def test_killed_before_any_line_a_beginning_is_left_and_the_run_ends_as_ever(seen):
    assert seen["lines"]["left"] == list(
        range(STAGES + 1)
    )  # no stage, one, …: there was a kill for each
    assert seen["lines"]["temporaries"] > 0


@needs_fcntl
def test_killed_at_random_times_a_beginning_is_left_and_the_run_ends_as_ever(seen):
    assert seen["times"]["kills"] == 20
    assert len(seen["times"]["left"]) > 1


@needs_fcntl
def test_a_killed_run_is_gone_although_a_process_that_it_forked_lives_on(seen):
    assert seen["worker"] == {"refused while it lived": True, "left": 1}


def run_to_the_end(directory):
    with Journal(directory, RUN) as journal:
        for number in range(STAGES):
            if NAMES[number][0] not in journal.restored:
                journal.write(solved(number))


def left_after_kill(directory, *, finish=False):
    """How many stages are left: a beginning, every bit of it. Then the others are written, if asked for."""
    with Journal(directory, RUN) as journal:
        stages = len({number for number in range(STAGES) if NAMES[number][0] in journal.restored})
        assert_holds(journal, stages)
        for number in range(stages, STAGES if finish else stages):
            journal.write(solved(number))
        return stages


def fork(work):
    """A process that does ``work`` and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def killed_at_every_line(directory, whole):
    """A process is killed before the n-th line of the code that locks and writes, for all n; then the run goes on."""
    left, temporaries = set(), 0

    def until(line):
        seen = itertools.count()

        def trace(frame, event, _):
            if frame.f_code.co_filename != files.__file__:
                return None
            if event == "line" and next(seen) == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        run_to_the_end(directory)

    line, status = -1, signal.SIGKILL
    while os.WIFSIGNALED(status):
        line += 1
        _, status = os.waitpid(fork(lambda line=line: until(line)), 0)
        if directory.exists():
            temporaries += (directory / files.TEMPORARY).exists()
        left.add(left_after_kill(directory, finish=True))
        assert [path.name for path in stage_files(directory)] == whole
        shutil.rmtree(directory)
    return {"left": sorted(left), "lines": line, "temporaries": temporaries}


def killed_at_random_times(directory, whole):
    """The same run is killed again and again, and goes on again and again, to its end; many times."""
    generator = random.Random(0)
    os.fsync = lambda _: time.sleep(0.002)  # as a disk
    started = time.perf_counter()
    run_to_the_end(directory)
    duration = time.perf_counter() - started
    shutil.rmtree(directory)
    reading, writing = os.pipe()

    def work():
        os.write(writing, b"x")
        run_to_the_end(directory)

    left, kills = [], 0
    while kills < 20:
        pid = fork(work)
        os.read(reading, 1)  # it has begun
        time.sleep(generator.uniform(0, 1.5 * duration))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        left.append(left_after_kill(directory))
        if left[-1] == STAGES:
            assert [path.name for path in stage_files(directory)] == whole
            shutil.rmtree(directory)
    return {"kills": kills, "left": sorted(set(left))}


def killed_before_its_worker(directory):
    """A process that has the lock is killed; one that it had forked lives on, and does not hold the lock."""
    reading, writing = os.pipe()

    def work():
        with Journal(directory, RUN) as journal:
            journal.write(solved(0))
            worker = fork(lambda: time.sleep(60))
            os.write(writing, f"{worker}\n".encode())
            time.sleep(60)

    pid = fork(work)
    worker = int(os.read(reading, 20))
    try:
        refused = False
        try:
            Journal(directory, RUN)
        except StateError:
            refused = True
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left = left_after_kill(directory)
        os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)
    return {"refused while it lived": refused, "left": left}


def main(directory):
    """Kill processes; what was seen. Nothing waits for the disk: a kill, other than a power cut, does not need it."""
    torch.set_num_threads(1)
    warnings.simplefilter("error", JournalWarning)  # after a kill, nothing is even damaged
    os.fsync = lambda _: None
    whole = [path.name for path in stage_files(filled(directory / "whole"))]
    return {
        "lines": killed_at_every_line(directory / "lines", whole),
        "worker": killed_before_its_worker(directory / "worker"),
        "times": killed_at_random_times(directory / "times", whole),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
