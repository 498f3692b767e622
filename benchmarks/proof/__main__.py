"""The command line: hash, compare, or check against a commit."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.proof.checking import check
from benchmarks.proof.comparing import compare


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is asked for; the exit status."""
    given = _parser().parse_args(arguments)
    if given.compare:
        return compare(*given.compare)
    if given.check:
        options = ["--processes", str(given.processes)]
        options += ["--quick"] if given.quick else []
        options += ["--only", given.only] if given.only else []
        return check(given.check, options)
    return write(given.out, quick=given.quick, only=given.only, processes=given.processes)


def write(out: Path, *, quick: bool, only: str | None, processes: int) -> int:
    """Run the cases and write their hashes; 1 if one of them failed, else 0."""
    # Not above: comparing needs neither the library nor torch.
    from benchmarks.proof.cases import chosen  # noqa: PLC0415
    from benchmarks.proof.header import header  # noqa: PLC0415
    from benchmarks.proof.running import run_all  # noqa: PLC0415

    started, names = time.perf_counter(), chosen(quick=quick, only=only)
    hashes, failed = run_all(names, processes)
    content = {"header": header(), "hashes": dict(sorted(hashes.items()))}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - started
    print(f"{len(names)} cases, {len(failed)} failed, {len(hashes)} keys, {seconds:.0f} s: {out}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="FILE", help="write the hashes of this tree")
    action.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="compare two files")
    action.add_argument("--check", metavar="COMMIT", help="compare this tree with a commit")
    parser.add_argument("--quick", action="store_true", help="a few cases that touch everything")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose names match, as a glob")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
