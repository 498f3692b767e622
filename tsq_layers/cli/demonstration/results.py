"""Store what the demo measures: a row for every configuration, on disk at once, and shown as a table."""

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BLANK = "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration of the demo.

    Args:
        method: ``"float"``, ``"rtn"``, ``"gptq"`` or ``"two-stage"``.
        bits: width of a code; 32 for the float model.
        group_size: columns that share a scale; ``None`` for the float model.
        bits_per_weight: stored bits per weight of the layers that were quantised.
        size: bytes of all parameters and buffers of the model.
        perplexity: name of a text → perplexity on it.
        seconds: of the quantisation.
        sentence: what the model makes of the demo's prompt, where it was asked.
        reloaded: perplexity on the first text in a fresh process, from the saved model.
    """

    method: str
    bits: int
    group_size: int | None
    bits_per_weight: float
    size: int
    perplexity: dict[str, float]
    seconds: float
    sentence: str | None = None
    reloaded: float | None = None

    @property
    def label(self) -> str:
        """For example ``two-stage, 2 bits, g=64``."""
        return (
            self.method
            if self.group_size is None
            else f"{self.method}, {self.bits} bits, g={self.group_size}"
        )


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON values: results with the same one came from the same settings and the same data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def library_digest() -> str:
    """A hash of the library's own source: results of other code under the same version number are not taken."""
    root = Path(__file__).parents[1]
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    ).hexdigest()[:16]


def keep(path: Path, key: str, row: Row) -> None:
    """Append a result to a file of JSON lines; the file is closed, so an interruption cannot lose it."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(
            ("\n" if torn else "") + json.dumps({"key": key, "row": dataclasses.asdict(row)}) + "\n"
        )


def kept(path: Path) -> dict[str, Row]:
    """The results of earlier runs by their keys. A line that is torn or of another format counts as not there."""
    rows: dict[str, Row] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            values = json.loads(line)
            rows[values["key"]] = Row(**values["row"])
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return rows


def machine() -> dict[str, Any]:
    """The processor and the threads that torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": next(names, platform.processor() or platform.machine()),
        "threads": torch.get_num_threads(),
    }


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of an aligned Markdown table. The first row is the float model that the others are compared with."""
    texts = list(rows[0].perplexity)
    titles = [
        "method",
        "bits",
        "group",
        "bits/weight",
        "MB",
        *[f"ppl {text}" for text in texts],
        *[f"ln ratio {text}" for text in texts],
        "seconds",
    ]
    return markdown(titles, [_cells(row, rows[0], texts) for row in rows])


def _cells(row: Row, base: Row, texts: Sequence[str]) -> list[str]:
    perplexities = [f"{row.perplexity[text]:.2f}" for text in texts]
    ratios = [
        BLANK if row is base else f"{math.log(row.perplexity[text] / base.perplexity[text]):.3f}"
        for text in texts
    ]
    group = BLANK if row.group_size is None else str(row.group_size)
    seconds = BLANK if row is base else f"{row.seconds:.1f}"
    return [
        row.method,
        str(row.bits),
        group,
        f"{row.bits_per_weight:.3f}",
        f"{row.size / 1e6:.1f}",
        *perplexities,
        *ratios,
        seconds,
    ]


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns are aligned as plain text, too; the first column to the left."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                [
                    cells[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
                ]
            )
            + " |"
        )

    rule = (
        "|"
        + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
        + "|"
    )
    return [line(titles), rule, *map(line, rows)]
