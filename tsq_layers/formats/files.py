"""The tensors of a checkpoint directory, read one by one from one or several safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tsq_layers.errors import CheckpointError

_INDEX = "model.safetensors.index.json"


class TensorFiles:
    """The tensors of a directory, by name.

    Args:
        directory: with ``model.safetensors``, or an index of several files, or files without an index.

    Attributes:
        keys: names of all tensors.

    Raises:
        CheckpointError: no files, or one that cannot be read.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"a": torch.ones(2)}, f"{folder}/model.safetensors")
        ...     files = TensorFiles(Path(folder))
        ...     sorted(files.keys), files.take("a")
        (['a'], tensor([1., 1.]))
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        for file in self._files():
            self._places |= dict.fromkeys(self._open(file).keys(), file)
        self.keys = frozenset(self._places)

    def take(self, key: str) -> Tensor:
        """A tensor, on the CPU.

        Raises:
            CheckpointError: there is none of that name.
        """
        if key not in self._places:
            raise CheckpointError(
                f"tensor {key!r} is missing in {self._directory}; copy the whole directory again"
            )
        tensor: Tensor = self._open(self._places[key]).get_tensor(key)
        return tensor

    def _files(self) -> list[str]:
        index = self._directory / _INDEX
        if index.exists():
            places = json_object(index).get("weight_map")
            if not isinstance(places, dict) or not all(
                isinstance(file, str) for file in places.values()
            ):
                raise CheckpointError(
                    f"{index} has no weight_map of tensors and files; copy the whole directory again"
                )
            return sorted(set(places.values()))
        files = sorted(file.name for file in self._directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{self._directory} holds no safetensors files: give the directory of a checkpoint"
            )
        return ["model.safetensors"] if "model.safetensors" in files else files

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(self._directory / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self._directory / file} cannot be read: {error}; copy the whole directory again"
                ) from error
        return self._opened[file]


def json_object(path: Path) -> Mapping[str, Any]:
    """A JSON object in a file.

    Raises:
        CheckpointError: no such file, or something else in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; give the directory of a checkpoint"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object; give the directory of a checkpoint")
    return found
