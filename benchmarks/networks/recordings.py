"""Recorded speech of two Debian packages: a book read aloud, with its text, and what a telephone exchange says."""

import re
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.networks.archives import Archive, files

Samples = np.ndarray[Any, np.dtype[np.float32]]

RATE = 16_000  # samples a second
WINDOW = 30 * RATE

BOOK = Archive(
    name="pocketsphinx-testdata",
    folder="usr/share/pocketsphinx/test/data/librivox",
    keep=("*.wav", "transcription"),
    sha256="02c4fbe5f7c14d2ba53f9aee444a41ba89932572ca9e398c623e57b74f5629dd",
)
EXCHANGE = Archive(
    name="asterisk-core-sounds-en-wav",
    folder="usr/share/asterisk/sounds/en_US_f_Allison",
    keep=("*.wav", "*/*.wav"),
    sha256="97980508e4d6cad50414b1b37a6f5caf757b620d20c98cccf2363d57734c0da6",
)
NO_SPEECH = ("silence/", "beep", "ascending-2tone", "descending-2tone", "tt-monkeys.wav")
MAILBOX = "vm-"  # about a third of the speech: what the mailbox says


def book(cache: Path) -> list[tuple[Samples, str]]:
    """Five sentences of *Sense and Sensibility*, 25 seconds: samples, and the words without capitals and stops."""
    directory = files(cache, BOOK)
    sentences = re.findall(
        r"<s> (.+?) +</s> \((.+)\)", (directory / "transcription").read_text(encoding="utf-8")
    )
    return [(samples(directory / f"{name}.wav"), words) for words, name in sentences]


def exchange(cache: Path, *, mailbox: bool) -> list[Samples]:
    """Phrases in one voice, 1 second or longer: those of the mailbox, or all others."""
    directory = files(cache, EXCHANGE)
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.wav"))
    wanted = [
        name
        for name in names
        if not name.startswith(NO_SPEECH) and name.startswith(MAILBOX) == mailbox
    ]
    phrases = [samples(directory / name) for name in wanted]
    return [phrase for phrase in phrases if len(phrase) >= RATE]


def samples(path: Path) -> Samples:
    """The samples of a WAV file with 16-bit samples and one channel, −1 to 1, 16,000 a second.

    A recording with 8,000 samples a second gets its in-between values from its own frequencies; there are none
    above 4 kHz then, as on a telephone.
    """
    with wave.open(str(path)) as file:
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(
            np.float32
        ) / np.float32(2**15)
        rate = file.getframerate()
    return values if rate == RATE else doubled(values)


def doubled(values: Samples) -> Samples:
    """A signal at twice its number of samples, with the same frequencies."""
    spectrum = np.fft.rfft(values)
    return 2 * np.fft.irfft(
        np.pad(spectrum, (0, len(values) + 1 - len(spectrum))), 2 * len(values)
    ).astype(np.float32)


def windows(
    phrases: Sequence[Samples], lengths: Sequence[int], count: int, draw: np.random.Generator
) -> list[Samples]:
    """Windows of speech as it would be recorded: phrases in random order with pauses, at another loudness, with noise.

    Args:
        phrases: what is said; where all have been used, they are used again in another order.
        lengths: samples of the windows, in turn. A phrase may be cut by the end of a window and goes on in the next.
        count: number of windows.
        draw: where randomness comes from.
    """
    needed = sum(lengths[index % len(lengths)] for index in range(count))
    parts: list[Samples] = []
    while sum(map(len, parts)) < needed:
        for index in draw.permutation(len(phrases)):
            pause = np.zeros(int(draw.uniform(0.2, 0.6) * RATE), np.float32)
            parts += [phrases[index], pause]
    stream, found, start = np.concatenate(parts), [], 0
    for index in range(count):
        end = start + lengths[index % len(lengths)]
        found.append(_recorded(stream[start:end], draw))
        start = end
    return found


def _recorded(window: Samples, draw: np.random.Generator) -> Samples:
    """10 dB quieter to as loud, with white noise that is 20 to 50 dB quieter than the speech."""
    gain, distance = 10 ** (draw.uniform(-10, 0) / 20), 10 ** (draw.uniform(20, 50) / 20)
    noise = draw.standard_normal(len(window), np.float32) * np.sqrt(np.mean(window**2)) / distance
    recorded: Samples = ((window + noise) * gain).astype(np.float32)
    return recorded
