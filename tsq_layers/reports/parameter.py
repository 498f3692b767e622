"""Describe one parameter of the float model as a frozen value, with JSON both ways."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from tsq_layers.config.json_fields import checked_fields
from tsq_layers.errors import CheckpointError

ParameterStatus = Literal["quantized", "partly quantized", "kept"]


@dataclass(frozen=True, kw_only=True)
class ParameterReport:
    """A description of how much of one parameter was quantised, and why not more.

    Args:
        name: dotted name in the float model; the first one, if several modules share it.
        shape: of the float parameter.
        dtype: of the float parameter, without ``"torch."``, for example ``"bfloat16"``.
        quantized: number of its entries that were quantised.
        reason: why the others were not, for example ``"bias"``; ``""`` if all were.
        layers: names of the layers that it belongs to.

    Raises:
        ValueError: a dtype that torch does not know, more quantised entries than there are, or
            entries that were kept without a reason.

    Example:
        >>> experts = ParameterReport(
        ...     name="experts", shape=(8, 4, 16), dtype="float32", quantized=320, reason="3 of 8 experts never called"
        ... )
        >>> experts.numel, experts.bytes, experts.kept, experts.status
        (512, 2048, 192, 'partly quantized')
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantized: int
    reason: str = ""
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "layers", tuple(self.layers))
        is_dtype = isinstance(getattr(torch, self.dtype, None), torch.dtype)
        if not is_dtype:
            raise ValueError(
                f"parameter {self.name!r}: dtype={self.dtype!r}; give the name of a torch dtype"
            )
        if not 0 <= self.quantized <= self.numel:
            raise ValueError(
                f"parameter {self.name!r}: quantized={self.quantized}; give 0 to {self.numel}"
            )
        if self.kept and not self.reason:
            raise ValueError(
                f"parameter {self.name!r}: {self.kept} entries were kept without a reason; give one"
            )

    @property
    def numel(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """Return the number of entries that were not quantised."""
        return self.numel - self.quantized

    @property
    def itemsize(self) -> int:
        """Return the bytes of an entry in the float model."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize

    @property
    def bytes(self) -> int:
        """Return the bytes in the float model."""
        return self.numel * self.itemsize

    @property
    def status(self) -> ParameterStatus:
        """Return ``"quantized"``, ``"partly quantized"`` or ``"kept"``."""
        if not self.quantized:
            return "kept"
        return "partly quantized" if self.kept else "quantized"

    def to_dict(self) -> dict[str, Any]:
        """Return the parameter as plain JSON values."""
        return {**dataclasses.asdict(self), "shape": list(self.shape), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Return the report that :meth:`to_dict` has written.

        Raises:
            CheckpointError: unknown keys, or values that are not allowed.
        """
        checked = checked_fields(cls, values, "a parameter of the report")
        where = f"a parameter of the report, {checked['name']!r}"
        if not all(type(size) is int and size >= 0 for size in checked["shape"]):
            raise CheckpointError(f"{where}: shape={checked['shape']!r} is not a list of sizes")
        if not all(isinstance(layer, str) for layer in checked.get("layers", ())):
            raise CheckpointError(f"{where}: layers={checked['layers']!r} is not a list of names")
        try:
            return cls(**checked)
        except ValueError as error:
            raise CheckpointError(
                f"{error}; the report was changed by hand or by another program"
            ) from None
