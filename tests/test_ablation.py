"""The ablation: its rows are configurations, results survive, and the novel is read."""

import dataclasses
import sys
import zlib
from pathlib import Path

import pytest

import tsq_layers as tsq

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ablation import picture, records, tables, texts
from benchmarks.ablation.peers import PEERS
from benchmarks.ablation.records import Run
from benchmarks.ablation.rows import ROWS

RUN = Run(
    name="gptq",
    bits=2,
    group_size=64,
    tokens=8192,
    seed=0,
    perplexity={"speeches": 12.5, "novel": 1234.0},
    loss=0.01,
    held_out_loss=0.02,
    bits_per_weight=2.3,
    seconds=10.0,
)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_row_is_a_configuration(name: str, bits: int) -> None:
    assert tsq.QuantConfig(**{"bits": bits, "group_size": 64, **ROWS[name]}).bits == bits


def test_every_peer_has_a_script() -> None:
    folder = Path(records.__file__).with_name("peer_scripts")
    assert {path.stem for path in folder.glob("*.py")} == {*PEERS.values(), "hand_back"}
    assert not set(PEERS) & set(ROWS)


def test_results_survive_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    for run in (RUN, dataclasses.replace(RUN, bits=3), dataclasses.replace(RUN, loss=0.5)):
        records.keep(path, run)
    assert list(records.kept(path).values()) == [
        dataclasses.replace(RUN, loss=0.5),
        dataclasses.replace(RUN, bits=3),
    ]


def test_a_torn_line_is_left_out_and_the_next_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    records.keep(path, RUN)
    path.write_text(path.read_text(encoding="utf-8") + '{"name": "gp', encoding="utf-8")
    records.keep(path, dataclasses.replace(RUN, seed=1))
    assert len(records.kept(path)) == 2


def test_rounding_is_the_same_row_for_all_tokens() -> None:
    rows = [dataclasses.replace(RUN, name="rounding", tokens=tokens) for tokens in (8192, 32768)]
    assert rows[0].key == rows[1].key
    assert RUN.key != dataclasses.replace(RUN, tokens=32768).key


def test_the_table_has_a_line_for_every_row_and_the_worst_first() -> None:
    worse = dataclasses.replace(RUN, name="cdquant")
    better = dataclasses.replace(
        RUN, name="lnq", perplexity={"speeches": 11.0, "novel": 20.0}, loss=None
    )
    base = Run(
        **{**dataclasses.asdict(records.FLOAT), "perplexity": {"speeches": 10.0, "novel": 11.0}}
    )
    lines = [line for line in tables.lines([better, base, worse]) if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["float", "cdquant", "lnq"]
    assert "1234" in lines[3]
    assert "0.01000" in lines[3]


def test_the_ladder_has_a_line_for_each_step_and_a_column_for_each_width_and_group_size() -> None:
    steps = [
        dataclasses.replace(
            RUN,
            name=name,
            group_size=size,
            seed=seed,
            perplexity={"speeches": value, "novel": 1234.0},
        )
        for name, size, seed, value in (
            ("+ stage 1", 32, 0, 50.04),
            ("+ stage 1", 32, 1, 60.0),
            ("+ stage 2", 128, 0, 150.6),
        )
    ]
    lines = [line for line in tables.lines([*steps, RUN, dataclasses.replace(RUN, bits=3)]) if line]
    title = "The ladder, group sizes along the top (speeches / novel):"
    assert [line for line in lines if not line.startswith("|")] == [title, "Along the axes:"]
    cells = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for cells in (x.split("|") for x in lines[1:13])
    }
    assert cells[""] == ["2 bits, 32", "2 bits, 128"]
    assert cells["+ stage 1"] == ["50.0 / 1234", "–"]
    assert cells["+ stage 2"] == ["–", "151 / 1234"]
    assert cells["best"] == ["–", "–"]


def test_headlines_stand_together_along_the_axes_and_by_themselves_have_no_table() -> None:
    lone = [dataclasses.replace(RUN, group_size=128, name=name) for name in ("best", "gptq")]
    lines = [
        line
        for line in tables.lines([*lone, dataclasses.replace(RUN, name="cdquant"), RUN])
        if line
    ]
    titles = [line for line in lines if not line.startswith("|")]
    assert titles == ["2 bits, groups of 64, 8192 calibration tokens, seed 0:", "Along the axes:"]
    cells = [
        [cell.strip() for cell in line.split("|")[1:6]]
        for line in lines[lines.index("Along the axes:") + 3 :]
    ]
    assert cells == [
        ["2", "64", "8192", "0", "gptq"],
        ["2", "128", "8192", "0", "gptq"],
        ["", "", "", "", "best"],
    ]


def test_pictures_are_drawn_of_the_results_of_the_repository(tmp_path: Path) -> None:
    known = list(records.kept(Path(records.__file__).with_name("results.jsonl")).values())
    for draw in (picture.draw, picture.draw_axes):
        draw(known, tmp_path / "picture.png", bits=2, group_size=64, tokens=8192)
        assert (tmp_path / "picture.png").stat().st_size > 10_000
        (tmp_path / "picture.png").unlink()


def test_the_results_of_the_repository_can_be_read() -> None:
    known = records.kept(Path(records.__file__).with_name("results.jsonl"))
    assert records.FLOAT.key in known
    assert {run.name for run in known.values()} <= {"float", *ROWS, *PEERS}


def test_the_novel_is_found_among_the_objects_of_an_r_database() -> None:
    def entry(*lines: str) -> bytes:
        text = b"".join(
            b"\0\4\0\t" + len(line.encode()).to_bytes(4, "big") + line.encode() for line in lines
        )
        body = b"X\nhead" + text + b"\0\0\0\xfe"
        return len(body).to_bytes(4, "big") + zlib.compress(body)

    database = entry("EMMA", "text") + entry("PRIDE AND PREJUDICE", "", "It is a truth", "ünï")
    found = [list(texts._strings(body)) for body in texts._entries(database)]
    assert found == [[], ["PRIDE AND PREJUDICE", "", "It is a truth", "ünï"]]
