"""The page: complete, escaped, without anything from outside, and its pictures where the numbers say."""

import base64
import dataclasses
import hashlib
import importlib.resources
import math
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tsq_layers.config import QuantConfig
from tsq_layers.errors import MissingExtraError
from tsq_layers.reports import LayerReport, ParameterReport, Report
from tsq_layers.reports.html.charts import bar_charts, loss_chart
from tsq_layers.reports.html.frame import LEFT, RIGHT, Frame
from tsq_layers.reports.html.headlines import coverage_parts, sizes, tiles
from tsq_layers.reports.html.heat import LEVELS, heat_map
from tsq_layers.reports.html.listing import listing
from tsq_layers.reports.html.page import kept_parameters

EVIL = (
    """</script></style><script>alert(1)</script><img src=x onerror="alert(2)">'{{ 7 * 7 }}&amp;"""
)
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def layer(name: str, loss: float = 0.01, **more: object) -> LayerReport:
    values = {
        "kind": "Linear",
        "rows": 64,
        "columns": 32,
        "status": "quantized",
        "method": "two-stage",
        "bits": 4,
        "group_size": 16,
        "bits_per_weight": 4.5,
        "tokens": 4096,
        "losses": {"initialize": 3 * loss, "assign": 1.5 * loss, "refine": loss},
        "seconds": {"factorise": 0.5, "initialize": 0.25, "assign": 1.0, "refine": 0.25},
    }
    return LayerReport(name=name, **{**values, **more})  # type: ignore[arg-type]


def kept(name: str, **more: object) -> LayerReport:
    return LayerReport(name=name, kind="Linear", rows=64, columns=32, **more)  # type: ignore[arg-type]


def parameter(name: str, quantized: int = 0, **more: object) -> ParameterReport:
    values = {
        "shape": (64, 32),
        "dtype": "float32",
        "quantized": quantized,
        "reason": "" if quantized else "vector",
    }
    return ParameterReport(name=name, **{**values, **more})  # type: ignore[arg-type]


def model(blocks: int = 3) -> list[LayerReport]:
    return [
        layer(f"layers.{b}.{name}", 10.0 ** -(1 + i) * (1 + b))
        for b in range(blocks)
        for i, name in enumerate(NAMES)
    ]


def make_report(*layers: LayerReport, **more: object) -> Report:
    values = {
        "layers": layers
        or (*model(), kept("aux", status="never called", reason="no batch reached it")),
        "config": QuantConfig(bits=3, overrides={"*.down_proj": {"bits": 4}}),
        "size_before": 400_000,
        "size_after": 100_000,
        "paired": True,
        "seconds": 75.0,
        "versions": {"tsq_layers": "0.1", "torch": "2.13"},
        "parameters": (parameter("w", 2048), parameter("b", shape=(512,))),
    }
    return Report(**{**values, **more})  # type: ignore[arg-type]


def of(report: Report) -> tuple[Any, ...]:
    """What the upper part of the page shows."""
    return report.totals, report.layers, report.parameters


