"""SmolLM2-135M-Instruct, a Llama: 30 layers, grouped-query attention, tied embedding; predicts speeches."""

from functools import cache as remembered
from pathlib import Path

import torch
from torch import Tensor, nn

import tsq_layers as tsq
from tsq_layers.cli.demonstration import assets
from tsq_layers.integrations.transformers import (
    load_causal_lm,
    load_tokenizer,
    read_tokens,
    windows,
)

NAME = "SmolLM2-135M (decoder)"
METRIC = "perplexity"
SKIP = ("lm_head",)
FORWARD = None
PADDING_MASK = None

_WINDOW = 1024
_CALIBRATION_WINDOWS = 16
_EVALUATION_WINDOWS = 8


def load(cache: Path) -> nn.Module:
    """The network, 134.5 million parameters."""
    return load_causal_lm(assets.smollm2(cache))


def calibration(cache: Path, seed: int = 0) -> list[dict[str, Tensor]]:
    """16,384 tokens of State of the Union addresses of 1946 to 1999; ``seed`` moves the windows."""
    tokens = _tokens(cache, 1946, 1999)
    start = int(torch.randint(_WINDOW, (1,), generator=torch.Generator().manual_seed(seed)))
    return windows(tokens[start:], _WINDOW, _CALIBRATION_WINDOWS)


def evaluate(cache: Path, model: nn.Module, reference: nn.Module) -> dict[str, float]:  # noqa: ARG001  (all networks have it)
    """Perplexity on 8,192 tokens of the addresses of 2000 and later."""
    drawn = windows(_tokens(cache, 2000, 9999), _WINDOW, _EVALUATION_WINDOWS)
    text = torch.cat([batch["input_ids"].flatten() for batch in drawn])
    return {"perplexity": tsq.perplexity(model, text, window=_WINDOW)}


@remembered
def _tokens(cache: Path, first: int, last: int) -> Tensor:
    text = assets.text_of_years(assets.speeches(cache), first, last)
    return read_tokens(text, load_tokenizer(assets.smollm2(cache)))
