"""Small models for the tests of exports: quantised ones, and one whose every value is written down."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tsq_layers as tsq
from tsq_layers.formats import directory, export_checkpoint
from tsq_layers.numerics.weight import QuantizedWeight
from tsq_layers.runtime.linear import QuantLinear

SIZES = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
TOKENS = torch.arange(12).unsqueeze(0) * 3 % 48
UP = "model.layers.1.mlp.up_proj"


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A Llama of two blocks with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **HEADS, **changes})).to(dtype).eval()


def quantised(
    bits: int = 4,
    group_size: int | None = 32,
    *,
    symmetric: bool = True,
    model: Any = None,
    sizes: Any = None,
    **config: Any,
) -> Any:
    """It, or another model, with plainly rounded layers."""
    model = llama(**(sizes or {})) if model is None else model
    config = tsq.QuantConfig(
        bits=bits, group_size=group_size, symmetric=symmetric, method="rtn", **config
    )
    return tsq.quantize(model, config)


def written_down(bits: int, *, symmetric: bool) -> Any:
    """One block of 32×32 layers whose code in row n, column k is (k + n) mod 2^b; floats are small binary fractions."""
    model = llama(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    for parameter in model.parameters():
        values = torch.arange(parameter.numel()) % 17 / 16
        parameter.data.copy_(values.view_as(parameter))
    rows = torch.arange(32)
    codes = ((rows[:, None] + rows) % 2**bits).to(torch.uint8)
    scales = (2.0 ** -(rows % 8))[:, None].half()
    zeros = (
        torch.full((32, 1), 2 ** (bits - 1), dtype=torch.uint8)
        if symmetric
        else rows[:, None] % 2**bits
    )
    weight = QuantizedWeight(codes, scales, zeros.to(torch.uint8), bits, 32, symmetric)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, local = name.rpartition(".")
            setattr(model.get_submodule(parent), local, QuantLinear.from_float(module, weight))
    return model


def digest(model: Any, folder: Path, form: str, monkeypatch: Any) -> str:
    """SHA-256 of the file of an export that names version 0 as the packer."""
    monkeypatch.setattr(directory, "library_versions", lambda: {"tsq_layers": "0"})
    written = export_checkpoint(model, folder / "out", format=form)
    return hashlib.sha256(
        (written if written.is_file() else written / "model.safetensors").read_bytes()
    ).hexdigest()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
