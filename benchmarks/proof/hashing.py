"""Hashes of tensors, JSON values and files, of that in them which is no time, version or place."""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_DIGITS = 16

# Times, and the configuration: it went in, and the form in which it is written is not a number.
_LEFT_OUT = ("seconds", "config", "not_counted")

_PATH = re.compile(re.escape(tempfile.gettempdir()) + r"[^\s'\",:;)]*")
_VERSION = re.compile(r"\b(tsq_layers)[ :=]+v?[0-9][\w.+-]*")
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")  # of a text that holds times and versions
_TIME = re.compile(r"\b[0-9][0-9.]* (s|min|h)\b")
_ADDRESS = re.compile(r"\b0x[0-9a-f]+\b")


def of_bytes(content: bytes) -> str:
    """Hash bytes.

    Example:
        >>> of_bytes(b"")
        'e3b0c44298fc1c14'
    """
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


def of_tensors(tensors: Mapping[str, Tensor | None]) -> str:
    """Hash names, dtypes, shapes and bytes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor is None:
            total.update(f"{name} none\n".encode())
            continue
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:_DIGITS]


def of_text(text: str) -> str:
    """Hash a text."""
    return of_bytes(plain_text(text).encode())


def of_json(values: Any) -> str:
    """Hash a JSON value."""
    return of_bytes(json.dumps(plain(values), sort_keys=True).encode())


def plain_text(text: str) -> str:
    """Take places, versions, times, digests and addresses out of a text.

    Example:
        >>> plain_text("by tsq_layers 0.1.0 at 0x7f00")
        'by tsq_layers at ADDRESS'
    """
    text = _PATH.sub("PATH", text)
    # Names for extenders moved from the package itself into its part for layers.
    text = text.replace("tsq_layers.layers.", "tsq_layers.")
    text = _VERSION.sub(r"\1", text)
    text = _DIGEST.sub("DIGEST", text)
    text = _TIME.sub("TIME", text)
    return _ADDRESS.sub("ADDRESS", text)


def plain(value: Any) -> Any:
    """Take the same, and what is left out, out of a JSON value, and of JSON in strings of it.

    Example:
        >>> plain({"seconds": 1.5, "losses": [0.5], "library_version": "0.1.0"})
        {'losses': [0.5]}
    """
    if isinstance(value, Mapping):
        kept = [key for key in value if not _is_left_out(str(key))]
        return {str(key): plain(value[key]) for key in kept}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, str):
        return plain(json.loads(value)) if value.startswith("{") else plain_text(value)
    return value


def _is_left_out(key: str) -> bool:
    return key in _LEFT_OUT or key.endswith(("version", "versions", "sha256"))


def of_folder(folder: Path) -> dict[str, str]:
    """Hash every file below a folder: a key for each, two where tensors and metadata are apart."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found |= _of_file(path, path.relative_to(folder).as_posix())
    return found


def _of_file(path: Path, name: str) -> dict[str, str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            tensors = {key: file.get_tensor(key) for key in names}
            metadata = file.metadata() or {}
        return {f"{name}/tensors": of_tensors(tensors), f"{name}/metadata": of_json(metadata)}
    if path.suffix == ".json":
        return {name: of_json(json.loads(path.read_text(encoding="utf-8")))}
    return {name: of_bytes(path.read_bytes())}
