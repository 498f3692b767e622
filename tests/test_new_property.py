"""What a new property of a packed weight costs: which files must change, and that nothing else needs to.

A grid that no version has, ``scales · factor of the row · (codes − 2^(bits−1))``, is added here by
three edits: its entry in
``GRIDS`` (the definition), one function for its values (the kernel), and what fills its tensors (the writer). All else
stores, runs, saves, loads, plans and counts it without a change.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tsq_layers
import tsq_layers as tsq
from tsq_layers.calibration.journal import record
from tsq_layers.integrations.vllm.assembly import Intake, Matrices
from tsq_layers.integrations.vllm.sharding import Cut, Span
from tsq_layers.numerics import grid
from tsq_layers.numerics.weight_format import GRIDS, BufferSpec, Grid, WeightFormat, bits_dtype
from tsq_layers.planning.needs import packed_bytes
from tsq_layers.reports import LayerReport
from tsq_layers.runtime import kernels
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.parts import Parts
from tsq_layers.runtime.spec import LayerSpec

ROOT = Path(tsq_layers.__file__).parent
ROOMS = ("numerics", "runtime", "formats", "planning", "integrations")

# Where a property of a weight is named today: its definition and the value that has it, the writer,
# the kernels, and the
# table of what other engines' files hold. "costs" and "needs" speak of a configuration, "quantizer"
# of a message about one.
NAMED_IN = {
    "rotation": {
        "weight_format",
        "weight",
        "storage",
        "forward",
        "basis",
        "limits",
        "costs",
        "needs",
    },
    "channel_scaling": {"weight_format", "weight", "storage", "limits", "costs", "quantizer"},
    "outliers": {"weight_format", "weight", "storage", "route", "limits"},
    "outlier_columns": {"weight_format", "weight", "storage", "limits"},
    "activation_bits": {
        "weight_format",
        "storage",
        "forward",
        "linear",
        "route",
        "limits",
        "needs",
    },
    "offsets": {"weight_format", "weight", "storage", "spec", "kernels", "one_pass", "native"},
    "tables": {"weight_format", "weight", "storage", "spec", "one_pass", "limits"},
    "zero_words": {"weight_format", "storage", "kernels", "one_pass", "writing"},
    "column_scale_bits": {"weight_format", "storage"},
    "outlier_places": {"weight_format", "storage"},
}


def names_in(source: str) -> Iterator[str]:
    """Every name, attribute, argument and text constant of a source."""
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "value"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value


@pytest.mark.parametrize("name", NAMED_IN)
def test_a_property_is_named_in_few_files(name: str) -> None:
    files = {
        path.stem
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if name in names_in(path.read_text(encoding="utf-8"))
    }
    assert files == NAMED_IN[name]


@pytest.mark.parametrize("room", ["formats", "planning", "integrations"])
def test_nobody_else_computes_what_is_stored(room: str) -> None:
    """Words and groups of our own tensors: other engines' files have layouts of their own, in
    ``bitstream`` and ``words``.
    """
    own = {"tsq", "vllm"} if room != "planning" else {"planning"}
    for path in (ROOT / room).rglob("*.py"):
        if own & set(path.parts):
            names = set(names_in(path.read_text(encoding="utf-8")))
            allowed = {"group_count"} if path.stem == "costs" else set()  # of the solver's arrays
            assert not (names & {"word_count", "group_count", "planes"}) - allowed, path


# --- the toy ---------------------------------------------------------------------------------------


def buffers(form: WeightFormat, rows: int, columns: int) -> dict[str, BufferSpec]:
    """Those of a symmetric grid, and a factor for each row."""
    factors = BufferSpec(
        shape=(rows, 1), dtype=bits_dtype(form.scale_dtype), axes=("rows", "levels")
    )
    return GRIDS["symmetric"].buffers(form, rows, columns) | {"factor_bits": factors}


def values(codes: Tensor, parts: Parts, form: WeightFormat, dtype: torch.dtype) -> Tensor:
    middle = torch.full(parts.grids.shape, 2 ** (form.bits - 1), dtype=torch.uint8)
    weight = grid.dequantize(codes, parts.grids, middle, form.group_columns(codes.shape[1]), dtype)
    assert parts.shifts is not None
    return weight * parts.shifts.to(dtype)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Grid(
        keywords={"grid": "factors"}, buffers=buffers, shifts="factor_bits", float_shifts=True
    )
    monkeypatch.setitem(GRIDS, "factors", entry)
    monkeypatch.setitem(kernels.MATRICES, "factors", values)


def layer_of(**properties: Any) -> QuantLinear:
    """The writer: random codes and scales, and the factors 1, 2, …, 12."""
    form = WeightFormat(bits=3, group_size=32, grid="factors", **properties)  # type: ignore[arg-type]
    layer = QuantLinear(64, 12, form, bias=False)
    generator = torch.Generator().manual_seed(0)
    layer.words.random_(generator=generator)
    scales = torch.rand(12, 2, generator=generator).half() + 0.5
    layer.scale_bits = scales.view(torch.int16)
    layer.factor_bits = torch.arange(1.0, 13).half().view(torch.int16).unsqueeze(1)
    return layer


def test_it_is_stored_and_counted() -> None:
    layer = layer_of()
    assert set(layer.state_dict()) == {"words", "scale_bits", "factor_bits"}
    plain = WeightFormat(bits=3, group_size=32, grid="symmetric").bits_per_weight(12, 64)
    assert layer.bits_per_weight == plain + 16 / 64
    assert "grid='factors'" in repr(layer)


def test_it_runs_where_nothing_knows_it() -> None:
    layer = layer_of(rotation=16)
    symmetric = QuantLinear(64, 12, bits=3, group_size=32, symmetric=True, rotation=16, bias=False)
    symmetric.words, symmetric.scale_bits = layer.words, layer.scale_bits
    factors = torch.arange(1.0, 13)
    assert torch.allclose(layer.weight, symmetric.weight * factors.unsqueeze(1))
    for rows in (1, 40):
        x = torch.randn(rows, 64)
        assert torch.allclose(layer(x), symmetric(x) * factors, rtol=1e-4, atol=1e-3)
    ids = torch.tensor([3, 0])
    assert torch.allclose(layer.rows(ids), layer.weight[ids], rtol=1e-5)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(layer_of())
    tsq.save(model, tmp_path)
    content = json.loads((tmp_path / "tsq.json").read_text())
    assert content["layers"]["0"]["grid"] == "factors"
    loaded = tsq.load(tmp_path, nn.Sequential(nn.Linear(64, 12, bias=False)))
    assert loaded[0].format == model[0].format
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_a_journal_holds_it(tmp_path: Path) -> None:
    layer = layer_of()
    report = LayerReport(name="up", kind="Linear", rows=12, columns=64, status="quantized", bits=3)
    name, content = record.encode({"up": (layer, report)}, 0, "run")
    (tmp_path / name).write_bytes(content)
    (entry,) = record.decode(tmp_path / name, 0, "run")
    assert torch.equal(entry.load().weight, layer.weight)


def test_it_is_planned() -> None:
    layer: Any = SimpleNamespace(format=layer_of().format, shape=(12, 64))
    stored = sum(buffer.numel() * buffer.element_size() for buffer in layer_of().buffers())
    assert packed_bytes(layer) == stored


@pytest.mark.parametrize("cut", [Cut(rows=(Span(2, 4),)), Cut(columns=Span(32, 32))], ids=str)
def test_it_is_sharded(cut: Cut) -> None:
    layer = layer_of()
    intake = Intake("up", LayerSpec.of(layer), (12, 64), cut)
    for key, buffer in layer.state_dict().items():
        intake.take(key, buffer)
    (shared,) = Matrices([intake.share()], torch.float32, torch.device("cpu")).parts
    weight = layer.weight[2:6] if cut.rows else layer.weight[:, 32:]
    assert torch.equal(shared.weight, weight)
