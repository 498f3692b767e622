"""Observe calls of layers: tokens that are fitted, that choose options, and that only report losses."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsq_layers.calibration.guidance import TokenWeights
from tsq_layers.calibration.schedule import holds_tokens_out
from tsq_layers.calibration.targets import Target
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.observer import Call, HessianObserver
from tsq_layers.passes import lockstep
from tsq_layers.passes.batches import Batch, PaddingMask
from tsq_layers.passes.offload import ActivationOffload

VALIDATED = 5  # of so many tokens of a layer one, the last of each call, where something is chosen on tokens not fitted


@dataclass(frozen=True)
class Role:
    """The purpose of one pass: a batch on one of the two streams, fitted or held out."""

    batch: Batch
    index: int
    stream: str  # "quantised" or "reference"
    held_out: bool = False


@dataclass(eq=False)
class Observation:
    """The observers of one calibration. Each is made at the first call of its layer, and let go of when it is taken.

    Args:
        roles: of the passes, by their numbers; the list grows while they start.
        paired: whether the full-precision stream runs too.
        padding_mask: which tokens of a layer input count.
        parking: where the activations of passes that wait are.
        guidance: how much each token of the fitted batches counts, for layers that are guided.

    Attributes:
        reached: layers that were called on the quantised stream with a batch that is fitted.
    """

    roles: Sequence[Role]
    paired: bool
    padding_mask: PaddingMask
    parking: ActivationOffload | None = None
    guidance: TokenWeights | None = None
    reached: set[str] = field(default_factory=set)
    _fitted: dict[str, HessianObserver] = field(default_factory=dict)
    _held_out: dict[str, HessianObserver] = field(default_factory=dict)
    _validated: dict[str, HessianObserver] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)  # without padding masks
    _kept: dict[str, Tensor] = field(default_factory=dict)  # with, padding left out

    def has(self, name: str) -> bool:
        """Return whether there are statistics of a layer."""
        return name in self._fitted

    def take_fitted(self, name: str) -> LayerStatistics | None:
        """Return the statistics that a layer is fitted to; ``None`` if no call was observed."""
        return _taken(self._fitted, name)

    def take_validated(self, name: str) -> LayerStatistics | None:
        """The share of the tokens on which a layer's settings are chosen; ``None`` if nothing is to be chosen."""
        return _taken(self._validated, name)

    def take_held_out(self, name: str) -> LayerStatistics | None:
        """Return the statistics that only losses are reported on; ``None`` without held-out batches."""
        return _taken(self._held_out, name)

    def add(
        self, stage: Sequence[Target], arrivals: Sequence[lockstep.Arrival], *, known: bool
    ) -> None:
        """See the calls that wait at a stage.

        Args:
            stage: layers that are given the same tensor.
            arrivals: calls of the first of them.
            known: their statistics are not needed: it is only noted that they were reached.
        """
        references = {
            self.roles[a.pass_index].index: a for a in arrivals if self._stream(a) == "reference"
        }
        for arrival in arrivals:
            role = self.roles[arrival.pass_index]
            if self._stream(arrival) == "reference" or not arrival.input.numel():
                continue
            if not role.held_out:
                self.reached.add(stage[0].name)
            if not known:
                self._observe_call(stage, role, arrival, references.get(role.index))

    def _observe_call(
        self,
        stage: Sequence[Target],
        role: Role,
        arrival: lockstep.Arrival,
        other: lockstep.Arrival | None,
    ) -> None:
        """Add a call on the quantised stream, beside the same batch's call on the other one."""
        first = stage[0]
        paired = (
            self.paired and not role.held_out and any(target.uses_deviation for target in stage)
        )
        with self._present(arrival), self._present(other):
            x = first.rows(arrival.input)
            reference = None
            if paired:
                reference = x if other is None else first.rows(other.input)
                if reference.shape != x.shape:
                    reference = (
                        x  # the streams took different ways: no deviation here but that of rounding
                    )
            mask = self.padding_mask(role.batch, first.name, x)
            if first.pool is not None:
                mask = _routed(x, mask)
            x = first.rounded(x)
            if role.held_out:
                observer = self._held_out.setdefault(first.name, first.observer())
                observer.observe(x, reference, mask)
                return
            call = Call(x, reference, mask, self._weights(first, role, arrival))
            observer = self._fitted.setdefault(first.name, first.observer(guided=True))
            if not holds_tokens_out(stage):
                call.add_to(observer)
                return
            dims = 1 if first.blocks == 1 else 2
            main_part, other_part = self._split(first.name, call, dims)
            main_part.add_to(observer)
            other_part.add_to(self._validated.setdefault(first.name, first.observer(guided=True)))

    def _split(self, name: str, call: Call, dims: int) -> tuple[Call, Call]:
        """Split the tokens of a call into those that are fitted, and those that choose options.

        The share is that of all calls so far: a call may have one token only.
        """
        tokens = call.x.shape[:-dims].numel()
        if call.mask is None:
            before = self._tokens.get(name, 0)
            self._tokens[name] = before + tokens
            return call.split(self._tokens[name] // VALIDATED - before // VALIDATED, dims)
        kept = (call.mask != 0).sum()
        tokens_before = self._kept.get(name, torch.zeros_like(kept))
        self._kept[name] = tokens_before + kept
        last = (tokens_before + kept) // VALIDATED - tokens_before // VALIDATED
        return call.split_masked(last, min(tokens, tokens // VALIDATED + 1), dims)

    def _weights(self, target: Target, role: Role, arrival: lockstep.Arrival) -> Tensor | None:
        """Return how much the tokens of a call count, (T, k); all alike if the gradient pass missed it."""
        if not target.guidance or self.guidance is None:
            return None
        weights = self.guidance.of(target.name, role.index, arrival.ordinal)
        if weights is not None:
            return weights
        tokens = arrival.input.shape[:-1].numel()
        return torch.ones(tokens, target.guidance, device=arrival.input.device)

    def _stream(self, arrival: lockstep.Arrival) -> str:
        return self.roles[arrival.pass_index].stream

    def _present(self, arrival: lockstep.Arrival | None) -> AbstractContextManager[None]:
        if self.parking is None or arrival is None:
            return nullcontext()
        return self.parking.present(arrival.pass_index)


def _routed(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return which of an expert's inputs count.

    Some models run all experts on all tokens, with zeros for those that are not routed to them.
    """
    routed = x.any(-1)
    if mask is None:
        return routed
    return mask if mask.numel() != routed.numel() else routed & (mask.reshape(routed.shape) != 0)


def _taken(observers: dict[str, HessianObserver], name: str) -> LayerStatistics | None:
    """Return the statistics of an observer; the observer, which is as large, is dropped."""
    observer = observers.pop(name, None)
    return None if observer is None else observer.statistics()
