"""The same cases on another commit: its library, this script."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.proof.comparing import compare

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent


def check(commit: str, options: Sequence[str]) -> int:
    """Run the cases on a commit and on this tree, and compare; 1 if a key differs, else 0."""
    with tempfile.TemporaryDirectory(prefix="proof-check-") as temporary:
        tree = Path(temporary, "tree")
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            # A copy of this script in that tree finds the library of that tree.
            place = tree / _HERE.relative_to(_ROOT)
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(_HERE, place, ignore=shutil.ignore_patterns("__pycache__"))
            before = _run(tree, Path(temporary, "before.json"), options)
        finally:
            _git("worktree", "remove", "--force", str(tree))
        after = _run(_ROOT, Path(temporary, "after.json"), options)
        return compare(before, after)


def _run(tree: Path, out: Path, options: Sequence[str]) -> Path:
    command = [sys.executable, "-m", "benchmarks.proof", "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    # A case that fails leaves a hash of what was raised, which is compared like any other.
    subprocess.run(command, cwd=tree, env=environment, check=False)  # noqa: S603
    if not out.exists():
        raise FileNotFoundError(f"the cases left no hashes in {tree}")
    return out


def _git(*arguments: str) -> None:
    command = ["git", "-C", str(_ROOT), *arguments]
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603
