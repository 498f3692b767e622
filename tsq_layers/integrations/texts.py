"""Texts as tokens: what language models are calibrated and measured on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsq_layers.errors import ConfigError


def read_tokens(text: str | Path, tokenizer: Any) -> Tensor:
    """Token ids of a text, int64 (T,).

    Args:
        text: a ``Path`` is a UTF-8 file to read; a ``str`` is the text itself.
        tokenizer: of the model.

    Raises:
        ConfigError: a file that is missing or not UTF-8, or a text without tokens.
    """
    name = "the text"
    if isinstance(text, Path):
        name = str(text)
        text = read_text(text)
    ids = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise ConfigError(f"{name} has no tokens")
    return torch.tensor(ids, dtype=torch.int64)


def windows(
    tokens: Tensor, length: int, count: int, batch_size: int = 1
) -> list[dict[str, Tensor]]:
    """``count`` windows of ``length`` tokens, spread evenly over a text; no two overlap.

    The same arguments give the same windows. Window i starts at token ⌊i·T / count⌋.

    Args:
        tokens: int64 (T,).
        length: tokens in a window.
        count: windows.
        batch_size: windows in a batch; the last batch may have fewer.

    Returns:
        Batches as keyword arguments of the model: ``{"input_ids": int64 (B, length)}``.

    Raises:
        ConfigError: the text is too short for that many windows.

    Example:
        >>> [batch["input_ids"].tolist() for batch in windows(torch.arange(10), 2, 3)]
        [[[0, 1]], [[3, 4]], [[6, 7]]]
    """
    for name, value in (("length", length), ("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value}: give a positive integer")
    total = tokens.numel()
    if total < length * count:
        raise ConfigError(
            f"the text has {total} tokens, too few for {count} windows of {length}: give more "
            f"text, or ask for {total} tokens or fewer"
        )
    starts = [i * total // count for i in range(count)]
    rows = torch.stack([tokens[start : start + length] for start in starts])
    return [{"input_ids": batch} for batch in torch.split(rows, batch_size)]


def read_text(path: str | Path) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
