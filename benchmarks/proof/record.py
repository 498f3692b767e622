"""What one case leaves: keys and hashes, the warnings that it raised among them."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.proof import hashing


class Record:
    """Hashes of one case, under keys that begin with its name.

    Args:
        case: its name.
        folder: an empty one for the files that the case writes.
    """

    def __init__(self, case: str, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.hashes: dict[str, str] = {}

    def note(self, key: str, found: str) -> None:
        """Keep a hash."""
        full = f"{self.case}/{key}"
        assert full not in self.hashes, full
        self.hashes[full] = found

    def tensors(self, key: str, tensors: Mapping[str, Tensor | None]) -> None:
        """Keep the hash of tensors."""
        self.note(key, hashing.of_tensors(tensors))

    def values(self, key: str, values: Any) -> None:
        """Keep the hash of JSON values."""
        self.note(key, hashing.of_json(values))

    def text(self, key: str, text: str) -> None:
        """Keep the hash of a text."""
        self.note(key, hashing.of_text(text))

    def files(self, key: str, folder: Path) -> None:
        """Keep the hashes of all files below a folder."""
        for name, found in hashing.of_folder(folder).items():
            self.note(f"{key}/{name}", found)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep the warnings of the library that are raised inside; those of others do not count."""
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            yield
        own = [warning for warning in raised if _is_own(warning.category)]
        found = sorted(f"{warning.category.__name__}: {warning.message}" for warning in own)
        self.values("warnings", found)


def _is_own(category: type[Warning]) -> bool:
    return any(parent.__name__ == "TSQWarning" for parent in category.__mro__)
