"""microformer-mgm, a GPT-2 of transformers with `Conv1D` layers: 8 layers; a language of microbes in a habitat.

No text of its language can be fetched, so it is measured on samples of its own, as its package draws them.
"""

import importlib
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import packages
from tsq_layers.integrations.transformers import load_causal_lm, quiet

NAME = "microformer-mgm (GPT-2)"
METRIC = "perplexity"
SKIP = ("lm_head",)
FORWARD = None
PADDING_MASK = None

PACKAGE = packages.Package(
    name="microformer-mgm",
    version="0.5.8",
    sha256="210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b",
    folder="mgm/resources/general_model",
)
_PADDING, _BEGIN, _END = 0, 2, 3
_LONGEST = 128
_BATCH = 32
_CALIBRATION_SAMPLES = 512
_EVALUATION_SAMPLES = 256
_EVALUATION_SEED = 2**20


def load(cache: Path) -> nn.Module:
    """The network, 8.9 million parameters."""
    return load_causal_lm(packages.files(cache, PACKAGE))


def calibration(cache: Path, seed: int = 0) -> list[dict[str, Tensor]]:
    """About 20,000 tokens: 512 samples, padded to the longest of their batch."""
    return _batches(_samples(cache, _CALIBRATION_SAMPLES, seed))


def evaluate(cache: Path, model: nn.Module, reference: nn.Module) -> dict[str, float]:
    """Perplexity on 256 other samples, and the mean divergence of the predictions from the float network's there."""
    loss = divergence = 0.0
    count = 0
    samples = _samples(cache, _EVALUATION_SAMPLES, _EVALUATION_SEED)
    by_length = samples[
        (samples != _PADDING).sum(dim=1).argsort(stable=True)
    ]  # little padding: less to compute
    for batch in _batches(by_length):
        counts = batch["attention_mask"][:, 1:] != 0
        targets = batch["input_ids"][:, 1:][counts]
        found, expected = (
            _log_probabilities(network, batch, counts) for network in (model, reference)
        )
        loss += float(F.nll_loss(found, targets, reduction="sum"))
        divergence += float(F.kl_div(found, expected, reduction="sum", log_target=True))
        count += len(targets)
    return {"perplexity": math.exp(loss / count), "KL to float": divergence / count}


@torch.no_grad()
def _log_probabilities(model: nn.Module, batch: dict[str, Tensor], counts: Tensor) -> Tensor:
    """Of the token after each, where it counts, float64 (tokens, V)."""
    logits: Tensor = model(**batch).logits[:, :-1]
    return logits[counts].double().log_softmax(dim=-1)


def _batches(samples: Tensor) -> list[dict[str, Tensor]]:
    """Samples in batches, cut to the longest sample in each."""
    batches = []
    for part in samples.split(_BATCH):
        mask = (part != _PADDING).long()
        longest = int(mask.sum(dim=1).max())
        batches.append({"input_ids": part[:, :longest], "attention_mask": mask[:, :longest]})
    return batches


def _samples(cache: Path, count: int, seed: int) -> Tensor:
    """Samples of the float network, int64 (count, 128), padded with 0; drawn on the first call."""
    path = cache / f"{PACKAGE.name}-{PACKAGE.version}-samples-{count}-{seed}.safetensors"
    if not path.exists():
        save_file({"samples": _sampled(load(cache), count, seed)}, path)
    return load_file(path)["samples"]


def _sampled(model: nn.Module, count: int, seed: int) -> Tensor:
    """In batches: a batch takes as many steps as its longest sample has tokens."""
    parts = []
    with (
        quiet(importlib.import_module("transformers")),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
    ):
        torch.manual_seed(seed)
        for start in torch.full((count, 1), _BEGIN).split(_BATCH):
            samples = model.generate(  # type: ignore[operator]
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                top_k=50,
                max_length=_LONGEST,
                pad_token_id=_PADDING,
                eos_token_id=_END,
            )
            parts.append(F.pad(samples, (0, _LONGEST - samples.shape[1]), value=_PADDING))
    return torch.cat(parts)
