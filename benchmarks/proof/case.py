"""A case: a name, and what it records."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.proof.record import Record


@dataclass(frozen=True)
class Case:
    """Something that is done with the library in a state of its own.

    Args:
        name: parts divided by slashes; the keys of its hashes begin with it.
        run: does it, and records what comes of it.
        compiles: whether ``torch.compile`` really compiles in it.
    """

    name: str
    run: Callable[[Record], None]
    compiles: bool = False
