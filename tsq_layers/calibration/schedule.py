"""Decide the order in which layers are solved, and which of them together.

A calibration and its plan follow the same :class:`Schedule`: the one with what it sees of the data,
the other with what it counts of one pass.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import nn

from tsq_layers.calibration.experts import Experts
from tsq_layers.calibration.targets import Target
from tsq_layers.layers import kind_of, rows_of
from tsq_layers.passes.recording import Recording


class Schedule:
    """The order of a calibration.

    Args:
        targets: all target layers, by name.
        callers: name of every module through which a target layer is called → the target layer.
        recording: of one pass; ``None`` if there is none.

    Attributes:
        experts: what is known of experts as the calibration goes on.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        callers: Mapping[str, Target],
        recording: Recording | None = None,
    ) -> None:
        self._targets, self._callers = targets, callers
        self._groups: Sequence[Sequence[str]] = () if recording is None else recording.groups
        self._calls: Mapping[str, int] = {} if recording is None else recording.calls
        self.experts = Experts(targets, () if recording is None else recording.order)

    def input_group(self, name: str, solved: Collection[str]) -> list[Target]:
        """Return the layers that are solved together with a layer, itself first.

        They are those that the recorded pass fed with the same tensor, if they see the same rows of
        it (:func:`share_rows`).

        Args:
            name: of a caller.
            solved: names of the target layers that are solved already.
        """
        first = self._callers[name]
        names: Sequence[str] = (name,)
        for group in self._groups:
            if name in group:
                names = group
                break
        members = [first]
        for other_name in names:
            other = self._callers[other_name]
            is_open = other_name != name and other.name not in solved
            if is_open and share_rows(first, other):
                members.append(other)
        return members

    def is_last_call(self, target: Target, calls: int) -> bool:
        """Return whether every pass has called a layer for the last time.

        Args:
            target: the layer.
            calls: how often the pass that called it least has called it.

        Where it cannot be told, the layer is solved when all passes have ended: it was not in the
        recorded pass, or other layers with its weight may still be called.
        """
        total = self.experts.calls(target, self._calls)
        return total is not None and not target.tied and calls >= total

    def remaining(
        self, solved: Collection[str], is_reached: Callable[[str], bool]
    ) -> Iterator[list[Target]]:
        """Yield the input groups that are left when all passes have ended.

        Args:
            solved: names of the target layers that are solved; it grows while this yields.
            is_reached: whether a target layer has statistics.
        """
        for name, target in self._targets.items():
            if name in solved or not (is_reached(name) or not target.observed):
                continue
            yield self.input_group(name, solved) if name in self._callers else [target]


def callers_of(target: Target, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the modules through which a target layer is called.

    These are itself, and the layers with the same weight that see inputs of the same sort; none for
    a layer that is solved from its weight alone.
    """
    if target.kind.inputs is None:
        return []
    return [target.name, *(name for name in target.tied if kind_of(modules[name]) is target.kind)]


def all_callers(
    targets: Mapping[str, Target], modules: Mapping[str, nn.Module]
) -> dict[str, Target]:
    """Return caller → target layer, for all target layers."""
    callers: dict[str, Target] = {}
    for target in targets.values():
        for name in callers_of(target, modules):
            callers[name] = target
    return callers


def share_rows(first: Target, other: Target) -> bool:
    """Return whether two layers that were given the same tensor see the same rows."""
    if first is other:
        return True
    if first.kind.inputs is not rows_of or other.kind.inputs is not rows_of:
        return False  # patches of a convolution depend on its stride and padding
    for target in (first, other):
        if target.pool or target.tied or target.guidance:
            return False  # the tokens of each are its own, or are weighted for it alone
    return first.observed == other.observed and _rounding(first) == _rounding(other)


def _rounding(target: Target) -> tuple[int | None, int | None]:
    """Return what decides how an input is rounded before it is observed."""
    if target.config.activation_bits is None:
        return None, None
    return target.config.activation_bits, target.config.rotation


def holds_tokens_out(group: Sequence[Target]) -> bool:
    """Return whether a share of the tokens of an input group is held out, to choose options on."""
    return group[0].pool is None and any(not target.config.is_settled for target in group)
