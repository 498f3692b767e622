"""Totals of a conversion, which tables, pictures and pages show."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Figures of a whole model.

    Attributes:
        size_before: bytes of all parameters and buffers of the float model.
        size_after: bytes of those of the converted model.
        paired: whether every batch was passed through the float model as well.
        seconds: wall-clock seconds of the whole run.
        versions: package → version.
        bits_per_weight: stored bits a weight over all quantised layers; ``None`` if there are none.
        share_quantized: share, 0 to 1, of the weights of the listed layers that were quantised.
        coverage: share, 0 to 1, of all entries of all parameters that were quantised.
        byte_coverage: share, 0 to 1, of the bytes of all parameters that were quantised.
    """

    size_before: int
    size_after: int
    paired: bool
    seconds: float
    versions: Mapping[str, str]
    bits_per_weight: float | None
    share_quantized: float
    coverage: float
    byte_coverage: float
