"""GGUF files of Llama and Mistral models: what llama.cpp loads.

Exact are symmetric layers of 4, 5 and 8 bits (Q4_0, Q5_0, Q8_0) in groups of a multiple of 32
columns, of which the last of a row may be shorter. A packed embedding is held too. Everything else
keeps its dtype, but vectors (norms, biases) are float32, as llama.cpp wants them.

The rows of query and key are in another order than in transformers: llama.cpp rotates neighbouring
rows of a head, transformers rows that are half a head apart.

llama.cpp serves all of it; it rounds the inputs of packed layers to 8 bits, which changes the logits by some per cent.
transformers loads it dequantised (``from_pretrained(directory, gguf_file="model.gguf")``).
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.errors import ExportError
from tsq_layers.formats.contents import Contents, Layer
from tsq_layers.formats.floats import Stored
from tsq_layers.formats.gguf.blocks import TYPES, pack
from tsq_layers.formats.gguf.file import BF16, F16, F32, BlockType, GGUFTensor, Value, write_gguf
from tsq_layers.formats.gguf.tokenizer import tokenizer_metadata
from tsq_layers.formats.limits import Limits, check
from tsq_layers.layers.embedding import QuantEmbedding
from tsq_layers.numerics.memory import dtype_name
from tsq_layers.numerics.packing import unpack
from tsq_layers.runtime.linear import QuantLinear

FILE = "model.gguf"
LIMITS = Limits(
    format_name="gguf",
    bits=tuple(TYPES),
    asymmetric=False,
    columns=32,
    ragged=True,
    scale_dtype=torch.float16,
)
_FLOATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
_FILE_TYPES = {4: 2, 5: 8, 8: 7}  # by the width that most layers have
_TABLE, _HEAD = "model.embed_tokens", "lm_head"
_NAMES = {_TABLE: "token_embd", "model.norm": "output_norm", _HEAD: "output"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def takes(layer: Layer) -> bool:
    """Linear layers, and the embedding."""
    return layer.kind == "Linear" or (type(layer.module) is QuantEmbedding and layer.name == _TABLE)


def check_model(model: nn.Module) -> None:
    """Refuse another architecture, whatever its layers are.

    Raises:
        ExportError: it is.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is not None and kind not in ("llama", "mistral"):
        raise ExportError(
            f"gguf files are written of models of type llama and mistral, and this is {kind!r}: "
            "the nearest is format='compressed-tensors'"
        )


def check_contents(contents: Contents) -> None:
    """Refuse what the format cannot hold.

    Raises:
        ExportError: a layer's width or grids; a tensor that llama.cpp has no place for.
    """
    config = contents.config
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ExportError(
            f"sliding_window={window}: llama.cpp runs this architecture without a window; set it to None"
        )
    check(contents.held, LIMITS)
    _rope(config)
    for name in (*contents.held, *(stored.key.rpartition(".")[0] for stored in contents.floats)):
        _gguf_name(name)
    for stored in contents.floats:
        if stored.dtype not in _FLOATS:
            raise ExportError(
                f"tensor {stored.key!r} is {dtype_name(stored.dtype)}; gguf holds float32, float16 and bfloat16"
            )


def write(contents: Contents, tokenizer: Any, folder: Path) -> None:
    """Write ``model.gguf``."""
    config = contents.config
    metadata, factors = _metadata(contents), _rope(config)[1]
    metadata |= tokenizer_metadata(tokenizer, config.vocab_size)
    tied = config.tie_word_embeddings and contents.held.get(_HEAD) is contents.held.get(_TABLE)
    tensors = [_float_tensor(config, stored) for stored in contents.floats]
    for name, layer in contents.held.items():
        if name != _HEAD or not tied:
            tensors += _packed_tensors(config, name, layer)
    if factors:
        tensors.append(
            GGUFTensor("rope_freqs.weight", F32, (len(factors),), lambda: torch.tensor(factors))
        )
    write_gguf(folder / FILE, metadata, sorted(tensors, key=_order))


# --- tensors -----------------------------------------------------------------------------------


def _packed_tensors(config: Any, name: str, layer: QuantLinear) -> list[GGUFTensor]:
    gguf_name, shape = _gguf_name(name), (layer.out_features, layer.in_features)

    def blocks() -> Tensor:
        codes = _reordered(config, name, unpack(layer.words, layer.bits, layer.in_features)).cpu()
        return pack(
            codes, _reordered(config, name, layer.scales).cpu(), layer.bits, layer.group_size
        )

    tensors = [GGUFTensor(f"{gguf_name}.weight", TYPES[layer.bits], shape, blocks)]
    if layer.bias is not None and name != _TABLE:
        tensors.append(_float_tensor(config, Stored.of(f"{name}.bias", layer.bias)))
    return tensors


def _float_tensor(config: Any, stored: Stored) -> GGUFTensor:
    name, _, local = stored.key.rpartition(".")
    kind: BlockType = F32 if len(stored.shape) == 1 else _FLOATS[stored.dtype]

    def values() -> Tensor:
        tensor = _reordered(config, name, stored.make())
        return (tensor.float() if kind is F32 else tensor).contiguous().cpu()

    return GGUFTensor(f"{_gguf_name(name)}.{local}", kind, stored.shape, values)


def _reordered(config: Any, name: str, rows: Tensor) -> Tensor:
    """The rows of query and key in llama.cpp's order: those of a head's first and second half in turns."""
    part = name.rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
    if heads is None:
        return rows
    halves: Tensor = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ExportError(f"tensors of {name!r} have no place in a gguf file of a Llama model")
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}"


def _order(tensor: GGUFTensor) -> tuple[int, int, str]:
    """The embedding first, then layer by layer, what else there is last."""
    parts = tensor.name.split(".")
    if parts[0] == "blk":
        return 1, int(parts[1]), tensor.name
    return (0 if parts[0] == "token_embd" else 2), 0, tensor.name


# --- metadata ----------------------------------------------------------------------------------


def _metadata(contents: Contents) -> dict[str, Value]:
    config = contents.config
    head = _head_size(config)
    widths = Counter(layer.bits for layer in contents.held.values())
    architecture: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "vocab_size": config.vocab_size,
        **_rope(config)[0],
    }
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": Path(getattr(config, "_name_or_path", "") or "model").name,
        "general.file_type": _FILE_TYPES[widths.most_common(1)[0][0]],
        "general.quantization_version": 2,
        **{f"llama.{key}": value for key, value in architecture.items()},
    }


def _head_size(config: Any) -> int:
    size: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return size


def _rope(config: Any) -> tuple[dict[str, Value], list[float]]:
    """The metadata of the rotary embedding; and factors by which its wavelengths are stretched, if they differ."""
    rope = dict(
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = float(rope.get("rope_theta", getattr(config, "rope_theta", 1e4)))
    values: dict[str, Value] = {"rope.freq_base": base}
    if kind == "linear":
        return values | {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(rope["factor"]),
        }, []
    if kind == "llama3":
        return values, _llama3_factors(rope, base, _head_size(config))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            f"rope of type {kind!r}: gguf files are written with the types default, linear and llama3"
        )
    return values, []


def _llama3_factors(rope: dict[str, Any], base: float, head: int) -> list[float]:
    """Long wavelengths are stretched by ``factor``, short ones not, those between partly."""
    factor, low, high = (
        float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    context = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, head, 2):
        turns = context / (2 * math.pi * base ** (i / head))  # in the original context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return factors
