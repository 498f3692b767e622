"""A directory that transformers loads: written beside its final place and renamed at the end; tensors in shards."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tsq_layers.config.versions import library_versions
from tsq_layers.errors import ExportError
from tsq_layers.formats.floats import Stored
from tsq_layers.formats.tsq.description import sort_metadata
from tsq_layers.numerics.memory import dtype_name

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to write in; it becomes ``path`` when the block ends, and vanishes if the block raises.

    Into an empty directory that is there already its files are moved one by one, ``config.json`` as the last.

    Args:
        path: must not exist, or be an empty directory.

    Raises:
        ExportError: there is something at ``path``, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with new_directory(Path(folder, "out")) as new:
        ...         _ = (new / "file").write_text("content")
        ...     Path(folder, "out", "file").read_text()
        'content'
    """
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(
            f"{target} exists and is no empty directory: an export replaces nothing, give another one, or remove it"
        )
    try:
        # An empty directory may be a mounted one, and stays.
        inside = target if target.exists() else target.parent
        inside.mkdir(parents=True, exist_ok=True)
        temporary = inside / f".{target.name}-{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise _not_written(target, error) from error
    try:
        yield temporary
        _settle(temporary)
        if inside == target:
            _fill(target, temporary)
        else:
            temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise _not_written(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is nothing to remove


def _fill(target: Path, folder: Path) -> None:
    """Move all files of a folder into an empty directory, or none."""
    try:
        for made in sorted(folder.iterdir(), key=lambda made: made.name == "config.json"):
            made.replace(target / made.name)
    except OSError:
        for moved in target.iterdir():
            if moved != folder:
                moved.unlink()
        raise


def _not_written(target: Path, error: Exception) -> ExportError:
    return ExportError(
        f"cannot export to {target}: {error}; give a directory that can be written, with room for the model"
    )


def _settle(folder: Path) -> None:
    """Let all files be as readable as their folder (safetensors makes them for their owner only), and on the disk."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())


def byte_count(size: int | str) -> int:
    """Bytes of a size such as ``"5GB"`` (10⁹ bytes each) or ``"500MiB"`` (2²⁰).

    Raises:
        ExportError: no such size.

    Example:
        >>> byte_count("5GB"), byte_count("1.5 MiB"), byte_count(100)
        (5000000000, 1572864, 100)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|)\s*", str(size), re.IGNORECASE)
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if count < 1:
        raise ExportError(
            f"max_shard_size={size!r}: give bytes, or a text such as '5GB' or '500MiB'"
        )
    return count


def write_tensors(folder: Path, tensors: Sequence[Stored], limit: int) -> None:
    """``model.safetensors``, or shards and their index if there is more than ``limit`` bytes.

    Only the tensors of one shard are in memory at a time. A tensor that is larger than ``limit``
    has a shard of its own.
    """
    shards = _shards(tensors, limit)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        places = {
            stored.key: name for name, shard in zip(names, shards, strict=True) for stored in shard
        }
        total = {"total_size": sum(stored.size for stored in tensors)}
        index = {"metadata": total, "weight_map": dict(sorted(places.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    for name, shard in zip(names, shards, strict=True):
        # "format" is what transformers asks for before it opens a file; who has packed the bits, a
        # reader may want to know.
        packer = f"tsq_layers {library_versions()['tsq_layers']}"
        save_file(_made(shard), folder / name, metadata={"format": "pt", "packer": packer})
        sort_metadata(folder / name)


def _shards(tensors: Sequence[Stored], limit: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    filled = 0
    for stored in tensors:
        if shards[-1] and filled + stored.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(stored)
        filled += stored.size
    return shards


def _made(shard: Sequence[Stored]) -> dict[str, Tensor]:
    """The tensors of a shard; safetensors refuses those that share memory, so each has its own."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for stored in shard:
        tensor = stored.make().detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        assert (tensor.dtype, tuple(tensor.shape)) == (stored.dtype, stored.shape), stored.key
        tensors[stored.key] = tensor
    return tensors


def write_description(
    folder: Path, model: nn.Module, quantization: Mapping[str, Any], dtype: Any
) -> None:
    """``config.json`` with a ``quantization_config``, and ``generation_config.json`` if the model has one."""
    config: Any = model.config
    values = json.loads(config.to_json_string())
    values["architectures"] = [type(model).__name__]
    values["dtype"] = dtype_name(dtype)
    values["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", dict(sorted(values.items())))
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file."""
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
