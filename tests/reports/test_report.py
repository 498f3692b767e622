"""What happened to every layer and parameter: totals, JSON both ways, the table, and the size of a model."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from tsq_layers.config import QuantConfig
from tsq_layers.config.versions import library_versions
from tsq_layers.errors import CheckpointError, StateError
from tsq_layers.numerics.memory import model_bytes
from tsq_layers.reports import (
    STEPS,
    LayerReport,
    ParameterReport,
    Report,
    format_bytes,
    report_of,
    table,
)
from tsq_layers.reports.gaps import by_reason

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
SKIPPED = LayerReport(
    name="lm_head", kind="Linear", rows=10, columns=100, status="skipped", reason="by name"
)
FALLBACK = dataclasses.replace(
    QUANTIZED, name="experts.3", status="fallback", reason="it saw 5 tokens"
)

# 1000 entries, 800 of them quantised.
PARAMETERS = (
    ParameterReport(
        name="up", shape=(4, 100), dtype="float16", quantized=400, layers=("block.up",)
    ),
    ParameterReport(
        name="experts",
        shape=(2, 3, 80),
        dtype="float16",
        quantized=400,
        reason="1 of 6 experts unused",
    ),
    ParameterReport(name="norm", shape=(20,), dtype="float64", quantized=0, reason="vector"),
    ParameterReport(name="bias", shape=(100,), dtype="float64", quantized=0, reason="vector"),
)


def make_report(*layers: LayerReport, parameters: tuple[ParameterReport, ...] = ()) -> Report:
    return Report(
        layers=layers or (QUANTIZED, WIDE, SKIPPED),
        config=QuantConfig(bits=2, overrides={"down": {"bits": 4}}),
        size_before=8_000,
        size_after=2_000,
        paired=True,
        seconds=12.34,
        versions={"tsq_layers": "0.1", "torch": "2.13", "python": "3.11"},
        parameters=parameters,
    )


def test_totals_are_weighted_by_the_number_of_weights() -> None:
    result = make_report()
    assert result.quantized == [QUANTIZED, WIDE]
    assert result.bits_per_weight == pytest.approx((400 * 2.36 + 600 * 4.1) / 1000)
    assert result.share_quantized == 0.5


def test_fallback_counts_as_quantized() -> None:
    result = make_report(FALLBACK, SKIPPED)
    assert result.quantized == [FALLBACK]
    assert FALLBACK.is_quantized
    assert not SKIPPED.is_quantized
    assert result.share_quantized == 400 / 1400
    assert result.bits_per_weight == 2.36
    assert str(result).startswith(
        "1 of 2 layers quantised (1 with less than asked), 28.6% of their weights; 2.360 bits"
    )


def test_fallback_without_a_reason_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"layer 'experts.3': status='fallback' without a reason; say what"
    ):
        dataclasses.replace(FALLBACK, reason="")
    values = make_report(FALLBACK).to_dict()
    values["layers"][0]["reason"] = ""
    with pytest.raises(
        CheckpointError, match=r"'experts.3': status='fallback' without a reason.*changed by hand"
    ):
        Report.from_dict(values)


def test_coverage_counts_entries_and_bytes() -> None:
    result = make_report(parameters=PARAMETERS)
    entries = sum(math.prod(item.shape) for item in PARAMETERS)
    size = sum(math.prod(item.shape) * getattr(torch, item.dtype).itemsize for item in PARAMETERS)
    assert (entries, size) == (1000, 2720)
    assert result.coverage == 800 / 1000
    assert result.byte_coverage == 800 * 2 / 2720


def test_coverage_without_parameters_is_that_of_the_layers() -> None:
    result = make_report()
    assert result.coverage == result.byte_coverage == result.share_quantized == 0.5
    assert "coverage" not in str(result)
    assert result.gaps() == ()


def test_coverage_of_nothing_is_zero() -> None:
    empty = ParameterReport(name="a", shape=(0, 3), dtype="float32", quantized=0)
    result = make_report(parameters=(empty,))
    assert (result.coverage, result.byte_coverage, empty.status, empty.bytes) == (
        0.0,
        0.0,
        "kept",
        0,
    )


def test_parameter_knows_its_size_and_status() -> None:
    up, experts, norm, _ = PARAMETERS
    assert (up.numel, up.bytes, up.kept, up.status) == (400, 800, 0, "quantized")
    assert (experts.numel, experts.bytes, experts.kept, experts.status) == (
        480,
        960,
        80,
        "partly quantized",
    )
    assert (norm.numel, norm.bytes, norm.kept, norm.status) == (20, 160, 20, "kept")
    scalar = ParameterReport(name="scale", shape=(), dtype="bfloat16", quantized=0, reason="scalar")
    assert (scalar.numel, scalar.bytes) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dtype": "float33"},
            r"parameter 'norm': dtype='float33'; give the name of a torch dtype",
        ),
        ({"dtype": "nn"}, r"dtype='nn'; give the name of a torch dtype"),
        ({"quantized": 21}, r"parameter 'norm': quantized=21; give 0 to 20"),
        ({"quantized": -1}, r"quantized=-1; give 0 to 20"),
        ({"reason": ""}, r"parameter 'norm': 20 entries were kept without a reason; give one"),
    ],
    ids=["unknown dtype", "no dtype", "too many", "negative", "no reason"],
)
def test_parameter_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PARAMETERS[2], **changes)


def test_gaps_are_the_largest_first() -> None:
    result = make_report(parameters=PARAMETERS)
    assert [item.name for item in result.gaps(2)] == ["bias", "experts"]
    assert [item.name for item in result.gaps()] == ["bias", "experts", "norm"]


def test_reasons_that_differ_in_numbers_are_one() -> None:
    more = [
        ParameterReport(
            name=f"layers.{i}.w",
            shape=(10,),
            dtype="float32",
            quantized=10 - i,
            reason=f"{i} of 8 unused",
        )
        for i in (1, 2)
    ]
    other = ParameterReport(
        name="b", shape=(10,), dtype="float32", quantized=9, reason="# of # unused"
    )
    gaps = by_reason(make_report().layers, (*more, other))
    assert [(gap.reason, gap.names, gap.entries) for gap in gaps] == [
        ("… of 8 unused", ("layers.2.w", "layers.1.w"), 3),
        ("# of # unused", ("b",), 1),
    ]
    assert sum(gap.share for gap in gaps) + make_report(
        parameters=(*more, other)
    ).coverage == pytest.approx(1)


def test_gaps_of_a_report_without_parameters_are_its_layers() -> None:
    (gap,) = by_reason(make_report().layers, ())
    assert (gap.reason, gap.kind, gap.names, gap.entries, gap.share) == (
        "by name",
        "layers",
        ("lm_head",),
        1000,
        0.5,
    )


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
    odd = dataclasses.replace(
        QUANTIZED, losses={"assign": math.nan, "refine": math.inf, "initialize": -math.inf}
    )
    text = make_report(odd).to_json()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    losses = Report.from_json(text).layers[0].losses
    assert math.isnan(losses["assign"])
    assert (losses["refine"], losses["initialize"]) == (math.inf, -math.inf)


def test_json_round_trip_keeps_parameters() -> None:
    result = make_report(parameters=PARAMETERS)
    again = Report.from_json(result.to_json())
    assert again == result
    assert again.parameters[1].shape == (2, 3, 80)
    assert again.parameters[0].layers == ("block.up",)
    assert again != dataclasses.replace(result, parameters=PARAMETERS[:-1])


def test_json_without_parameters_still_loads() -> None:
    values = make_report().to_dict()
    del values["parameters"]
    assert Report.from_dict(values) == make_report()


def test_json_keys_are_pinned() -> None:
    values = make_report(parameters=PARAMETERS).to_dict()
    assert list(values) == [
        "schema_version",
        "layers",
        "config",
        "size_before",
        "size_after",
        "paired",
        "seconds",
        "versions",
        "parameters",
        "distances",
    ]
    assert values["schema_version"] == 1
    assert " ".join(values["parameters"][0]) == "name shape dtype quantized reason layers"
    assert " ".join(values["layers"][0]) == (
        "name kind rows columns status reason method bits group_size symmetric bits_per_weight "
        "tokens damping deviation "
        "deviation_strength deviation_damping losses held_out_losses objective seconds shared_with"
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
        (
            ("layers", 0, "surprise"),
            1,
            r"a layer of the report, 'block.up' has unknown key 'surprise'",
        ),
        (("layers", 0, "status"), "fine", r"'block.up': status='fine' is not .*'never called'"),
        (("layers", 0, "bits"), "2", r"'block.up': bits='2' is not int | None"),
        (("layers", 0, "rows"), True, r"'block.up': rows=True is not int"),
        (("layers", 0, "method"), "magic", r"'block.up': method='magic' is not"),
        (
            ("layers", 0, "losses", "assign"),
            "low",
            r"layer 'block.up' of the report: losses\['assign'\] is 'low', not a number",
        ),
        (
            ("layers", 0, "shared_with"),
            "block.gate",
            r"'block.up': shared_with='block.gate' is not",
        ),
        (("parameters",), {}, r"the report: parameters=\{\} is not"),
        (("parameters", 0), 3, r"a parameter of the report is int, not a JSON object"),
        (
            ("parameters", 0, "surprise"),
            1,
            r"a parameter of the report, 'up' has unknown key 'surprise'",
        ),
        (
            ("parameters", 0, "shape"),
            [4, "100"],
            r"'up': shape=\[4, '100'\] is not a list of sizes",
        ),
        (("parameters", 0, "shape"), [4, True], r"'up': shape=\[4, True\] is not a list of sizes"),
        (
            ("parameters", 0, "shape"),
            [-4, -100],
            r"'up': shape=\[-4, -100\] is not a list of sizes",
        ),
        (("parameters", 0, "layers"), [1], r"'up': layers=\[1\] is not a list of names"),
        (
            ("parameters", 0, "quantized"),
            401,
            r"'up': quantized=401; give 0 to 400; the report was changed by hand",
        ),
        (
            ("parameters", 0, "dtype"),
            "double_trouble",
            r"'up': dtype='double_trouble'; give the name of a torch dtype",
        ),
        (("parameters", 3, "reason"), "", r"'bias': 100 entries were kept without a reason"),
    ],
)
def test_from_dict_refuses(path: tuple[str | int, ...], value: object, message: str) -> None:
    values = json.loads(make_report(parameters=PARAMETERS).to_json())
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


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not a JSON object"), ("[]", "not a JSON object but list")]
)
def test_from_json_refuses_what_is_no_object(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Report.from_json(text)


def test_layer_report_refuses_an_unknown_status() -> None:
    with pytest.raises(
        ValueError,
        match=r"layer 'a': status='done'; give one of 'quantized', 'fallback', 'skipped'",
    ):
        LayerReport(name="a", kind="Linear", rows=1, columns=1, status="done")  # type: ignore[arg-type]


def test_layer_report_does_not_change_with_the_mapping_that_it_was_made_from() -> None:
    losses = {"assign": 1.0}
    layer = LayerReport(
        name="a", kind="Linear", rows=1, columns=1, status="quantized", losses=losses
    )
    losses["assign"] = 2.0
    assert layer.losses == {"assign": 1.0}


def test_table_is_aligned_and_complete() -> None:
    assert make_report().table().splitlines() == [
        (
            "layer       kind     shape  status     method     bits  group  bits/weight  tokens  "
            "damping  initialize  assign    refine  held out  seconds  reason"
        ),
        (
            "block.up    Linear   4×100  quantized  two-stage     2     50        2.360  32,768     "
            "0.01       0.123  0.0543  1.23e-05    0.0451     0.75"
        ),
        (
            "block.down  Conv1D   2×300  quantized  –             4    300        4.100       –        "
            "–           –       –         –         –        –"
        ),
        (
            "lm_head     Linear  10×100  skipped    –             –      –            –       –        "
            "–           –       –         –         –        –  by name"
        ),
    ]


def test_table_has_the_loss_after_every_step() -> None:
    losses = {step: (9 - order) / 128 for order, step in enumerate(STEPS)}
    title, line = table.layers([dataclasses.replace(QUANTIZED, losses=losses)]).splitlines()
    assert [title.index(step) for step in STEPS] == sorted(title.index(step) for step in STEPS)
    assert all(f" {value:.3g}" in line for value in losses.values())


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


def test_str_says_what_was_not_quantized_and_why() -> None:
    lines = str(make_report(parameters=PARAMETERS)).splitlines()
    assert lines[1] == "coverage: 80.0% of 1,000 parameters, 58.8% of their bytes"
    assert (
        lines[2]
        == "not quantised: 12.0% in 2 parameters (vector), 8.0% experts (1 of 6 experts unused)"
    )
    assert lines[3].startswith("model: ")
    whole = str(make_report(parameters=PARAMETERS[:1]))
    assert "coverage: 100.0% of 400 parameters, 100.0% of their bytes" in whole
    assert "not quantised" not in whole


def test_str_names_three_reasons_and_rounds_so_that_nothing_is_lost() -> None:
    large = ParameterReport(name="w", shape=(100, 1000), dtype="float32", quantized=100_000)
    kept = [
        ParameterReport(
            name=f"k{r}", shape=(i,), dtype="float32", quantized=0, reason=f"reason {r}"
        )
        for i, r in ((900, "a"), (800, "b"), (20, "c"), (10, "d"), (10, "e"))
    ]
    lines = str(make_report(parameters=(large, *kept))).splitlines()
    assert lines[2] == (
        "not quantised: 0.9% ka (reason a), 0.8% kb (reason b), <0.1% kc (reason c), <0.1% for other reasons"
    )
    almost = (large, dataclasses.replace(kept[-1], shape=(1,)))
    assert "coverage: >99.9% of 100,001 parameters" in str(make_report(parameters=almost))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_234, "1.23 kB"),
        (61_200_000, "61.20 MB"),
        (14_000_000_000, "14.00 GB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_report_returns_what_the_model_carries() -> None:
    model = nn.Linear(2, 2)
    model.tsq_report = make_report()  # type: ignore[assignment]
    assert report_of(model) is model.tsq_report


def test_report_of_a_model_that_was_not_converted_says_what_to_do() -> None:
    with pytest.raises(
        StateError, match=r"Linear has no report: it was not converted. Call tsq.quantize"
    ):
        report_of(nn.Linear(2, 2))


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
