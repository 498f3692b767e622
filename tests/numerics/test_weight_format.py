"""The frozen value of what a packed weight is: its checks, its spelling in files, and the tensors that it answers."""

import dataclasses
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from grid_kinds import KINDS, made

from tsq_layers.errors import LayerError
from tsq_layers.numerics.weight_format import BUFFER_NAMES, GRIDS, WeightFormat
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.spec import LayerSpec
from tsq_layers.runtime.storage import stored_tensors

PROPERTIES: dict[str, dict[str, Any]] = {
    "symmetric": {"symmetric": True},
    "zero points": {},
    "offsets": {"offsets": True, "scale_dtype": torch.float32},
    "row tables": {"tables": "row"},
    "group tables": {"tables": "group", "scale_dtype": torch.bfloat16},
    "basis": {"rotation": 16, "channel_scaling": True},
    "entries": {"outliers": 5},
    "columns": {"outlier_columns": 2, "offsets": True},
    "8-bit inputs": {"activation_bits": 8},
}
every = pytest.mark.parametrize("properties", PROPERTIES.values(), ids=PROPERTIES)
# What version 0.1 kept beside the buffers, and keeps no more.
REPLACED = ("bits", "group_size", "symmetric", "scale_dtype", "rotation", "activation_bits")


def layer_of(columns: int = 75, **properties: Any) -> QuantLinear:
    return QuantLinear(columns, 8, **{"bits": 3, "group_size": 32, **properties})


@every
def test_a_layer_stores_what_its_format_answers(properties: dict[str, Any]) -> None:
    layer = layer_of(**properties)
    specs = layer.format.buffers(8, 75)
    weight = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    assert list(weight) == list(specs)
    for name, spec in specs.items():
        tensor = weight[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), name
        assert tensor.numel() * tensor.element_size() == spec.nbytes
        assert len(spec.axes) == tensor.dim()
    assert [name for name in BUFFER_NAMES if name in specs] == list(specs)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weight.values())
    assert layer.format.nbytes(8, 75) == stored
    assert layer.bits_per_weight == stored * 8 / (8 * 75)


@every
def test_keywords_and_a_format_make_the_same_layer(properties: dict[str, Any]) -> None:
    layer = layer_of(**properties)
    again = QuantLinear(75, 8, layer.format)
    assert again.format == layer.format
    assert repr(again) == repr(layer)
    assert list(again._buffers) == list(layer._buffers)
    for name, value in {"bits": 3, "group_size": 32, **properties}.items():
        found = layer.codebook if name == "tables" else getattr(layer.format, name, None)
        if name == "offsets":
            found = layer.format.has_offsets
        assert found == value


@every
def test_files_spell_it_as_version_one_did(properties: dict[str, Any]) -> None:
    spec = LayerSpec.of(layer_of(**properties))
    values = spec.to_dict()
    first = ["in_features", "out_features", "bits", "group_size", "symmetric", "bias"]
    assert list(values)[:8] == [*first, "scale_dtype", "dtype"]
    expected = {name: value for name, value in properties.items() if name not in values}
    assert not expected
    assert set(values) - set(list(values)[:8]) == set(properties) - {"symmetric", "scale_dtype"}
    assert LayerSpec.from_dict(values, "up") == spec


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_stored_as_its_format_answers(kind: str) -> None:
    weight = made(kind, 8, 75, 3, 32)
    assert weight.format.grid == kind.replace(" ", "_")
    specs = weight.format.buffers(8, 75)
    tensors = stored_tensors(weight)
    assert list(tensors) == list(specs)
    for name, spec in specs.items():
        assert (tensors[name].dtype, tuple(tensors[name].shape)) == (spec.dtype, spec.shape)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 9}, "bits=9: give 1 to 8"),
        ({"group_size": 0}, "group_size=0: give a positive integer"),
        ({"grid": "spline"}, "grid='spline': give one of 'symmetric', 'zero_points'"),
        ({"grid": "row_tables", "bits": 5}, "bits=5: look-up tables are of codes of 1 to 4 bits"),
        ({"scale_dtype": torch.float64}, "scale_dtype=torch.float64: give float16"),
        ({"rotation": 12}, "rotation=12: give a power of two, or None"),
        ({"outliers": 1, "outlier_columns": 1}, "give one of them, the other 0"),
        ({"outliers": -1}, "outliers=-1"),
        ({"activation_bits": 4}, "activation_bits=4: give 8, or None"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerError, match=message):
        WeightFormat(**{"bits": 4, **wrong})


def test_a_format_beside_its_keywords_is_refused() -> None:
    with pytest.raises(LayerError, match="bits beside a format: give a WeightFormat, or"):
        QuantLinear(64, 8, WeightFormat(bits=2), bits=3)
    with pytest.raises(TypeError, match="group_size"):
        QuantLinear(64, 8, bits=3)


def test_it_is_a_frozen_value() -> None:
    form = WeightFormat(bits=2, rotation=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        form.bits = 3  # type: ignore[misc]
    assert {form: 1}[pickle.loads(pickle.dumps(form))] == 1
    assert form.plain == WeightFormat(bits=2)
    assert form.plain.is_plain
    assert not form.is_plain


def test_a_whole_row_is_one_group() -> None:
    whole, tables = WeightFormat(bits=2), WeightFormat(bits=2, group_size=32, grid="row_tables")
    assert whole.for_columns(75).group_size == 75
    for form in (whole, tables, WeightFormat(bits=2, group_size=75)):
        assert form.has_one_group(75)
        assert form.groups(75) == 1
        assert form.borders(75) == {}
    assert WeightFormat(bits=2, group_size=32).groups(75) == 3


def test_every_kind_of_grid_can_be_spelled_in_a_file() -> None:
    for kind in GRIDS:
        form = WeightFormat(bits=2, group_size=32, grid=kind)  # type: ignore[arg-type]
        values = form.to_dict()
        del values["scale_dtype"]
        assert WeightFormat.of(**values) == form


# --- pickles of version 0.1 ------------------------------------------------------------------------


@every
def test_a_layer_that_version_one_pickled_is_read(properties: dict[str, Any]) -> None:
    layer = layer_of(**properties)
    layer.words.random_(generator=torch.Generator().manual_seed(0))
    state = dict(layer.__dict__)
    del state["format"]
    old = {name: getattr(layer, name) for name in REPLACED} | {"codebook": layer.codebook}
    state |= old | {"_is_plain": False, "_buffers": OrderedDict(layer._buffers)}
    again = QuantLinear.__new__(QuantLinear)
    again.__setstate__(pickle.loads(pickle.dumps(state)))
    assert again.format == layer.format
    assert again.__dict__.keys() == layer.__dict__.keys()
    assert torch.equal(again.weight, layer.weight)
    assert torch.equal(again(torch.ones(2, 75)), layer(torch.ones(2, 75)))


@every
def test_a_layer_is_pickled_whole(properties: dict[str, Any]) -> None:
    layer, file = layer_of(**properties), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).format == layer.format
