"""The picture: what it draws, into which files, and that it leaves matplotlib as it was."""

import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from tsq_layers.config import QuantConfig
from tsq_layers.errors import ConfigError, MissingExtraError
from tsq_layers.reports import LayerReport, Report, series
from tsq_layers.reports.figure import picture


def layer(name: str, loss: float = 0.01, **more: object) -> LayerReport:
    values = {
        "kind": "Linear",
        "rows": 64,
        "columns": 32,
        "status": "quantized",
        "bits": 4,
        "bits_per_weight": 4.5,
        "losses": {"initialize": 3 * loss, "assign": 1.5 * loss, "refine": loss},
        "seconds": {"assign": 1.0, "refine": 0.25},
    }
    return LayerReport(name=name, **{**values, **more})  # type: ignore[arg-type]


def make_report(*layers: LayerReport) -> Report:
    return Report(
        layers=layers, config=QuantConfig(), size_before=4, size_after=1, paired=True, seconds=1.0
    )


def picture_of(report: Report) -> Any:
    """The picture of a report."""
    return picture(report.layers, report.bits_per_weight)


LAYERS = [
    layer(f"layers.{i}.{n}", 10.0 ** -(i + 1), bits=3 + i) for i in range(3) for n in ("up", "down")
]


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")]
)
def test_format_is_that_of_the_suffix(suffix: str, start: bytes, tmp_path: Path) -> None:
    make_report(*LAYERS).plot(tmp_path / f"report.{suffix}")
    assert (tmp_path / f"report.{suffix}").read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["report.html", "report", "report.jpg"])
def test_other_suffixes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"cannot draw into .*{name}: give a file name that ends in .png, .svg, .pdf",
    ):
        make_report(*LAYERS).plot(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(
        MissingExtraError, match=r'this needs matplotlib: pip install "tsq_layers\[report\]"'
    ):
        make_report(*LAYERS).plot(tmp_path / "report.png")


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        return dict(mpl.rcParams), plt.get_fignums(), mpl.rcParams._get("backend")

    before = state()
    for suffix in ("png", "svg", "pdf"):
        make_report(*LAYERS).plot(tmp_path / f"report.{suffix}")
    assert state() == before
    with mpl.rc_context({"lines.linewidth": 7.25}):
        assert state() != before


def test_points_are_the_losses() -> None:
    held_out = [layer("a", 0.5, held_out_losses={"assign": 0.9, "refine": 0.7}), layer("b", 0.25)]
    panel = picture_of(make_report(*held_out)).axes[0]
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in panel.lines}
    assert drawn == {
        "initialize": [(0, 1.5), (1, 0.75)],
        "assign": [(0, 0.75), (1, 0.375)],
        "refine": [(0, 0.5), (1, 0.25)],
        "held out, last step": [(0, 0.7)],
    }
    assert panel.get_yscale() == "log"


def test_losses_that_have_no_place_are_left_out() -> None:
    losses = [0.1, 0.0, math.nan, math.inf, -1.0, 0.01]
    panel = picture_of(make_report(*(layer("a", losses={"refine": v}) for v in losses))).axes[0]
    assert list(zip(*panel.lines[0].get_data(), strict=True)) == [(0, 0.1), (5, 0.01)]


@pytest.mark.parametrize("count", [8, 300], ids=["bars", "outline"])
def test_bars_are_stacked(count: int) -> None:
    seconds = {"refine": 2.0, "factorise": 1.0, "polish": 4.0}
    layers = [layer(f"a.{i}", bits=2 + i % 2, seconds=seconds) for i in range(count)]
    _, bits, time = picture_of(make_report(*layers)).axes
    if count == 8:
        assert [bar.get_height() for bar in bits.containers[0]] == [2, 3] * 4
        assert [bar.get_y() for bar in bits.containers[1]] == [2, 3] * 4
        ends = [
            (bar.get_y(), bar.get_y() + bar.get_height())
            for bar in (part[0] for part in time.containers)
        ]
    else:
        data = [patch.get_data() for patch in bits.patches if hasattr(patch, "get_data")]
        assert list(data[0].values[:4]) == [2, 3, 2, 3]
        assert list(data[1].baseline[:4]) == [2, 3, 2, 3]
        steps = [patch.get_data() for patch in time.patches if hasattr(patch, "get_data")]
        ends = [(step.baseline[0], step.values[0]) for step in steps]
    assert ends == [(0, 1), (1, 3), (3, 7)]  # factorise, refine, then what is not known


