"""What was run where: the part of the file that is not compared."""

import platform
from pathlib import Path

import torch
import transformers

from benchmarks.proof import library


def header() -> dict[str, str]:
    """Say which versions made the hashes, and on which processor."""
    return {
        "tsq_layers": library.version(),
        "commit": library.commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
