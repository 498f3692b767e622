"""One stage as a file: what was solved together, with the SHA-256 of the whole file in its name.

The tensors are called ``<place in the stage>.<buffer>``; the metadata hold, as JSON under
``tsq_journal``, the digest of the run, the number of the stage, and name, specification and report
of every layer. A bias is not stored: the float layer has it.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tsq_layers.errors import CheckpointError
from tsq_layers.numerics.weight import BufferSpec
from tsq_layers.reports import LayerReport
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.spec import LayerSpec

_NAME = re.compile(r"stage-(\d{6,})-([0-9a-f]{64})\.safetensors")
_METADATA = "tsq_journal"


@dataclass(frozen=True)
class Entry:
    """One layer of a stage file: its name, its place in the file, how to build it, and what happened to it."""

    name: str
    path: Path
    index: int
    spec: LayerSpec
    report: LayerReport

    def load(self) -> QuantLinear:
        """The packed matrix, on the CPU and without a bias; only its own tensors are read.

        Raises:
            CheckpointError: the file is not what it was when it was checked.
        """
        layer = self.spec.build(self.name, self.path.name)
        try:
            with safe_open(self.path, framework="pt") as file:
                for name, spec in self.spec.buffers().items():
                    tensor = file.get_tensor(f"{self.index}.{name}")
                    setattr(layer, name, _fitting(tensor, spec))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"layer {self.name!r} cannot be read from {self.path}: {error}; start again"
            ) from error
        layer.dtype_marker = torch.empty(0, dtype=layer.dtype)
        return layer


def encode(
    solved: Mapping[str, tuple[QuantLinear, LayerReport]], number: int, run: str
) -> tuple[str, bytes]:
    """Name and content of the file of a stage.

    Args:
        solved: layer name → packed matrix, on any device, and its report.
        number: of the stage, from 0.
        run: digest of the fingerprint.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, (name, (layer, report)) in enumerate(solved.items()):
        spec = dataclasses.replace(LayerSpec.of(layer), bias=False)
        layers.append({"name": name, "spec": spec.to_dict(), "report": report.to_dict()})
        for buffer in spec.buffers():
            # Copied: layers of a stack may be slices of one tensor, which safetensors refuses.
            tensors[f"{index}.{buffer}"] = (
                getattr(layer, buffer).detach().to("cpu", copy=True).contiguous()
            )
    metadata = json.dumps({"run": run, "stage": number, "layers": layers}, allow_nan=False)
    content = save(
        tensors, {_METADATA: metadata}
    )  # one key: safetensors writes several in random order
    return _file_name(number, hashlib.sha256(content).hexdigest()), content


def find(directory: Path) -> dict[int, list[Path]]:
    """Number of a stage → the files that their names say to be of it."""
    paths: dict[int, list[Path]] = {}
    for path in sorted(directory.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match:
            paths.setdefault(int(match[1]), []).append(path)
    return paths


def decode(path: Path, number: int, run: str) -> list[Entry]:
    """The layers of a stage file, after a look at every byte of it; tensors are loaded later.

    Raises:
        CheckpointError: the file is damaged, or belongs to another run or place.
        OSError: it cannot be read, which need not mean damage.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.name != _file_name(number, digest):
        raise CheckpointError("its content is not what was written")
    try:
        with safe_open(path, framework="pt") as opened:
            values = json.loads(opened.metadata()[_METADATA])
        of_this_run = (values["run"], values["stage"]) == (run, number)
        entries = [_entry(path, index, layer) for index, layer in enumerate(values["layers"])]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"it cannot be understood ({error})") from error
    if not of_this_run:
        raise CheckpointError("it belongs to another run")
    return entries


def _file_name(number: int, digest: str) -> str:
    return f"stage-{number:06d}-{digest}.safetensors"


def _entry(path: Path, index: int, values: Mapping[str, Any]) -> Entry:
    spec = LayerSpec.from_dict(values["spec"], values["name"], path.name)
    return Entry(values["name"], path, index, spec, LayerReport.from_dict(values["report"]))


def _fitting(tensor: Tensor, spec: BufferSpec) -> Tensor:
    """A copy of a stored tensor, if it has the dtype and shape that its layer needs."""
    if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
        raise ValueError(
            f"{tensor.dtype} {list(tensor.shape)} is stored where {spec.dtype} {list(spec.shape)} is needed"
        )
    return tensor.clone()  # what safetensors gives is a map of the file
