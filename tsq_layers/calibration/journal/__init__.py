"""A calibration on disk, so that one that was killed goes on from its last solved layer.

A directory holds ``journal.json``, which says what the run depends on (:class:`Fingerprint`), and one
safetensors file for every stage: packed matrices, their specifications and reports. Every file is
written whole or not at all, its SHA-256 is known, and one process uses the directory at a time.
Nothing in it is ever executed.
"""

from tsq_layers.calibration.journal.digests import (
    HELD_OUT,
    fingerprint_batch,
    fingerprint_data,
    fingerprint_weights,
)
from tsq_layers.calibration.journal.fingerprint import Fingerprint
from tsq_layers.calibration.journal.store import Journal, Restored

__all__ = [
    "HELD_OUT",
    "Fingerprint",
    "Journal",
    "Restored",
    "fingerprint_batch",
    "fingerprint_data",
    "fingerprint_weights",
]
