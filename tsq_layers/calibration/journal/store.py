"""`Journal`: the directory of one calibration, from opening it to its last stage."""

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tsq_layers.calibration.journal import files
from tsq_layers.calibration.journal import record as stage
from tsq_layers.calibration.journal.fingerprint import (
    START_AGAIN,
    Fingerprint,
    differences,
    read,
    text,
)
from tsq_layers.errors import CheckpointError, JournalWarning, StateError
from tsq_layers.reports import LayerReport
from tsq_layers.runtime.linear import QuantLinear

JOURNAL_FILE = "journal.json"

_MOST_SHOWN = 5


class Restored(Mapping[str, tuple[QuantLinear, LayerReport]]):
    """Layer name → packed matrix and report. A matrix is read from disk each time it is asked for, and not kept.

    Raises:
        CheckpointError: on access, if a file was changed after the journal was opened.
    """

    def __init__(self, entries: Iterable[stage.Entry]) -> None:
        self._entries = {entry.name: entry for entry in entries}

    def __getitem__(self, name: str) -> tuple[QuantLinear, LayerReport]:
        entry = self._entries[name]
        return entry.load(), entry.report

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


class Journal:
    """Solved layers of a calibration on disk; opens a directory or makes it.

    A stage that was written is there after SIGKILL and after a power cut. A stage file that is
    damaged all the same counts as not solved, and so does every stage after it, for these were
    solved with its result; they are removed, with a warning.

    Args:
        directory: of one calibration; made, with its parents, if it does not exist.
        fingerprint: what this run depends on. Without ``data``, :meth:`check_data` must follow.

    Raises:
        CheckpointError: the directory belongs to another run (every difference is named) or holds other
            files; its ``journal.json`` is damaged or of another version; it cannot be read or written.
            Nothing in the directory but its lock file is changed then.
        StateError: another run uses the directory.

    Warns:
        JournalWarning: a stage is damaged; when the data are checked.

    Example:
        >>> import tempfile
        >>> report = LayerReport(name="fc", kind="Linear", rows=8, columns=16, status="quantized")
        >>> matrix = QuantLinear(16, 8, bits=2, group_size=8, bias=False)
        >>> run = Fingerprint(config={"bits": 2}, layers={"fc": {}}, options={}, data=("ab",))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with Journal(directory, run) as journal:
        ...         journal.write({"fc": (matrix, report)})
        ...     with Journal(directory, run) as journal:  # in another process
        ...         list(journal.restored), journal.restored["fc"][1] == report
        (['fc'], True)
    """

    def __init__(self, directory: str | os.PathLike[str], fingerprint: Fingerprint) -> None:
        self.directory = Path(directory)
        self._fingerprint = fingerprint
        self._restored: Restored | None = None
        self._names: set[str] = set()
        self._count = 0
        self._lock: files.Lock | None = None
        try:
            with self._disk():
                _make(self.directory)
                self._lock = files.Lock(self.directory)
                self._open()
        except BaseException:
            self.close()
            raise

    def check_data(self, data: Sequence[str]) -> None:
        """Say what the data are, as :func:`fingerprint_data` does; nothing is restored or written before.

        Raises:
            CheckpointError: the directory was made with other data; every difference is named.
            StateError: the journal is closed.

        Warns:
            JournalWarning: a stage is damaged.
        """
        self._check_open()
        current = replace(self._fingerprint, data=tuple(data))
        self._check_same(self._fingerprint, current)
        if self._restored is not None:
            return
        with self._disk():
            fingerprint = read(self.directory / JOURNAL_FILE)
            self._check_same(fingerprint, current)
            if fingerprint.data is None:
                files.write(self.directory / JOURNAL_FILE, text(current).encode())
            self._fingerprint = current if fingerprint.data is None else fingerprint
            self._restored = Restored(self._entries(self._fingerprint.digest()))
        self._names = set(self._restored)

    @property
    def restored(self) -> Restored:
        """Layers that earlier runs have solved, in their order: name → packed matrix (CPU, no bias), report.

        Raises:
            StateError: the data were not checked yet: call :meth:`check_data`.
        """
        if self._restored is None:
            raise StateError(
                "nothing is restored before the data are known to be the same: call check_data first"
            )
        return self._restored

    def write(self, solved: Mapping[str, tuple[QuantLinear, LayerReport]]) -> None:
        """Add one stage, all of it or nothing; on return it is on the disk.

        Args:
            solved: name → packed matrix, on any device, and report. A bias is not stored.

        Raises:
            CheckpointError: the disk is full or gone; all stages before stay as they are.
            StateError: the journal is closed, the data were not checked, or a layer is in the journal
                already or not in the fingerprint.
        """
        self._check_open()
        if self._restored is None:
            raise StateError(
                "nothing can be written before the data are known: call check_data first"
            )
        for name in solved:
            if name in self._names or name not in self._fingerprint.layers:
                problem = (
                    "is in the journal already"
                    if name in self._names
                    else "is not a layer of this run"
                )
                raise StateError(f"{name!r} {problem}; write every solved layer of the run once")
        if solved:
            name, content = stage.encode(solved, self._count, self._fingerprint.digest())
            with self._disk():
                files.write(self.directory / name, content)
            self._count += 1
            self._names |= solved.keys()

    def close(self) -> None:
        """Let others use the directory. What was written stays; a journal that is closed can be opened anew."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        path = self.directory / JOURNAL_FILE
        if path.exists():
            self._check_same(read(path), self._fingerprint)
        else:
            files.write(path, text(self._fingerprint).encode())
            files.sync_directory(self.directory.parent)
        (self.directory / files.TEMPORARY).unlink(missing_ok=True)
        if self._fingerprint.data is not None:
            self.check_data(self._fingerprint.data)

    def _check_open(self) -> None:
        if self._lock is None:
            raise StateError(f"the journal in {self.directory} is closed; open a new one")

    def _check_same(self, saved: Fingerprint, current: Fingerprint) -> None:
        messages = differences(saved, current)
        if messages:
            more = (
                f"; and {len(messages) - _MOST_SHOWN} more differences"
                if len(messages) > _MOST_SHOWN
                else ""
            )
            raise CheckpointError(
                f"checkpoint_dir {self.directory} (there) is of another run than this one (here): "
                f"{'; '.join(messages[:_MOST_SHOWN])}{more}. To go on with it, start the same run "
                f"again; else {START_AGAIN}"
            )

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot use checkpoint_dir {self.directory}: {error}; give a directory that can "
                "be written and has room. "
                "What was solved before is kept: start again to go on"
            ) from error

    def _entries(self, run: str) -> list[stage.Entry]:
        """Return the layers of all records up to the first that is not as it was written.

        The files from there on are removed.
        """
        paths = stage.find(self.directory)
        entries: dict[str, stage.Entry] = {}
        while any(number >= self._count for number in paths):
            try:
                added = self._checked(paths.get(self._count, []), run, entries)
            except CheckpointError as error:
                self._drop(
                    [path for number in paths if number >= self._count for path in paths[number]],
                    str(error),
                )
                break
            entries |= {entry.name: entry for entry in added}
            self._count += 1
        return list(entries.values())

    def _checked(
        self, paths: Sequence[Path], run: str, before: Collection[str]
    ) -> list[stage.Entry]:
        if len(paths) != 1:
            raise CheckpointError("its file is missing" if not paths else "it has several files")
        entries = stage.decode(paths[0], self._count, run)
        for name in (entry.name for entry in entries):
            if name not in self._fingerprint.layers or name in before:
                raise CheckpointError(
                    f"it holds {name!r}, which is not a layer of this run or was solved before"
                )
        return entries

    def _drop(self, paths: Sequence[Path], reason: str) -> None:
        warnings.warn(
            f"stage {self._count} in {self.directory} is damaged: {reason}; it and all later stages "
            f"({len(paths)} files) are removed and solved again",
            JournalWarning,
            stacklevel=4,
        )
        for path in sorted(
            paths, reverse=True
        ):  # the last first: what is left after a kill is still a beginning
            path.unlink()
        files.sync_directory(self.directory)


def _make(directory: Path) -> None:
    """Make the directory, or see that it is empty or a journal."""
    directory.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in directory.iterdir()} - {files.LOCK_FILE, files.TEMPORARY}
    if others and JOURNAL_FILE not in others:
        raise CheckpointError(
            f"checkpoint_dir {directory} holds {min(others)!r} and no {JOURNAL_FILE}, so that it "
            "is not of a calibration; "
            "give an empty directory, or one that does not exist"
        )
