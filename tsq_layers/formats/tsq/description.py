"""Describe a saved model: ``tsq.json``, and the names of tensors in ``model.safetensors``."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from tsq_layers.config.json_fields import checked_fields
from tsq_layers.errors import CheckpointError
from tsq_layers.numerics.memory import dtype_name
from tsq_layers.reports import Report
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.spec import LayerSpec

__all__ = [
    "DESCRIPTION_DIGEST",
    "DESCRIPTION_FILE",
    "FORMAT",
    "NON_PERSISTENT",
    "SCHEMA_VERSION",
    "TENSORS_FILE",
    "Description",
    "Entry",
    "LayerSpec",
    "TensorSpec",
    "entries",
    "header_digest",
]

FORMAT = "tsq_layers"
SCHEMA_VERSION = 1
DESCRIPTION_FILE = "tsq.json"
TENSORS_FILE = "model.safetensors"
DESCRIPTION_DIGEST = (
    "tsq_description_sha256"  # in the metadata of the tensors file, whose description it belongs to
)
NON_PERSISTENT = "non_persistent:"

_SECTIONS: dict[str, tuple[type, ...]] = {
    "library_version": (str,),
    "header_sha256": (str,),
    "layers": (dict,),
    "composites": (list,),
    "aliases": (dict,),
    "tensors": (dict,),
    "report": (dict, type(None)),
    "placeholders": (list,),
}
_DAMAGED = "the file is damaged or was changed by hand; save the model again"


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter or buffer of a model: its key in the tensors file, and where it sits in the model."""

    key: str
    owner: nn.Module
    local: str
    tensor: Tensor


def entries(model: nn.Module, prefix: str = "") -> Iterator[Entry]:
    """Every parameter and buffer under every name that it has.

    Left out are the buffers of a quantised layer that are not persistent: they are empty, and
    follow from its specification.
    """
    for name, module in model.named_modules(prefix=prefix, remove_duplicate=False):
        dot = f"{name}." if name else ""
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield Entry(dot + local, module, local, parameter)
        for local, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            persistent = local not in module._non_persistent_buffers_set
            if persistent or not isinstance(module, QuantLinear):
                yield Entry(
                    dot + local if persistent else NON_PERSISTENT + dot + local,
                    module,
                    local,
                    buffer,
                )


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Dtype and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """The specification of a tensor."""
        return cls(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything that ``tsq.json`` says.

    Args:
        layers: dotted name → specification of a quantised layer; ``""`` if the model is the layer.
        composites: names of the modules that were split into plain layers.
        aliases: key → key of the stored tensor that it shares.
        tensors: key → specification, for every tensor in the tensors file.
        report: what happened to every layer; ``None`` if the model was put together by hand.
        library_version: version of this library that wrote it.
        header_sha256: digest of the header of the tensors file that belongs to this description.
        placeholders: keys of empty tensors in the tensors file, which belong to no layer.
    """

    layers: Mapping[str, LayerSpec]
    composites: Sequence[str]
    aliases: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    report: Report | None
    library_version: str
    header_sha256: str = ""
    placeholders: Sequence[str] = ()

    def canonical(self, key: str) -> str:
        """The key under which the tensor of ``key`` is stored."""
        return self.aliases.get(key, key)

    def digest(self) -> str:
        """SHA-256 of all but ``header_sha256``; the tensors file carries it, so that no two saves can be mixed up."""
        return hashlib.sha256(
            dataclasses.replace(self, header_sha256="").to_json().encode()
        ).hexdigest()

    def to_json(self) -> str:
        """The text of ``tsq.json``."""
        values = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "library_version": self.library_version,
            "header_sha256": self.header_sha256,
            "layers": {name: spec.to_dict() for name, spec in self.layers.items()},
            "composites": list(self.composites),
            "aliases": dict(self.aliases),
            "tensors": {
                key: {"dtype": spec.dtype, "shape": list(spec.shape)}
                for key, spec in self.tensors.items()
            },
            "report": None if self.report is None else self.report.to_dict(),
        }
        if self.placeholders:
            values["placeholders"] = list(self.placeholders)
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`.

        Raises:
            CheckpointError: not JSON, of another format or version, or unknown, missing or ill-typed keys.
        """
        values = _sections(text)
        layers = {
            name: LayerSpec.from_dict(spec, name, DESCRIPTION_FILE)
            for name, spec in values["layers"].items()
        }
        tensors = {key: _tensor_spec(key, spec) for key, spec in values["tensors"].items()}
        for alias, key in values["aliases"].items():
            if alias in tensors or not isinstance(key, str) or key not in tensors:
                raise CheckpointError(
                    f"{DESCRIPTION_FILE}: alias {alias!r} of {key!r} does not lead to a stored tensor; {_DAMAGED}"
                )
        report = None if values["report"] is None else Report.from_dict(values["report"])
        return cls(**{**values, "layers": layers, "tensors": tensors, "report": report})


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, so that the same model gives the same bytes.

    safetensors writes them in random order.
    """
    with file.open("rb+") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = (
            json.dumps(header, separators=(",", ":"), ensure_ascii=False)
            .encode("utf-8")
            .ljust(length)
        )
        if (
            len(text) == length
        ):  # not so if safetensors escapes a rare character in another way: then the order stays
            handle.seek(8)
            handle.write(text)


def header_digest(path: Path) -> str:
    """SHA-256 of the header of a safetensors file: 8 bytes of length, then that many bytes of JSON."""
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def _sections(text: str) -> dict[str, Any]:
    """The top level of ``tsq.json``, checked, without format and version."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{DESCRIPTION_FILE} is not JSON: {error}; {_DAMAGED}") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise CheckpointError(
            f'{DESCRIPTION_FILE} does not say "format": "{FORMAT}": this is not a checkpoint of '
            "tsq.save; give the directory that tsq.save wrote"
        )
    version = values.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{DESCRIPTION_FILE} has schema_version={version!r}, written by tsq_layers "
            f"{values.get('library_version', '?')}; "
            f"this version reads {SCHEMA_VERSION}: upgrade tsq_layers, or save the model again"
        )
    for key in ("composites", "placeholders"):  # files written before there were any
        values.setdefault(key, [])
    for key, value in values.items():
        if key not in _SECTIONS or not isinstance(value, _SECTIONS[key]):
            problem = (
                "has unknown key" if key not in _SECTIONS else f"has a {type(value).__name__} under"
            )
            raise CheckpointError(f"{DESCRIPTION_FILE} {problem} {key!r}; {_DAMAGED}")
    missing = [key for key in _SECTIONS if key not in values]
    if missing:
        raise CheckpointError(f"{DESCRIPTION_FILE} lacks key {missing[0]!r}; {_DAMAGED}")
    return values


def _tensor_spec(key: str, spec: object) -> TensorSpec:
    fields = checked_fields(TensorSpec, spec, f"{DESCRIPTION_FILE}: tensor {key!r}")
    return TensorSpec(dtype=fields["dtype"], shape=tuple(fields["shape"]))
