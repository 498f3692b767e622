"""Measure the perplexity of a language model on a text."""

import math
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from tsq_layers.errors import ConfigError, LayerError
from tsq_layers.passes.batches import evaluating

# Float32 logits that are held at once while the loss is computed; 2^24 of them are 64 MiB.
_LOGITS_AT_ONCE = 2**24


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int = 1024,
    batch_size: int = 1,
    progress: bool | None = None,
) -> float:
    """Return the perplexity of a causal language model on a text: exp of the mean negative log likelihood.

    The text is cut into windows of ``window`` tokens that do not overlap. The model sees each by itself
    and predicts all of its tokens but the first. A shorter window at the end counts with the tokens that
    it has; a single token left over is dropped.

    Args:
        model: takes token ids (B, T) and returns logits (B, T, V), or an object with such ``logits``.
            It runs on its own device, in evaluation mode and without gradients; the training flag of
            every module is restored.
        tokens: int64 (T,) or (1, T), on any device.
        window: tokens in a window, at least 2.
        batch_size: windows that run at once.
        progress: whether to show a progress bar; ``None`` shows one on a terminal only.

    Returns:
        The perplexity, a float of at least 1; ``inf`` where the exponential overflows.

    Raises:
        ConfigError: fewer than two tokens, or tokens, a window or a batch size that cannot be used.
        LayerError: the model returns something else than logits, or logits that are NaN.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 5))
        >>> _ = nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
        >>> round(perplexity(model, torch.arange(20) % 5, window=8), 4)
        5.0
    """
    ids = _checked(tokens, window, batch_size)
    device = _device_of(model)
    batches = list(_batches(ids, window, batch_size))
    total = 0.0
    count = 0
    # tqdm takes None for "disable it where there is no terminal".
    disable = None if progress is None else not progress
    with evaluating(model), torch.no_grad():
        for batch in tqdm(batches, desc="perplexity", disable=disable, leave=False):
            device_batch = batch.to(device)
            loss = _loss(_logits(model, device_batch), device_batch)
            if math.isnan(loss):
                raise LayerError(
                    f"the loss is NaN in windows of {batch.shape[1]} tokens after {count} "
                    "predicted tokens: a weight or an activation of the model is not finite"
                )
            total += loss
            count += batch.shape[0] * (batch.shape[1] - 1)
    mean = total / count
    # math.exp raises an error a little above 709.
    return math.exp(mean) if mean < 700 else math.inf


def _checked(tokens: Tensor, window: int, batch_size: int) -> Tensor:
    """Return the tokens as int64 (T,); refuse what cannot be used."""
    for name, value, low in (("window", window, 2), ("batch_size", batch_size, 1)):
        # A bool is an int for Python, and a mistake here.
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}={value!r}: give an integer of at least {low}")
    if not _are_integers(tokens):
        kind = getattr(tokens, "dtype", type(tokens).__name__)
        raise ConfigError(f"tokens are {kind}; give an int64 tensor of token ids")
    if tokens.dim() == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.dim() != 1:
        raise ConfigError(f"tokens have shape {tuple(tokens.shape)}; give (T,) or (1, T)")
    if tokens.numel() < 2:
        raise ConfigError(
            f"{tokens.numel()} tokens: perplexity needs at least 2, one to see and one to predict"
        )
    return tokens.long()


def _are_integers(tokens: object) -> bool:
    if not isinstance(tokens, Tensor) or tokens.dtype == torch.bool:
        return False
    return not tokens.is_floating_point() and not tokens.is_complex()


def _batches(ids: Tensor, window: int, batch_size: int) -> Iterator[Tensor]:
    """Yield (B, window) of full windows, then (1, rest) if two tokens or more are left."""
    window_count = ids.numel() // window
    end = window_count * window
    if window_count:
        yield from torch.split(ids[:end].reshape(window_count, window), batch_size)
    if ids.numel() - end >= 2:
        yield ids[end:].unsqueeze(0)


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    output = model(batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != batch.shape:
        result = type(logits).__name__
        if isinstance(logits, Tensor):
            result = f"a tensor of shape {tuple(logits.shape)}"
        raise LayerError(
            f"the model returned {result}; perplexity needs logits of shape (B, T, V) with B, T = "
            f"{tuple(batch.shape)}, or an object that has them as .logits"
        )
    return logits


def _loss(logits: Tensor, batch: Tensor) -> float:
    """Return the sum of −log p over all tokens but the first of each window.

    Logits become float32 a slice of rows at a time; the terms are added in float64.
    """
    vocabulary = logits.shape[-1]
    rows = max(1, _LOGITS_AT_ONCE // vocabulary)
    losses = []
    for window_logits, window_ids in zip(logits, batch, strict=True):
        # The logits at one token predict the next one.
        slices = torch.split(window_logits[:-1], rows)
        targets = torch.split(window_ids[1:], rows)
        for part, target in zip(slices, targets, strict=True):
            losses.append(F.cross_entropy(part.float(), target, reduction="none"))
    return float(torch.cat(losses).cpu().double().sum())


def _device_of(model: nn.Module) -> torch.device:
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device