def page_of(report: Report, path: Path, **more: str) -> str:
    report.to_html(path / "report.html", **more)
    return (path / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Elements with their attributes, the text outside of scripts and styles, and what is open at the end."""

    EMPTY = ("meta", "input", "path", "rect", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.content: dict[str, str] = {}
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside in ("script", "style"):
            self.content[inside] = self.content.get(inside, "") + data
        else:
            self.text += data


def foreign(text: str) -> list[str]:
    """What a page fetches, or runs that is not its own."""
    found = [
        f"{tag} {name}"
        for tag, given in Reader(text).elements
        for name in given
        if name.startswith("on")
    ]
    found += re.findall(r"url\(|@import|https?://|fetch\(|XMLHttpRequest|importScripts", text)
    for tag, given in Reader(text).elements:
        found += [f"{tag} {name}" for name in ("src", "srcset", "data", "action") if name in given]
        found += [f"{tag} href" for _ in (1,) if not (given.get("href") or "#").startswith("#")]
    return found


def test_page_is_well_formed(tmp_path: Path) -> None:
    for report in (
        make_report(),
        make_report(*(layer(f"a.{i}.b", EVIL and 0.1) for i in range(130))),
    ):
        found = Reader(page_of(report, tmp_path))
        assert (found.wrong, found.open) == ([], [])
        assert [tag for tag, _ in found.elements].count("svg") >= 3
    assert Reader("<p><b></p>").wrong


def test_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    assert foreign(page_of(make_report(), tmp_path)) == []


@pytest.mark.parametrize(
    "text",
    [
        '<img src="a.png">',
        '<link href="https://example.org/a.css">',
        '<a href="other.html">',
        "<style>@import 'a.css'</style>",
        "<b onclick='f()'>",
        "<i style='background: url(a.png)'>",
    ],
)
def test_what_comes_from_outside_is_found(text: str) -> None:
    assert foreign(text)


@pytest.mark.parametrize(
    "report",
    [
        make_report(
            layer(EVIL),
            layer("b." + EVIL, status="fallback", reason=EVIL),
            layer("a.x"),
            layer("b.x"),
        ),
        make_report(layer("a", kind=EVIL), kept("c", status="skipped", reason=EVIL)),
        make_report(*(layer(f"{EVIL}.{i}.{name}") for i in range(8) for name in (EVIL, "up"))),
        make_report(parameters=(parameter(EVIL, reason=EVIL, layers=(EVIL,)),)),
        make_report(
            versions={EVIL: EVIL}, config=QuantConfig(skip=(EVIL,), overrides={EVIL: {"bits": 2}})
        ),
        make_report(layer("a", losses={EVIL: 0.1, "refine": 0.2}, seconds={EVIL: 1.0})),
    ],
    ids=["layer", "kind", "blocks", "parameter", "configuration", "step"],
)
def test_hostile_names_are_only_text(report: Report, tmp_path: Path) -> None:
    plain = {
        (tag, name)
        for tag, given in Reader(page_of(make_report(), tmp_path)).elements
        for name in given
    }
    text = page_of(report, tmp_path, title=EVIL)
    found = Reader(text)
    assert (found.wrong, found.open) == ([], [])
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert {(tag, name) for tag, given in found.elements for name in given} <= plain | {
        ("rect", "data-layers")
    }
    assert "alert(1)" in found.text
    assert "{{ 7 * 7 }}" in found.text
    unescaped = text.replace("&lt;", "<").replace("&gt;", ">").replace("&#34;", '"')
    assert [tag for tag, _ in Reader(unescaped).elements].count("script") > 1


def test_policy_allows_the_script_of_the_page_and_no_other(tmp_path: Path) -> None:
    found = Reader(page_of(make_report(layer(EVIL)), tmp_path))
    policy = next(
        given["content"] for tag, given in found.elements if tag == "meta" and "http-equiv" in given
    )
    script = found.content["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert base64.b64encode(hashlib.sha256(f"{script} ".encode()).digest()).decode() not in str(
        policy
    )


def test_page_has_the_headline_numbers(tmp_path: Path) -> None:
    report = make_report()
    text = " ".join(Reader(page_of(report, tmp_path, title="My model")).text.split())
    for part in (
        "My model",
        "two-stage · 3 bits · groups of 128 · with zero points · 1 override",
        "Smaller 4.00×",
        "400.00 kB → 100.00 kB",
        "Bits per weight 4.50",
        "Quantised 80.0%",
        "of all parameters, 12 of 13 layers",
        "median of 12 layers; worst 0.3",
        "Time 75 s",
        "paired passes; 24 s in the solver",
        "never called 1 layer: no batch reached it",
        "80.0% quantised",
        "20.0% vector b",
        "torch 2.13",
    ):
        assert part.replace(" ", "") in text.replace(" ", ""), part


def test_page_shows_every_layer_and_every_loss(tmp_path: Path) -> None:
    report = make_report()
    text = Reader(page_of(report, tmp_path)).text
    for entry in report.layers:
        assert entry.name in text
        for value in entry.losses.values():
            assert f"{value:.3g}" in text
    rows = [
        given
        for tag, given in Reader(page_of(report, tmp_path)).elements
        if tag == "tr" and "id" in given
    ]
    assert [row["id"] for row in rows] == [f"layer-{i}" for i in range(13)]
    assert [row["data-status"] for row in rows] == ["quantized"] * 12 + ["never called"]


def test_columns_of_the_pictures_name_their_rows(tmp_path: Path) -> None:
    report = make_report(
        kept("a", status="skipped", reason="x"), layer("b"), kept("c", status="skipped"), layer("d")
    )
    (main,) = [given for tag, given in Reader(page_of(report, tmp_path)).elements if tag == "main"]
    assert main["data-columns"] == "1 3"


@pytest.mark.parametrize(
    "report",
    [
        make_report(kept("a", status="skipped", reason="x")),
        dataclasses.replace(make_report(), layers=(), parameters=(), size_after=0, versions={}),
        make_report(layer("", losses={}, seconds={}, bits=None, bits_per_weight=None, tokens=None)),
        make_report(
            layer("a", losses={"refine": 0.0}),
            layer("b", losses={"refine": math.nan, "assign": math.inf}),
        ),
        make_report(
            layer("a", losses={}, held_out_losses={"refine": 0.1}), seconds=math.nan, parameters=()
        ),
        make_report(parameters=(parameter("a", shape=(0,)), parameter("s", shape=()))),
    ],
    ids=[
        "nothing quantised",
        "nothing at all",
        "a model that is a layer",
        "no finite loss",
        "held out only",
        "empty",
    ],
)
def test_page_of_a_report_that_lacks_something(report: Report, tmp_path: Path) -> None:
    found = Reader(page_of(report, tmp_path))
    assert (found.wrong, found.open) == ([], [])
    assert re.search(r"\b(nan|inf|None|Undefined)\b", found.text) is None


def test_page_of_two_hundred_layers_is_small(tmp_path: Path) -> None:
    report = make_report(*(layer(f"model.layers.{i // 7}.mlp.part_{i % 7}") for i in range(210)))
    assert len(page_of(report, tmp_path)) < 400_000


def test_missing_jinja2_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        MissingExtraError, match=r'this needs jinja2: pip install "tsq_layers\[report\]"'
    ):
        make_report().to_html(tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_templates_are_part_of_the_package() -> None:
    found = {
        item.name
        for item in importlib.resources.files("tsq_layers.reports.html")
        .joinpath("templates")
        .iterdir()
    }
    assert found == {"page.html", "charts.html", "page.css", "page.js"}


def test_settings_are_words(tmp_path: Path) -> None:
    config = QuantConfig(
        group_size=None, symmetric=True, skip=(), overrides={"a": {"group_size": None}}
    )
    text = "".join(Reader(page_of(make_report(config=config), tmp_path)).text.split())
    assert "group_sizenone" in text
    assert "symmetricyes" in text
    assert "agroup_sizenone" in text
    assert "skip–" in text
    assert "None" not in text


def test_size_bars_add_up() -> None:
    report = make_report(size_before=10_240, size_after=4096)
    (_, before, first), (_, after, second) = sizes(*of(report))
    assert (before, after) == (10_240, 4096)
    assert [part.note for part in first] == ["8.19 kB", "2.05 kB"]
    assert [part.share for part in first] == pytest.approx([0.8, 0.2])
    assert [part.share for part in second] == pytest.approx([0.2, 0.2])


def test_size_bars_of_a_report_without_parameters_count_bits() -> None:
    (_, _, first), (_, _, second) = sizes(*of(make_report(parameters=(), size_after=100_000)))
    packed = 12 * 64 * 32 * 4.5 / 8
    assert [part.share for part in first] == [1.0]
    assert [part.share for part in second] == pytest.approx(
        [packed / 400_000, (100_000 - packed) / 400_000]
    )


def test_coverage_bar_adds_up_and_groups_what_is_small() -> None:
    many = [parameter(f"p{i}", shape=(20 - i,), reason="abcdefghijkl"[i]) for i in range(12)]
    parts = coverage_parts(*of(make_report(parameters=(parameter("w", 2048), *many))))
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert [part.label for part in parts] == ["quantised", *"abcdefg", "5 other reasons"]
    assert len({part.style for part in parts}) == len(parts)


def test_kept_parameters_that_differ_in_numbers_are_one_row() -> None:
    norms = [parameter(f"layers.{i}.norm.weight", shape=(8,), reason="vector") for i in range(3)]
    rows = kept_parameters(
        [*norms, parameter("layers.3.norm.weight", shape=(9,)), parameter("all", 2048)]
    )
    assert [(row.name, row.count, row.shape, row.size) for row in rows] == [
        ("layers.*.norm.weight", 3, "8", 96),
        ("layers.3.norm.weight", 1, "9", 36),
    ]


def test_tiles_without_a_loss_say_so() -> None:
    shown = {tile.label: tile for tile in tiles(*of(make_report(layer("a", losses={}))))}
    assert (shown["Output error"].value, shown["Output error"].note) == ("–", "not measured")


def test_listing_leaves_out_what_is_the_same_for_all() -> None:
    table = listing([layer("a"), layer("b", 0.1), kept("c", status="skipped", reason="x")])
    titles = [column.title for column in table.columns]
    assert dict(table.common) == {"method": "two-stage", "group": "16", "tokens": "4,096"}
    assert not {"method", "group", "tokens", "damping", "held out"} & set(titles)
    assert titles[:2] == ["layer", "kind"]
    other = listing([layer("a"), layer("b", tokens=5)])
    assert "tokens" in [column.title for column in other.columns]
    assert "tokens" not in dict(other.common)


def test_listing_sorts_by_numbers_and_leaves_out_what_is_missing() -> None:
    table = listing([layer("a", 0.001), layer("b", 0.1), kept("c", status="skipped", reason="x")])
    refine = [column.title for column in table.columns].index("refine")
    fields = [row[refine] for row in table.rows]
    assert [(field.text, field.order) for field in fields] == [
        ("0.001", 0.001),
        ("0.1", 0.1),
        ("–", None),
    ]
    assert [field.bar for field in fields] == [pytest.approx(0.06), pytest.approx(1.0), None]
    assert table.numeric[refine]
    assert not table.numeric[0]


def numbers(path: str) -> list[tuple[float, float]]:
    """Where the marks of a path start."""
    return [(float(x), float(y)) for x, y in re.findall(r"M(-?[\d.]+) (-?[\d.]+)", path)]


def test_dots_stand_where_the_losses_say() -> None:
    layers = model(blocks=5)
    chart = loss_chart(layers)
    assert chart is not None
    # Heights of the marks of the axis give the scale: log10 of the loss is linear in y.
    (high, first), (low, second) = sorted((y, text) for y, text in chart.y_ticks)[:2]
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    top, next_ = (int(text.removeprefix("10").translate(digits)) for text in (first, second))
    drawn = {part.label: numbers(part.path) for part in chart.series}
    for step in ("initialize", "assign", "refine"):
        for i, ((x, y), entry) in enumerate(zip(drawn[step], layers, strict=True)):
            assert x == pytest.approx(LEFT + (i + 0.5) * (RIGHT - LEFT) / 20, abs=0.01)
            expected = high + (math.log10(entry.losses[step]) - top) / (next_ - top) * (low - high)
            assert y == pytest.approx(expected, abs=0.01)
            assert chart.top <= y <= chart.bottom
            assert (
                abs(y - expected - math.log10(2) * (low - high)) > 1
            )  # twice the loss would be told apart


def test_losses_that_have_no_place_are_left_out() -> None:
    layers = [layer("a", losses={"refine": v}) for v in (0.1, 0.0, math.nan, math.inf, -1.0, 0.01)]
    chart = loss_chart(layers)
    assert chart is not None
    (dots,) = [numbers(part.path) for part in chart.series if part.label == "refine"]
    assert [round((x - LEFT) / chart.step - 0.5) for x, _ in dots] == [0, 5]


@pytest.mark.parametrize("count", [8, 300], ids=["bars", "outline"])
def test_bars_are_stacked(count: int) -> None:
    layers = [
        layer(f"a.{i}", bits=2 + i % 2, bits_per_weight=3.5, seconds={"assign": 1.0 + i})
        for i in range(count)
    ]
    bits, seconds = bar_charts(layers)
    codes, overhead = (part.path for part in bits.series)
    assert [part.label for part in bits.series] == ["codes", "scales and zero points"]
    tops = [float(y) for y in re.findall(r"V([\d.]+)", codes)][:: 1 if count > 120 else 2]
    zero, one = (y for y, text in bits.y_ticks if text in ("0", "1"))
    assert [(zero - y) / (zero - one) for y in tops[:8]] == pytest.approx([2, 3] * 4, abs=0.01)
    feet = (
        numbers(overhead)[:2]
        if count <= 120
        else [(0.0, float(y)) for y in re.findall(r"V([\d.]+)H", overhead)[-2:]]
    )
    assert sorted((zero - y) / (zero - one) for _, y in feet) == pytest.approx([2, 3], abs=0.01)
    highest = min(float(y) for y in re.findall(r"V([\d.]+)", seconds.series[0].path))
    assert highest == pytest.approx(
        seconds.bottom - (seconds.bottom - seconds.top) / 1.05, abs=0.01
    )


def test_marks_start_inside_their_column() -> None:
    for count in (1, 8, 120, 2000):
        frame, values = Frame(count=count, plot=100), [0.1 * (i % 9) for i in range(count)]
        paths = [frame.dots(lambda v: v, values), frame.rings(lambda v: v, values)]
        paths += [frame.stems(lambda v: v, [[v, v + 1] for v in values])]
        if count <= 120:
            paths.append(frame.bars(lambda v: v, [0.0] * count, [v + 1 for v in values]))
        for path in paths:
            columns = [math.floor((x - LEFT) / frame.step) for x, _ in numbers(path)]
            assert columns == list(range(count))


def test_heat_map_has_a_row_for_each_name_and_a_column_for_each_block() -> None:
    layers = [kept("embed.2.x", status="skipped"), *model(blocks=12)]
    heat = heat_map(layers)
    assert heat is not None
    assert heat.rows == NAMES
    assert heat.columns == tuple(map(str, range(12)))
    for cell in heat.cells:
        entry = layers[cell.layer]
        assert entry.name == f"layers.{heat.columns[cell.column]}.{heat.rows[cell.row]}"
        assert cell.loss == entry.losses["refine"]
    by_loss = sorted(heat.cells, key=lambda cell: cell.loss)
    assert all(first.level <= second.level for first, second in pairwise(by_loss))
    assert (by_loss[0].level, by_loss[-1].level) == (0, LEVELS - 1)


def test_heat_map_shows_the_worst_of_experts() -> None:
    layers = [
        layer(f"layers.{b}.experts.{e}.{n}", 0.01 * (1 + e))
        for b in range(4)
        for e in range(3)
        for n in "xy"
    ]
    heat = heat_map(layers)
    assert heat is not None
    assert heat.rows == ("experts.*.x", "experts.*.y")
    assert {(cell.layers, cell.loss) for cell in heat.cells} == {(3, 0.03)}
    assert all(
        ".2." in layers[cell.layer].name for cell in heat.cells if heat.columns[cell.column] != "2"
    )


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"],
        ["0", "2", "4", "6"],
        ["layers.0.x", "layers.1.x"],
        [f"m.{i}.{i}x" for i in range(60)],
        [],
    ],
    ids=["no numbers", "one row", "two blocks", "a row for each layer", "none"],
)
def test_heat_map_needs_blocks_of_several_layers(names: list[str]) -> None:
    assert heat_map([layer(name) for name in names]) is None
