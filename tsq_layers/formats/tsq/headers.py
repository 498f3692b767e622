"""Read names, dtypes, shapes and metadata of a directory's files, before any tensor is read."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tsq_layers.errors import CheckpointError
from tsq_layers.formats.tsq.description import (
    DESCRIPTION_DIGEST,
    DESCRIPTION_FILE,
    TENSORS_FILE,
    Description,
    TensorSpec,
)
from tsq_layers.formats.tsq.outline import QUANT_METHOD, Outline
from tsq_layers.reports import Report

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
REPORT = "tsq_report"
AGAIN = "copy the whole directory again, or save the model again"

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


def tensor_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: one, or those that an index names.

    Raises:
        CheckpointError: the index cannot be read.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        return [directory / TENSORS_FILE]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [directory / name for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{INDEX_FILE} in {directory} cannot be read: {error}; {AGAIN}"
        ) from error


def is_described(directory: Path) -> bool:
    """Return whether ``tsq.json`` describes a directory.

    It does not if something else has written its tensors anew since.
    """
    if not (directory / DESCRIPTION_FILE).exists():
        return False
    file = directory / TENSORS_FILE
    try:
        with safe_open(file, framework="pt") as opened:
            return DESCRIPTION_DIGEST in (opened.metadata() or {})
    except FileNotFoundError:
        return not (directory / INDEX_FILE).exists()
    except (OSError, SafetensorError):
        return True  # whoever reads it says what is the matter


def read_headers(files: Iterable[Path]) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Every tensor of some files, and their metadata.

    Raises:
        CheckpointError: a file that is missing, damaged or incomplete.
    """
    specs: dict[str, TensorSpec] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
                for key in opened.keys():  # noqa: SIM118  (not a mapping)
                    tensor = opened.get_slice(key)
                    code = str(tensor.get_dtype())
                    specs[key] = TensorSpec(
                        dtype=_DTYPES.get(code, code), shape=tuple(tensor.get_shape())
                    )
        except FileNotFoundError:
            raise CheckpointError(f"no {file.name} in {file.parent}; {AGAIN}") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file.name} in {file.parent} cannot be read, it is damaged or incomplete: {error}; {AGAIN}"
            ) from error
    return specs, metadata


def outlined(directory: Path) -> Outline | None:
    """Return ``quantization_config`` of a directory's ``config.json``, if it is of this library.

    Raises:
        CheckpointError: it is, and cannot be used.
    """
    try:
        values = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")).get(
            "quantization_config"
        )
    except (OSError, ValueError, AttributeError):
        return None
    if not isinstance(values, Mapping) or values.get("quant_method") != QUANT_METHOD:
        return None
    return Outline.from_dict(values)


def description_from_headers(directory: Path, outline: Outline) -> Description:
    """The description of a directory that has an outline in ``config.json`` in the place of ``tsq.json``."""
    specs, metadata = read_headers(tensor_files(directory))
    tensors = {key: spec for key, spec in specs.items() if key not in outline.placeholders}
    report = Report.from_dict(json.loads(metadata[REPORT])) if REPORT in metadata else None
    return Description(
        layers=outline.layers,
        composites=outline.composites,
        aliases=present_aliases(outline.aliases, tensors),
        tensors=tensors,
        report=report,
        library_version="",
        placeholders=[key for key in outline.placeholders if key in specs],
    )


def present_aliases(aliases: Mapping[str, str], stored: Mapping[str, object]) -> dict[str, str]:
    """Key → stored key, for every key that shares the tensor of a stored one; of these, either name may be stored.

    Example:
        >>> present_aliases({"head": "table"}, {"head": None})
        {'table': 'head'}
    """
    names: dict[str, list[str]] = {}
    for alias, key in aliases.items():
        names.setdefault(key, [key]).append(alias)
    found: dict[str, str] = {}
    for group in names.values():
        holder = next((name for name in group if name in stored), None)
        if holder is not None:
            found.update({name: holder for name in group if name not in stored})
    return found