def test_layers_that_were_not_quantized_are_not_drawn() -> None:
    skipped = LayerReport(name="b", kind="Linear", rows=1, columns=1, status="skipped")
    panel = picture_of(make_report(layer("a"), skipped, layer("c"))).axes[0]
    assert [
        label.get_text()
        for label in picture_of(make_report(layer("a"), skipped, layer("c")))
        .axes[-1]
        .get_xticklabels()
    ] == ["a", "c"]
    assert list(panel.lines[0].get_xdata()) == [0, 1]


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [LayerReport(name="b", kind="Linear", rows=1, columns=1, status="skipped")],
        [layer("", losses={}, seconds={}, bits=None, bits_per_weight=None)],
        [layer("a", losses={"refine": math.nan}, seconds={"assign": math.inf})],
        [layer("$\\frac{", 0.1), layer("<b>&", 0.1)],
    ],
    ids=[
        "no layers",
        "nothing quantised",
        "no numbers",
        "not finite",
        "names that are no formulas",
    ],
)
def test_picture_of_a_report_that_lacks_something(
    layers: list[LayerReport], tmp_path: Path
) -> None:
    make_report(*layers).plot(tmp_path / "report.svg")
    ET.parse(tmp_path / "report.svg")


def test_many_layers_get_the_median_of_each_block(tmp_path: Path) -> None:
    layers = [layer(f"layers.{i // 100}.x.{i % 100}", 1.0 + i // 100) for i in range(600)]
    figure = picture_of(make_report(*layers))
    (medians,) = [
        part for part in figure.axes[0].collections if part.get_label().startswith("median")
    ]
    assert [tuple(line[:, 1]) for line in medians.get_segments()] == [(v, v) for v in range(1, 7)]
    assert not any(
        part.get_label().startswith("median")
        for part in picture_of(make_report(*layers[:200])).axes[0].collections
    )


def test_figures_grow_with_the_model_up_to_a_page() -> None:
    widths = [
        picture_of(make_report(*(layer(f"a.{i}") for i in range(n)))).get_size_inches()[0]
        for n in (2, 100, 1000)
    ]
    assert widths == [7.0, 10.0, 18.0]


def test_few_layers_are_named() -> None:
    axis = series.layer_axis(
        ["model.layers.0.up", "model.layers.1.up", "a_very_long_name_" * 3, ""]
    )
    assert [text for _, text in axis.ticks] == [
        "0.up",
        "1.up",
        "…_name_a_very_long_name_",
        "(model)",
    ]
    assert axis.slanted


def test_many_layers_are_numbered_by_block() -> None:
    axis = series.layer_axis(
        ["embed", *(f"model.layers.{i // 4}.x{i % 4}" for i in range(240)), "head"]
    )
    assert axis.title == "model.layers.*"
    assert axis.blocks[:2] == ((1, 5), (5, 9))
    assert axis.blocks[-1] == (237, 241)
    assert axis.ticks[:2] == ((2.5, "0"), (18.5, "4"))
    assert len(axis.ticks) <= 18


def test_blocks_of_several_parts_keep_their_names() -> None:
    axis = series.layer_axis(
        [f"{part}.layers.{i}.{n}" for part in ("vision", "text") for i in range(5) for n in "ab"]
    )
    shown = [
        "vision.layers.0",
        "vision.layers.2",
        "vision.layers.4",
        "text.layers.1",
        "text.layers.3",
    ]
    assert [text for _, text in axis.ticks] == shown
    assert axis.title == "block"


def test_layers_without_blocks_are_counted() -> None:
    for names in ([f"layer_{i}" for i in range(100)], [str(i) for i in range(100)]):
        axis = series.layer_axis(names)
        assert (axis.title, axis.blocks) == ("layer", ())
        assert [text for _, text in axis.ticks] == [
            "0",
            "10",
            "20",
            "30",
            "40",
            "50",
            "60",
            "70",
            "80",
            "90",
        ]


@pytest.mark.parametrize("low", [1e-30, 1e-6, 0.003, 0.5, 900.0])
@pytest.mark.parametrize("ratio", [1.12, 3.0, 90.0, 1e4, 1e25])
def test_log_ticks_lie_inside_and_are_neither_few_nor_many(low: float, ratio: float) -> None:
    values = [value for value, _ in series.log_ticks(low, low * ratio)]
    assert all(low * 0.999 <= value <= low * ratio * 1.001 for value in values)
    assert len(values) <= 9
    assert len(values) >= (2 if ratio >= 10 else 0)


@pytest.mark.parametrize("high", [1e-9, 0.3, 1.0, 4.17, 8.0, 99.0, 12345.0])
def test_linear_ticks_are_round_and_reach_the_top(high: float) -> None:
    values = series.linear_ticks(high)
    assert values[0] == 0
    assert high * 0.6 < values[-1] <= high * (1 + 1e-9)
    assert 3 <= len(values) <= 7
