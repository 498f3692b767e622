"""Describe everything that the result of a calibration depends on, and how two runs differ."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tsq_layers.calibration.journal.digests import HELD_OUT
from tsq_layers.config.json_fields import checked_fields
from tsq_layers.errors import CheckpointError

FORMAT = "tsq_layers calibration"
SCHEMA_VERSION = 3
START_AGAIN = "give another checkpoint_dir, or delete this one to start again"

_ABSENT = object()
_LONGEST = 80  # characters of a value in a message


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything that the result of a calibration depends on. Equal ones give equal results.

    All values are JSON values; tuples in them become lists, so that what was read equals what was written.

    Args:
        config: :meth:`tsq_layers.QuantConfig.to_dict`.
        layers: name of a target → shape, dtype and checksum of its full-precision weight, as
            :func:`fingerprint_weights` gives them.
        tensors: the same of every other parameter and buffer: outputs depend on them as well.
        options: anything else that changes results: paired passes, versions, devices, threads.
        data: digests of the batches, as :func:`fingerprint_data` gives them; ``None`` while they are not known.

    Raises:
        TypeError, ValueError: a value that JSON does not have.

    Example:
        >>> fingerprint = Fingerprint(config={"bits": 3}, layers={}, options={"paired": True}, data=("ab",))
        >>> Fingerprint.from_dict(fingerprint.to_dict()) == fingerprint
        True
    """

    config: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("config", "layers", "options", "tensors"):
            object.__setattr__(
                self, name, json.loads(json.dumps(getattr(self, name), allow_nan=False))
            )
        object.__setattr__(self, "data", None if self.data is None else tuple(self.data))

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as plain JSON values."""
        return {**dataclasses.asdict(self), "data": None if self.data is None else list(self.data)}

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Return the fingerprint that :meth:`to_dict` has written.

        Raises:
            CheckpointError: unknown, missing or ill-typed keys.
        """
        return cls(**checked_fields(cls, values, "the fingerprint"))

    def digest(self) -> str:
        """SHA-256 over everything."""
        return _sha256(self.to_dict())


def text(fingerprint: Fingerprint) -> str:
    """The content of ``journal.json``: the fingerprint, and its SHA-256 so that damage is seen."""
    values = fingerprint.to_dict()
    whole = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "sha256": fingerprint.digest(),
        "fingerprint": values,
    }
    return json.dumps(whole, indent=1) + "\n"


def read(path: Path) -> Fingerprint:
    """Inverse of :func:`text`, from a file.

    Raises:
        CheckpointError: the file is damaged, foreign or of another version.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; {START_AGAIN}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(
            f'{path} does not say "format": "{FORMAT}": it is not of a calibration; {START_AGAIN}'
        )
    if values.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema_version={values.get('schema_version')!r}, this version of "
            f"tsq_layers reads {SCHEMA_VERSION}; {START_AGAIN}"
        )
    if values.get("sha256") != _sha256(values.get("fingerprint")):
        raise CheckpointError(
            f"{path} is damaged: its content is not what was written; {START_AGAIN}"
        )
    return Fingerprint.from_dict(values["fingerprint"])


def differences(saved: Fingerprint, current: Fingerprint) -> list[str]:
    """Every difference between a saved run ("there") and this one ("here"), a few words each; empty if there is none.

    Data are compared where both know them.

    Example:
        >>> saved = Fingerprint(config={"bits": 3}, layers={}, options={})
        >>> differences(saved, Fingerprint(config={"bits": 4}, layers={}, options={"paired": True}))
        ['config.bits is 3 there and 4 here', 'option paired is missing there and True here']
    """
    messages = list(_of_values("config", saved.config, current.config))
    messages += _of_values("option ", saved.options, current.options)
    messages += _of_weights("layer", saved.layers, current.layers)
    messages += _of_weights("tensor", saved.tensors, current.tensors)
    if saved.data is not None and current.data is not None:
        messages += _of_data(saved.data, current.data)
    return messages


def _of_values(path: str, saved: object, current: object) -> Iterator[str]:
    """Differences of JSON values, each with the path that leads to it."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        dot = "" if path.endswith(" ") else "."
        for key in [*saved, *(key for key in current if key not in saved)]:
            step = f"{dot}{key}" if key.isidentifier() else f"[{key!r}]"
            yield from _of_values(path + step, saved.get(key, _ABSENT), current.get(key, _ABSENT))
    elif saved != current or isinstance(saved, bool) != isinstance(current, bool):
        yield f"{path} is {_shown(saved)} there and {_shown(current)} here"


def _of_weights(what: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[str]:
    for name in saved:
        if name not in current:
            yield f"{what} {name!r} is there and not here"
    for name, values in current.items():
        if name not in saved:
            yield f"{what} {name!r} is here and not there"
            continue
        for key in [*saved[name], *(key for key in values if key not in saved[name])]:
            there, here = saved[name].get(key, _ABSENT), values.get(key, _ABSENT)
            if there == here:
                continue
            if key == "checksum":
                yield f"{what} {name!r} has other values"
            else:
                yield f"{what} {name!r}: {key} is {_shown(there)} there and {_shown(here)} here"


def _of_data(saved: tuple[str, ...], current: tuple[str, ...]) -> Iterator[str]:
    for what, held_out in (("batch", False), ("held-out batch", True)):
        there, here = (
            [digest for digest in data if digest.startswith(HELD_OUT) == held_out]
            for data in (saved, current)
        )
        if there != here and sorted(there) == sorted(here):
            yield f"the {what}es come in another order: give them in the same one (a loader must not shuffle)"
            continue
        if len(there) != len(here):
            yield f"the number of {what}es is {len(there)} there and {len(here)} here"
        for index, (one, other) in enumerate(zip(there, here, strict=False)):
            if one != other:
                yield f"{what} {index} is other data"


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "missing"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
