"""What happened to every layer: totals, JSON both ways, the table, and the size of a model."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from tsq_layers.config import QuantConfig
from tsq_layers.errors import CheckpointError, StateError
from tsq_layers.report import LayerReport, Report, format_bytes, library_versions, model_bytes, report

QUANTIZED = LayerReport(
    name="block.up",
    kind="Linear",
    rows=4,
    columns=100,
    status="quantized",
    method="two-stage",
    bits=2,
    group_size=50,
    symmetric=False,
    bits_per_weight=2.36,
    tokens=32768,
    damping=0.01,
    deviation="target",
    losses={"initialize": 0.123456, "assign": 0.0543, "refine": 1.23456e-5},
    held_out_losses={"assign": 0.06, "refine": 0.0451},
    objective={"assign": 12.5, "exact": 11.0},
    seconds={"assign": 0.25, "refine": 0.5},
    shared_with=("block.gate",),
)
WIDE = LayerReport(
    name="block.down",
    kind="Conv1D",
    rows=2,
    columns=300,
    status="quantized",
    bits=4,
    group_size=300,
    bits_per_weight=4.1,
)
SKIPPED = LayerReport(name="lm_head", kind="Linear", rows=10, columns=100, status="skipped", reason="by name")


def make_report(*layers: LayerReport) -> Report:
    return Report(
        layers=layers or (QUANTIZED, WIDE, SKIPPED),
        config=QuantConfig(bits=2, overrides={"down": {"bits": 4}}),
        size_before=8_000,
        size_after=2_000,
        paired=True,
        seconds=12.34,
        versions={"tsq_layers": "0.1", "torch": "2.13", "python": "3.11"},
    )


def test_totals_are_weighted_by_the_number_of_weights() -> None:
    result = make_report()
    assert result.quantized == [QUANTIZED, WIDE]
    assert result.bits_per_weight == pytest.approx((400 * 2.36 + 600 * 4.1) / 1000)
    assert result.share_quantized == 0.5


def test_totals_without_a_quantized_layer_are_none_and_zero() -> None:
    result = make_report(SKIPPED)
    assert (result.quantized, result.bits_per_weight, result.share_quantized) == ([], None, 0.0)
    assert "0 of 1 layers" in str(result)
    assert "nan" not in str(result)


def test_totals_without_any_layer_do_not_divide_by_zero() -> None:
    empty = dataclasses.replace(make_report(), layers=(), size_after=0)
    assert (empty.bits_per_weight, empty.share_quantized, empty.table()) == (None, 0.0, "")
    assert "0 of 0 layers" in str(empty)


def test_json_round_trip_is_exact() -> None:
    result = make_report()
    again = Report.from_json(result.to_json())
    assert again == result
    assert again.layers[0].losses["refine"] == 1.23456e-5
    assert again.layers[0].shared_with == ("block.gate",)


def test_json_round_trip_keeps_values_that_json_lacks() -> None:
    odd = dataclasses.replace(QUANTIZED, losses={"assign": math.nan, "refine": math.inf, "initialize": -math.inf})
    text = make_report(odd).to_json()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    losses = Report.from_json(text).layers[0].losses
    assert math.isnan(losses["assign"])
    assert (losses["refine"], losses["initialize"]) == (math.inf, -math.inf)


def test_json_keys_are_pinned() -> None:
    values = make_report().to_dict()
    assert list(values) == [
        "schema_version",
        "layers",
        "config",
        "size_before",
        "size_after",
        "paired",
        "seconds",
        "versions",
    ]
    assert values["schema_version"] == 1
    assert " ".join(values["layers"][0]) == (
        "name kind rows columns status reason method bits group_size symmetric bits_per_weight tokens damping deviation "
        "losses held_out_losses objective seconds shared_with"
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 2, r"schema_version=2, .* reads 1; upgrade"),
        (("schema_version",), None, r"schema_version=None, .* not a report"),
        (("surprise",), 1, r"the report has unknown key 'surprise'; allowed are layers, config"),
        (("paired",), 1, r"the report: paired=1 is not bool"),
        (("layers",), {}, r"the report: layers=\{\} is not"),
        (("config", "bits"), 9, r"the report: config: bits=9: give an integer from 1 to 8"),
        (("layers", 0), 3, r"a layer of the report is int, not a JSON object"),
        (("layers", 0, "surprise"), 1, r"a layer of the report, 'block.up' has unknown key 'surprise'"),
        (("layers", 0, "status"), "fine", r"'block.up': status='fine' is not .*'never called'"),
        (("layers", 0, "bits"), "2", r"'block.up': bits='2' is not int | None"),
        (("layers", 0, "rows"), True, r"'block.up': rows=True is not int"),
        (("layers", 0, "method"), "magic", r"'block.up': method='magic' is not"),
        (
            ("layers", 0, "losses", "assign"),
            "low",
            r"layer 'block.up' of the report: losses\['assign'\] is 'low', not a number",
        ),
        (("layers", 0, "shared_with"), "block.gate", r"'block.up': shared_with='block.gate' is not"),
    ],
)
def test_from_dict_refuses(path: tuple[str | int, ...], value: object, message: str) -> None:
    values = json.loads(make_report().to_json())
    place = values
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        Report.from_dict(values)


def test_from_dict_names_a_missing_key() -> None:
    values = make_report().to_dict()
    del values["layers"][0]["rows"]
    with pytest.raises(CheckpointError, match=r"'block.up' lacks key 'rows'"):
        Report.from_dict(values)


@pytest.mark.parametrize(("text", "message"), [("{", "not a JSON object"), ("[]", "not a JSON object but list")])
def test_from_json_refuses_what_is_no_object(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Report.from_json(text)


def test_layer_report_refuses_an_unknown_status() -> None:
    with pytest.raises(ValueError, match=r"layer 'a': status='done'; give one of 'quantized', 'skipped'"):
        LayerReport(name="a", kind="Linear", rows=1, columns=1, status="done")  # type: ignore[arg-type]


def test_layer_report_does_not_change_with_the_mapping_that_it_was_made_from() -> None:
    losses = {"assign": 1.0}
    layer = LayerReport(name="a", kind="Linear", rows=1, columns=1, status="quantized", losses=losses)
    losses["assign"] = 2.0
    assert layer.losses == {"assign": 1.0}


def test_table_is_aligned_and_complete() -> None:
    assert make_report().table().splitlines() == [
        "layer       kind     shape  status     method     bits  group  bits/weight  tokens  damping  initialize  assign    refine  held out  seconds  reason",
        "block.up    Linear   4×100  quantized  two-stage     2     50        2.360  32,768     0.01       0.123  0.0543  1.23e-05    0.0451     0.75",
        "block.down  Conv1D   2×300  quantized  –             4    300        4.100       –        –           –       –         –         –        –",
        "lm_head     Linear  10×100  skipped    –             –      –            –       –        –           –       –         –         –        –  by name",
    ]


def test_table_leaves_out_empty_columns_and_shows_no_nan() -> None:
    layer = dataclasses.replace(WIDE, name="", losses={"assign": math.nan})
    assert make_report(layer).table().splitlines() == [
        "layer    kind    shape  status     bits  group  bits/weight",
        "(model)  Conv1D  2×300  quantized     4    300        4.100",
    ]


def test_str_is_summary_and_table() -> None:
    lines = str(make_report()).splitlines()
    assert lines[0] == "2 of 3 layers quantised, 50.0% of their weights; 3.404 bits per weight"
    assert lines[1] == "model: 8.00 kB → 2.00 kB (4.00× smaller)"
    assert lines[2] == "12.3 s, paired passes; tsq_layers 0.1, torch 2.13, python 3.11"
    assert lines[3] == ""
    assert "\n".join(lines[4:]) == make_report().table()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1_234, "1.23 kB"), (61_200_000, "61.20 MB"), (14_000_000_000, "14.00 GB")],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_report_returns_what_the_model_carries() -> None:
    model = nn.Linear(2, 2)
    model.tsq_report = make_report()  # type: ignore[assignment]
    assert report(model) is model.tsq_report


def test_report_of_a_model_that_was_not_converted_says_what_to_do() -> None:
    with pytest.raises(StateError, match=r"Linear has no report: it was not converted. Call tsq.quantize"):
        report(nn.Linear(2, 2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_model_bytes_counts_parameters_and_buffers_once(device: str) -> None:
    first, second = nn.Linear(16, 8, device=device), nn.Linear(16, 8, bias=False, device=device)
    model = nn.Sequential(first, second, nn.BatchNorm1d(8, device=device))
    apart = model_bytes(model)
    assert apart == (128 + 8 + 128 + 4 * 8) * 4 + 8
    second.weight = first.weight
    assert model_bytes(model) == apart - 128 * 4


def test_model_bytes_counts_views_of_the_same_memory_once_and_parts_each() -> None:
    whole = torch.zeros(4, 6)
    model = nn.Module()
    model.register_buffer("upper", whole[:2])
    model.register_buffer("lower", whole[2:], persistent=False)
    model.register_buffer("transposed", whole[:2].T)
    assert model_bytes(model) == 4 * 6 * 4


def test_library_versions_name_what_ran() -> None:
    versions = library_versions()
    assert set(versions) == {"tsq_layers", "torch", "python"}
    assert versions["torch"] == torch.__version__
