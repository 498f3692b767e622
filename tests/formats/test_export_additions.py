"""Layers that do more than multiply by codes: no format of another engine holds them."""

import pytest
import torch
from export_models import UP, quantised

from tsq_layers.formats import ExportError, export_checkpoint
from tsq_layers.numerics.basis import Basis
from tsq_layers.numerics.weight import Outliers, QuantizedWeight
from tsq_layers.runtime.linear import QuantLinear

INDICES = torch.tensor([3, 70], dtype=torch.int32)
ADDITIONS = {
    "rotation": (
        {"basis": Basis.rotated(64, 8)},
        None,
        "a rotation of its input: quantise with rotation=None",
    ),
    "scaling": (
        {"basis": Basis(scaling=torch.ones(64))},
        None,
        r"column scales: fold them .* tsq\.fold_scaling",
    ),
    "entries": (
        {"outliers": Outliers(torch.ones(2).half(), INDICES)},
        None,
        "a sparse part: .* outliers=0",
    ),
    "columns": (
        {"outliers": Outliers(torch.ones(96, 1).half(), None, INDICES[:1])},
        None,
        "outlier_columns=0",
    ),
    "8-bit inputs": ({}, 8, "8-bit inputs: quantise with activation_bits=None"),
}


def changed(kind):
    changes, activation_bits, message = ADDITIONS[kind]
    model = quantised()
    weight = QuantizedWeight(**{**vars(model.get_submodule(UP).quantized_weight()), **changes})
    model.set_submodule(UP, QuantLinear.from_quantized(weight, activation_bits=activation_bits))
    return model, message


@pytest.mark.parametrize("form", ["gptq", "gptq-v1", "compressed-tensors", "gguf"])
@pytest.mark.parametrize("kind", ADDITIONS)
def test_it_is_refused_by_name_with_the_cure(kind, form, tmp_path):
    model, message = changed(kind)
    for others in (False, True):
        with pytest.raises(ExportError, match=f"layer '{UP}' has .*{message}"):
            export_checkpoint(model, tmp_path / "out", format=form, dequantize_others=others)
    assert not (tmp_path / "out").exists()


def test_the_same_model_without_it_is_written(tmp_path):
    assert export_checkpoint(quantised(), tmp_path / "out", format="gptq").exists()
