"""Count what a calibration needs for a layer beside the solver: statistics, packed and dense weights.

Observers and packed layers are run on tensors without values, and watched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tsq_layers.calibration.targets import Target
from tsq_layers.layers.kinds import as_it_is, rows_of
from tsq_layers.planning.ledger import Ledger, Work
from tsq_layers.planning.trace import Input


@dataclass(frozen=True)
class Need:
    """Memory and work of one action.

    Attributes:
        kept: bytes that stay when it is done.
        extra: the most bytes beside these while it goes on.
        work: that it does.
        tokens: rows of input that it sees, if it is to observe.
    """

    kept: int
    extra: int
    work: Work
    tokens: int = 0


class Needs:
    """The needs of layers, found on tensors without values; those of equal layers are looked up."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self._known: dict[object, Need] = {}

    def observing(self, target: Target, given: Input, *, paired: bool) -> Need:
        """To see the first call of a layer."""
        alike = None if target.kind.inputs is rows_of else target.name  # others go by the module
        rounding = target.config.activation_bits and (
            target.config.activation_bits,
            target.config.rotation,
        )
        key = "observing", alike, target.shape, given, paired, rounding, target.guidance
        if key not in self._known:
            self._known[key] = self._observing(target, given, paired)
        return self._known[key]

    def dense(self, target: Target) -> Need:
        """To have the quantised weight of a layer as a dense one."""
        key = (
            "dense",
            target.kind.name,
            target.kind.to_matrix is as_it_is,
            target.shape,
            target.weight.dtype,
            target.format,
        )
        if key not in self._known:
            self._known[key] = self._dense(target)
        return self._known[key]

    def _observing(self, target: Target, given: Input, paired: bool) -> Need:
        observer = target.observer(guided=True)
        with self._fake:
            x, other, mask = given.empty(), given.empty(), given.mask()
            weights = x.new_empty((*x.shape[:-1], target.guidance)) if target.guidance else None

        def observe() -> int:
            rows = target.rows(x)
            observer.observe(
                target.rounded(rows), target.rows(other) if paired else None, mask, weights
            )
            return rows.shape[: -1 if target.blocks == 1 else -2].numel()

        return self._watched(observe)

    def _dense(self, target: Target) -> Need:
        with self._fake:
            matrix = target.empty_matrix()
        weight: list[nn.Parameter] = []

        def make() -> int:
            dense = target.kind.from_matrix(target.module, matrix.weight)
            weight.append(nn.Parameter(dense, requires_grad=False))
            return 0

        return self._watched(make)

    def _watched(self, action: Callable[[], int]) -> Need:
        with torch.no_grad(), Ledger(self._fake) as ledger:
            tokens = action()
            return Need(ledger.live, ledger.peak - ledger.live, ledger.work, tokens)


def packed_bytes(target: Target) -> int:
    """Bytes of the packed matrix of a layer, without bias."""
    return target.format.nbytes(*target.shape)
