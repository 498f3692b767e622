"""A whole quantised model through torch.export and AOTInductor."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tsq_layers as tsq

# What torch itself warns of while it exports and compiles.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

KINDS = {
    "affine": {"bits": 4, "group_size": 32},
    "float zero points, rotated": {
        "bits": 2,
        "group_size": 32,
        "zero_points": "float",
        "rotation": 32,
    },
    "tables": {"bits": 3, "method": "lnq"},
    "outliers": {"bits": 3, "group_size": 32, "method": "quantease", "outliers": 0.02},
}


class Logits(nn.Module):
    """A decoder without its cache: ids (B, T) → (B, T, V)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def decoder(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(128, (16, 128))} for _ in range(2)]
    return Logits(tsq.quantize(model, tsq.QuantConfig(**changes), batches)).eval()


def ids(rows, length=16):
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_is_the_model_for_any_number_of_rows(kind, tmp_path):
    model = decoder(**KINDS[kind])
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (ids(3),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for count in (2, 7):
        torch.testing.assert_close(loaded(ids(count)), model(ids(count)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_program_holds_packed_weights(tmp_path):
    model = decoder(bits=2, group_size=32)
    program = torch.export.export(model, (ids(3),))
    words = [tensor for name, tensor in program.state_dict.items() if name.endswith(".words")]
    assert len(words) == 7
    weights = {
        layer.name: layer.weights
        for layer in model.model.tsq_report.layers
        if layer.status == "quantized"
    }
    assert sum(tensor.numel() * 32 for tensor in words) == 2 * sum(weights.values())
    assert not any(
        tensor.is_floating_point()
        and tensor.numel() >= 64 * 64
        and "embed" not in name
        and "lm_head" not in name
        for name, tensor in program.state_dict.items()
    )


@pytest.mark.compile
@torch.no_grad()
def test_aot_inductor_runs_a_package_of_it(tmp_path):
    model = decoder(bits=4, group_size=32)
    program = torch.export.export(model, (ids(3),))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    compiled = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(compiled(ids(3)), model(ids(3)), rtol=1e-4, atol=1e-5)
