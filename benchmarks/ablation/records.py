"""A row of the ablation, and a file of them."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row: what was done, and what came of it.

    Args:
        name: of the method, as in ``rows.ROWS`` or ``peers.PEERS``; ``"float"`` is the model as it was.
        bits, group_size: of the codes; 32 and 0 for the float model.
        tokens: of calibration.
        seed: of the calibration windows.
        perplexity: text → perplexity.
        loss: mean over the layers of the relative layer loss on the calibration tokens, after the last step.
        held_out_loss: the same on tokens that were not fitted.
        bits_per_weight: stored bits of the quantised layers, for each of their weights.
        seconds: of quantising; ``cpu_seconds`` of all threads.
        settings: what was changed in the library's default configuration.
        source: digest of the library's source.
    """

    name: str
    bits: int
    group_size: int
    tokens: int
    seed: int
    perplexity: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None
    held_out_loss: float | None = None
    bits_per_weight: float | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def key(self) -> tuple[str, int, int, int, int]:
        """What was asked for. Rounding looks at no tokens."""
        if self.name in ("float", "rounding"):
            return (self.name, self.bits, self.group_size, 0, 0)
        return (self.name, self.bits, self.group_size, self.tokens, self.seed)

    @property
    def label(self) -> str:
        """For the console."""
        return f"{self.name}, {self.bits} bits, g={self.group_size}, {self.tokens} tokens, seed {self.seed}"


FLOAT = Run(name="float", bits=32, group_size=0, tokens=0, seed=0)


def keep(path: Path, run: Run) -> None:
    """Append a row; the file is closed, so an interruption cannot lose it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(dataclasses.asdict(run)) + "\n")


def kept(path: Path) -> dict[tuple[str, int, int, int, int], Run]:
    """All rows by their keys, of several with one key the last; a line that an interruption tore is not there."""
    found: dict[tuple[str, int, int, int, int], Run] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            run = Run(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            continue
        found[run.key] = run
    return found
