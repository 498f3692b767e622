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
        """Return a name, for example ``two-stage, 2 bits, g=64``."""
        return (
            self.method
            if self.group_size is None
            else f"{self.method}, {self.bits} bits, g={self.group_size}"
        )


def fingerprint(*parts: Any) -> str:
    """Return a short hash of JSON values: results with the same one had the same settings and data."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def library_digest() -> str:
    """Return a hash of the library's own source: results of other code under the same version number are not taken."""
    root = Path(__file__).parents[1]
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    ).hexdigest()[:16]


def keep(path: Path, key: str, row: Row) -> None:
    """Append a result to a file of JSON lines; the file is closed, so an interruption cannot lose it."""
    line = json.dumps({"key": key, "row": dataclasses.asdict(row)})
    # An interrupted run may have left half a line, which a line break ends.
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    start = "\n" if is_torn else ""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{start}{line}\n")


def kept(path: Path) -> dict[str, Row]:
    """Return the results of earlier runs by their keys.

    A line that is torn or of another format counts as not there.
    """
    if not path.exists():
        return {}
    rows: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            rows[values["key"]] = Row(**values["row"])
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return rows


def machine() -> dict[str, Any]:
    """Return the processor and the threads that torch uses on it."""
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
    """Return the lines of an aligned Markdown table.

    The first row is the float model, with which the others are compared.
    """
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
    is_base = row is base
    ratios = []
    for text in texts:
        ratio = math.log(row.perplexity[text] / base.perplexity[text])
        ratios.append(BLANK if is_base else f"{ratio:.3f}")
    return [
        row.method,
        str(row.bits),
        BLANK if row.group_size is None else str(row.group_size),
        f"{row.bits_per_weight:.3f}",
        f"{row.size / 1e6:.1f}",
        *[f"{row.perplexity[text]:.2f}" for text in texts],
        *ratios,
        BLANK if is_base else f"{row.seconds:.1f}",
    ]


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of a Markdown table whose columns are aligned as plain text, too.

    The first column stands on the left, the others on the right.
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        for cell, width in zip(cells[1:], widths[1:], strict=True):
            padded.append(cell.rjust(width))
        return f"| {' | '.join(padded)} |"

    # A colon at the right end tells Markdown to align a column there.
    dashes = ["-" * (widths[0] + 2)]
    for width in widths[1:]:
        dashes.append("-" * (width + 1) + ":")
    rule = f"|{'|'.join(dashes)}|"
    return [line(titles), rule, *map(line, rows)]
