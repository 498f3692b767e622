"""Small models of several families with random weights, and batches for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 48
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, its data, and where a calibration of it is broken off.

    Args:
        make: builds it, from the random numbers as they are.
        data: (generator, count) makes batches.
        group_size: that its narrowest layers have several groups of, where that can be.
        halfway: name of a module that is no layer to be quantised, in the middle of the model.
        overrides: for layers that cannot have 8-bit inputs.
    """

    make: Callable[[], nn.Module]
    data: Callable[[torch.Generator, int], list[Any]]
    group_size: int
    halfway: str
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Build the model, with the same weights each time."""
        torch.manual_seed(0)
        return self.make().eval()

    def batches(self, count: int = 3, seed: int = 1) -> list[Any]:
        """Make batches, the same each time."""
        return self.data(torch.Generator().manual_seed(seed), count)


def llama(**changes: Any) -> nn.Module:
    """Build a decoder whose layers every format of other engines can hold."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    given = {**sizes, **heads, "max_position_embeddings": 64, "initializer_range": 0.2, **_SPECIAL}
    config = transformers.LlamaConfig(**{**given, **changes})
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    """Build an encoder and a decoder."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1}
    given = {**sizes, **_SPECIAL, "num_heads": 4, "vocab_size": VOCABULARY}
    config = transformers.T5Config(**given, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> nn.Module:
    """Build a decoder with the transposed linear layers of transformers."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    given = {**sizes, **_SPECIAL, "vocab_size": VOCABULARY, "initializer_range": 0.2}
    config = transformers.GPT2Config(**given)
    return transformers.GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    """Build a decoder with fused experts."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    given = {**sizes, **heads, **experts, **_SPECIAL, "initializer_range": 0.2}
    config = transformers.MixtralConfig(**given)
    return transformers.MixtralForCausalLM(config)


class Vision(nn.Module):
    """Convolutions of several kinds, attention, a table, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4, bias=False)
        self.point = nn.Conv2d(32, 32, 1)
        self.positions = nn.Embedding(64, 32)
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.middle = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.twice = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.stem(x))))
        x = self.point(x).flatten(2).mT
        x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(self.middle(x))))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(x.mean(1))


def _texts(generator: torch.Generator, count: int) -> list[Any]:
    """Make token ids with labels, so that the model has a loss of its own."""
    found = []
    for _ in range(count):
        ids = torch.randint(2, VOCABULARY, (4, 32), generator=generator)
        found.append({"input_ids": ids, "labels": ids, "use_cache": False})
    return found


def _pairs(generator: torch.Generator, count: int) -> list[Any]:
    """Make texts for an encoder, padded, and for a decoder."""
    found = []
    for _ in range(count):
        ids = torch.randint(2, VOCABULARY, (4, 32), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 20:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids[:, :20].flip(1)})
    return found


def _images(generator: torch.Generator, count: int) -> list[Any]:
    return [torch.randn(6, 3, 16, 16, generator=generator) for _ in range(count)]


def _half_images(generator: torch.Generator, count: int) -> list[Any]:
    return [images.to(torch.float16) for images in _images(generator, count)]


MODELS = {
    "llama": Model(make=llama, data=_texts, group_size=32, halfway="model.layers.1"),
    "t5": Model(make=t5, data=_pairs, group_size=16, halfway="decoder.block.0"),
    "vision": Model(
        make=Vision,
        data=_images,
        group_size=16,
        halfway="middle",
        overrides={name: {"activation_bits": None} for name in ("stem", "grouped", "point")},
    ),
    "mixtral": Model(make=mixtral, data=_texts, group_size=16, halfway="model.layers.1"),
    "tied": Model(
        make=lambda: llama(tie_word_embeddings=True),
        data=_texts,
        group_size=32,
        halfway="model.layers.1",
    ),
    "llama-bfloat16": Model(
        make=lambda: llama().to(torch.bfloat16),
        data=_texts,
        group_size=32,
        halfway="model.layers.1",
    ),
    "vision-float16": Model(
        make=lambda: Vision().to(torch.float16),
        data=_half_images,
        group_size=16,
        halfway="middle",
    ),
    "gpt2": Model(make=gpt2, data=_texts, group_size=16, halfway="transformer.h.1"),
}


def output(model: nn.Module, batch: Any) -> Tensor:
    """Run a batch and return the logits."""
    with torch.no_grad():
        found = model(**batch) if isinstance(batch, dict) else model(batch)
    logits: Tensor = getattr(found, "logits", found)
    return logits
