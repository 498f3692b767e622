"""The tokens: State of the Union addresses to calibrate on, later ones and a novel to be judged by."""

import zlib
from collections.abc import Iterator
from functools import cache as remembered
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.networks import archives
from benchmarks.networks.archives import Archive
from tsq_layers.cli.demonstration import assets
from tsq_layers.integrations.transformers import load_tokenizer, read_tokens, windows

WINDOW = 1024
EVALUATION_WINDOWS = 8
HELD_OUT_WINDOWS = 4
BATCH = 1  # windows

_NOVELS = Archive(
    name="r-cran-janeaustenr",
    folder="usr/lib/R/site-library/janeaustenr/data",
    keep=("Rdata.rdb",),
    sha256="8286f76afb505e894d1ccc3fc13b96b6fd627217881ad30c3bc0acda3e9b9217",
)
_NOVEL = b"PRIDE AND PREJUDICE"
_STRING = 9  # the type of a string in R's serialisation, in the low byte of its flags


def calibration(cache: Path, tokens: int, seed: int) -> list[dict[str, Tensor]]:
    """Windows drawn evenly from the addresses of 1946 to 1999; ``seed`` moves them."""
    text = _speeches(cache, 1946, 1999)
    start = (
        int(torch.randint(WINDOW, (1,), generator=torch.Generator().manual_seed(seed)))
        if seed
        else 0
    )
    return windows(text[start:], WINDOW, tokens // WINDOW, BATCH)


def held_out(cache: Path) -> list[dict[str, Tensor]]:
    """4,096 tokens of the addresses of 1930 to 1945: for the loss of layers on tokens that were not fitted."""
    return windows(_speeches(cache, 1930, 1945), WINDOW, HELD_OUT_WINDOWS, BATCH)


def evaluation(cache: Path) -> dict[str, Tensor]:
    """8,192 tokens each: of the addresses of 2000 and later, and of *Pride and Prejudice*."""
    texts = {"speeches": _speeches(cache, 2000, 9999), "novel": _tokens(cache, novel(cache))}
    return {name: _drawn(tokens) for name, tokens in texts.items()}


def novel(cache: Path) -> str:
    """*Pride and Prejudice*, from the Debian package r-cran-janeaustenr (public domain)."""
    database = (archives.files(cache, _NOVELS) / "Rdata.rdb").read_bytes()
    for entry in _entries(database):
        lines = list(_strings(entry))
        if lines and lines[0] == _NOVEL.decode():
            return "\n".join(lines)
    raise ValueError(f"{_NOVELS.name} holds no {_NOVEL.decode()}")


def _entries(database: bytes) -> Iterator[bytes]:
    """The objects of an R lazy-load database: each a zlib stream behind four bytes of its length."""
    place = 0
    while place < len(database):
        stream = zlib.decompressobj()
        yield stream.decompress(database[place + 4 :])
        place = len(database) - len(stream.unused_data)


def _strings(entry: bytes) -> Iterator[str]:
    """The novel's lines, from a serialised character vector: flags and length (four bytes each, the
    highest first), bytes.
    """
    place = entry.find(_NOVEL) - 8
    while 0 <= place <= len(entry) - 8 and entry[place + 3] == _STRING:
        length = int.from_bytes(entry[place + 4 : place + 8], "big")
        yield entry[place + 8 : place + 8 + length].decode("utf-8", "replace")
        place += 8 + length


def _drawn(tokens: Tensor) -> Tensor:
    return torch.cat(
        [batch["input_ids"].flatten() for batch in windows(tokens, WINDOW, EVALUATION_WINDOWS)]
    )


@remembered
def _speeches(cache: Path, first: int, last: int) -> Tensor:
    return _tokens(cache, assets.text_of_years(assets.speeches(cache), first, last))


def _tokens(cache: Path, text: str) -> Tensor:
    return read_tokens(text, load_tokenizer(assets.smollm2(cache)))
