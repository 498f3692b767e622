"""Directories and layers that version 0.1 wrote: they load to the last bit, and run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tsq_layers as tsq
from tsq_layers.config.methods import GPTQ, RTN, QuantEase

WRITTEN = Path(__file__).with_name("version_0_1")
NAMES = sorted(path.name for path in WRITTEN.iterdir() if path.is_dir())


def empty() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))


def test_there_is_a_directory_of_every_kind_of_grid() -> None:
    assert NAMES == ["best", "inputs", "outliers", "symmetric", "tables", "two-stage"]


@pytest.mark.parametrize("name", NAMES)
def test_directory_loads_to_the_last_bit_and_runs(name: str) -> None:
    model = tsq.load(WRITTEN / name, empty())
    expected = load_file(WRITTEN / name / "expected.safetensors")
    for index in (0, 2):
        weight = model[index].dequantize(torch.float64)
        assert torch.equal(weight, expected[f"weight.{index}"])
    outputs = model(expected["x"])
    assert outputs.shape == (5, 8)
    assert torch.isfinite(outputs).all()


@pytest.mark.parametrize("name", NAMES)
def test_directory_is_written_again_with_the_same_tensors(name: str, tmp_path: Path) -> None:
    tsq.save(tsq.load(WRITTEN / name, empty()), tmp_path / "again")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (WRITTEN / name, tmp_path / "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    description = json.loads((tmp_path / "again" / "tsq.json").read_text())
    assert description["report"]["config"]["schema_version"] == 2


def test_options_that_the_method_does_not_read_are_left_out_of_the_configuration() -> None:
    config = tsq.load(WRITTEN / "symmetric", empty()).tsq_report.config
    assert config == tsq.QuantConfig(bits=4, group_size=None, symmetric=True, method=GPTQ())
    config = tsq.load(WRITTEN / "outliers", empty()).tsq_report.config
    assert config.options == QuantEase(outliers=0.02)
    assert config.for_layer("2").options == RTN()


def test_pickled_layer_loads_and_runs() -> None:
    layer = torch.load(WRITTEN / "layer.pt", weights_only=False)
    assert type(layer) is tsq.QuantLinear
    expected = load_file(WRITTEN / "two-stage" / "expected.safetensors")
    assert torch.equal(layer.dequantize(torch.float64), expected["weight.0"])
    assert layer.format == tsq.load(WRITTEN / "two-stage", empty())[0].format
    assert layer(expected["x"]).shape == (5, 32)
