"""Run cases, each by itself, in several processes of one thread each."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.proof.cases import all_cases
from benchmarks.proof.record import Record

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Outcome:
    """What a case left, how long it took, and what was raised in it."""

    name: str
    hashes: dict[str, str]
    seconds: float
    error: str = ""


def run_all(names: Sequence[str], processes: int) -> tuple[dict[str, str], list[str]]:
    """Run cases by their names; all hashes, and the names of those that failed."""
    os.environ.update(_ONE_THREAD)
    context = multiprocessing.get_context("spawn")
    hashes: dict[str, str] = {}
    failed = []
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start) as pool:
        for done, outcome in enumerate(pool.map(run_one, names), 1):
            hashes |= outcome.hashes
            print(f"{done}/{len(names)}  {outcome.seconds:6.2f} s  {outcome.name}", flush=True)
            if outcome.error:
                failed.append(outcome.name)
                print(outcome.error, flush=True)
    return hashes, failed


def _start() -> None:
    """Make a process ready: one thread, and no progress of others."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def run_one(name: str) -> Outcome:
    """Run one case, from the same random numbers each time."""
    case, started, error = all_cases()[name], time.perf_counter(), ""
    torch.manual_seed(0)
    stance: Any = nullcontext() if case.compiles else torch.compiler.set_stance("force_eager")
    with tempfile.TemporaryDirectory(prefix="proof-") as folder, stance:
        record = Record(name, Path(folder))
        try:
            with record.watched():
                case.run(record)
        except Exception as raised:  # noqa: BLE001 (the other cases are still to be run)
            error = traceback.format_exc()
            record.text("error", f"{type(raised).__name__}: {raised}")
    return Outcome(name, record.hashes, time.perf_counter() - started, error)
