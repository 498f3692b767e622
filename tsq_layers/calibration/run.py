"""Calibration: paired passes in lockstep; every layer is solved as the passes reach it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef
from tqdm.auto import tqdm

from tsq_layers.calibration.experts import Experts
from tsq_layers.calibration.guidance import TokenWeights
from tsq_layers.calibration.journal import HELD_OUT, Journal, Restored, fingerprint_batch
from tsq_layers.calibration.observation import Observation, Role
from tsq_layers.calibration.preparation import Preparation
from tsq_layers.calibration.solving import Shortfall, solve
from tsq_layers.calibration.targets import Solved, Target
from tsq_layers.errors import SameInputWarning
from tsq_layers.layers import kind_of, rows_of
from tsq_layers.layers.offloading import entry_device, run_with_weight
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.passes import lockstep
from tsq_layers.passes.batches import (
    Batch,
    Forward,
    PaddingMask,
    copied_to,
    default_forward,
    evaluating,
    moved_to,
    peeked,
    versions,
    with_input,
)
from tsq_layers.passes.offload import ActivationOffload
from tsq_layers.passes.pass_state import PassState
from tsq_layers.passes.recording import hooked, record


@dataclass(eq=False)
class Calibration:
    """One run over a prepared model. Solved layers are collected; the model is as before afterwards.

    Args:
        model: the prepared model.
        preparation: its targets.
        batches, held_out: what is run through it; taken one by one.
        paired: whether the full-precision stream runs too.
        forward: how a batch is run.
        padding_mask: which tokens of a layer input count.
        progress: whether a bar is shown; ``None`` on a terminal only.
        journal: where solved layers are kept for a run that goes on after this one was killed.
        parking: where the activations of passes that wait are put; ``None`` leaves them.
        guidance: how much each token of the fitted batches counts, for layers that are guided.
    """

    model: nn.Module
    preparation: Preparation
    batches: Iterable[Batch]
    held_out: Iterable[Batch]
    paired: bool
    forward: Forward
    padding_mask: PaddingMask
    progress: bool | None
    journal: Journal | None = None
    parking: ActivationOffload | None = None
    guidance: TokenWeights | None = None

    solved: dict[str, Solved] = field(default_factory=dict)
    _roles: list[Role] = field(default_factory=list)
    _digests: list[str] = field(default_factory=list)
    _dense: dict[str, nn.Parameter] = field(default_factory=dict)
    _expected_inputs: dict[str, dict[int, TensorWeakRef]] = field(default_factory=dict)

    def run(self) -> dict[str, Solved]:
        """Run all passes; returns the solved layers by name."""
        targets = self.preparation.targets
        callers = {
            name: target
            for target in targets.values()
            for name in callers_of(target, self.preparation)
        }
        modules = {name: self.preparation.modules[name] for name in callers}
        self._targets = callers
        self._observation = Observation(
            self._roles, self.paired, self.padding_mask, self.parking, self.guidance
        )
        with ExitStack() as self._swaps, evaluating(self.model), torch.no_grad():
            for name, target in callers.items():
                self._wrap(name, target)
            first, batches = peeked(self.batches)
            self._state = PassState(self.model)
            with (
                self._state.first(),
                hooked(modules, lambda name, *_: self._state.note_changes(name)),
            ):
                self._recording = record(modules, lambda: self._first_pass(first))
            self._experts = Experts(targets, self._recording.order)
            with tqdm(
                total=len(targets),
                desc="calibrate",
                unit="layer",
                disable=None if self.progress is None else not self.progress,
            ) as self._bar:
                order = self._experts.order
                lockstep.run(
                    self._passes(batches), modules, self._visit, order=order, suspend=self._suspend
                )
                self._solve_the_rest()
        return self.solved

    def _passes(self, batches: Iterable[Batch]) -> Iterator[Callable[[], None]]:
        """All passes, in the order of the batches; the two streams of a batch follow one another."""
        for index, batch in enumerate(batches):
            if self.journal is not None:
                self._digests.append(fingerprint_batch(batch, f"batch {index}"))
            for stream in ("quantised", "reference") if self.paired else ("quantised",):
                yield self._assigned(Role(batch, index, stream))
        for index, batch in enumerate(self.held_out):
            if self.journal is not None:
                self._digests.append(HELD_OUT + fingerprint_batch(batch, f"held-out batch {index}"))
            yield self._assigned(Role(batch, index, "quantised", held_out=True))

    def _assigned(self, role: Role) -> Callable[[], None]:
        self._roles.append(role)
        return lambda: self._pass(role)

    def _first_pass(self, batch: Batch) -> None:
        """On a copy, which tells whether the model changes what it is given."""
        given = copied_to(batch, entry_device(self.model))
        before = versions(given)
        try:
            self.forward(self.model, given)
        except TypeError as error:
            if self.forward is default_forward and isinstance(batch, (tuple, list)):
                error.add_note(
                    f"a batch that is a {type(batch).__name__} gives positional arguments, {len(batch)} here; "
                    "if the model takes its first part only, give forward=lambda model, batch: model(batch[0])"
                )
            raise
        self._changes_batches = versions(given) != before

    def _pass(self, role: Role) -> None:
        given = (copied_to if self._changes_batches else moved_to)(
            role.batch, entry_device(self.model)
        )
        with self._state.separate(role.index):
            self.forward(self.model, given)

    def _suspend(self, index: int) -> Callable[[], None]:
        """Put aside what belongs to a pass that waits; the result brings it back."""
        put = self._state.suspend()
        bring = (
            None if self.parking is None else self.parking.store(index, self._roles[index].batch)
        )

        def go_on() -> None:
            if bring is not None:
                bring()
            put()

        return go_on

    def _visit(self, name: str, arrivals: list[lockstep.Arrival]) -> Iterable[str]:
        """See the calls that wait at ``name``; solve its stage once nobody will call it again."""
        self._dense.clear()
        if self._targets[name].name in self.solved:
            return [name]
        for pool in self._experts.passed(name):
            self._solve_pool(pool)
        stage = self._stage(name)
        self._bar.set_postfix_str(name)
        if stage[0].observed:
            self._observation.add(stage, arrivals, known=self._needs_no_statistics(stage))
            if stage[0].name not in self._observation.reached:
                return ()  # so far only the full-precision stream, or a held-out batch, came here
        expected = self._experts.calls(stage[0], self._recording.calls)
        if (
            expected is None
            or stage[0].tied
            or any(arrival.ordinal + 1 < expected for arrival in arrivals)
        ):
            return ()  # passes may yet come here, at different times: it is solved when all have ended
        for follower in stage[1:]:
            self._expected_inputs[follower.name] = {
                a.pass_index: TensorWeakRef(a.input) for a in arrivals
            }
        self._solve(stage)
        return [target.name for target in stage]

    def _stage(self, name: str) -> list[Target]:
        """The layers that the recording pass fed with the same tensor as ``name``, itself first."""
        first = self._targets[name]
        group = next((group for group in self._recording.groups if name in group), (name,))
        others = [
            self._targets[other] for other in group if other != name and other not in self.solved
        ]
        return [first, *(other for other in others if share_rows(first, other))]

    def _solve(self, stage: Sequence[Target]) -> None:
        name = stage[0].name
        statistics = self._observation.take_fitted(name)
        if (
            statistics is not None
            and stage[0].pool is not None
            and self._experts.lend(stage[0], statistics)
        ):
            return  # too few tokens of its own: it waits for what its fellows see
        if (
            statistics is None
            and (known := self._restored(stage))
            and known[name].report.status == "fallback"
        ):
            return  # as in the run that solved it
        held_out, validation = (
            self._observation.take_held_out(name),
            self._observation.take_validated(name),
        )
        self._keep(stage, statistics, held_out, validation=validation)

    def _solve_pool(self, name: str) -> None:
        """Solve the experts of a pool that are left: those with enough tokens, then the others with those of all."""
        for waiting in self._experts.waiting(name):
            if self._observation.has(waiting):
                self._solve([self._targets[waiting]])
        for target, statistics, shortfall in self._experts.close(name):
            if statistics is not None or self._restored([target]) is not None:
                self._keep([target], statistics, shortfall=shortfall)

    def _solve_the_rest(self) -> None:
        """Layers whose last call could not be told before all passes had ended, and those that need no call."""
        for pool in self._experts.open():
            self._solve_pool(pool)
        for name, target in self.preparation.targets.items():
            if name not in self.solved and (
                name in self._observation.reached or not target.observed
            ):
                self._solve(self._stage(name) if name in self._targets else [target])

    def _keep(
        self,
        stage: Sequence[Target],
        statistics: LayerStatistics | None,
        held_out: LayerStatistics | None = None,
        shortfall: Shortfall | None = None,
        validation: LayerStatistics | None = None,
    ) -> None:
        """Solve a stage, unless an earlier run has."""
        solved = self._restored(stage)
        if solved is None:
            solved = solve(stage, statistics, held_out, shortfall, validation)
            if self.journal is not None:
                self.journal.write(
                    {name: (layer.matrix, layer.report) for name, layer in solved.items()}
                )
        self.solved.update(solved)
        self._bar.update(len(stage))

    @torch.inference_mode(False)
    def _restored(self, stage: Sequence[Target]) -> dict[str, Solved] | None:
        """Layers as an earlier run solved them; ``None`` unless it solved them all."""
        if self.journal is None or not all(
            target.name in self._known(self.journal) for target in stage
        ):
            return None
        found = {}
        for target in stage:
            matrix, report = self.journal.restored[target.name]
            found[target.name] = Solved(matrix.to(entry_device(target.module)), report)
        return found

    def _needs_no_statistics(self, stage: Sequence[Target]) -> bool:
        """Whether an earlier run solved a stage, and no expert will ask for its statistics."""
        if self.journal is None:
            return False
        names = [target.name for target in stage] + self._experts.fellows(stage[0])
        return all(name in self._known(self.journal) for name in names)

    @torch.inference_mode(False)
    def _known(self, journal: Journal) -> Restored:
        """What an earlier run solved. Asked for when all passes have started, so that the data are known."""
        if self._digests:
            journal.check_data(self._digests)
            self._digests.clear()
        return journal.restored

    def _wrap(self, name: str, target: Target) -> None:
        """Once the layer is solved, let the quantised stream call it with its quantised weight.

        Its ``forward`` is wrapped, not hooked: the calls that wait while the layer is solved stand
        among its pre-hooks, and torch calls no pre-hook that is registered meanwhile.
        """
        module = self.preparation.modules[name]
        forward, attributes = module.forward, vars(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            index = lockstep.current_pass()
            if index is None or target.name not in self.solved:
                return forward(*args, **kwargs)
            self._check_input(name, index, args)
            if self._roles[index].stream != "quantised":
                return forward(*args, **kwargs)
            args, kwargs = with_input(self.solved[target.name].matrix.rounded_input, args, kwargs)
            return run_with_weight(module, forward, self._dense_weight(target), args, kwargs)

        if "forward" in attributes:
            self._swaps.callback(attributes.__setitem__, "forward", forward)
        else:
            self._swaps.callback(attributes.__delitem__, "forward")
        attributes["forward"] = call

    def _dense_weight(self, target: Target) -> nn.Parameter:
        """The quantised weight as the layer's own kind holds it; kept until the next layer is visited."""
        if target.name not in self._dense:
            matrix = self.solved[target.name].matrix.weight
            self._dense[target.name] = nn.Parameter(
                target.kind.from_matrix(target.module, matrix), requires_grad=False
            )
        return self._dense[target.name]

    def _check_input(self, name: str, index: int, args: tuple[Any, ...]) -> None:
        """Warn if a layer that was solved with another one's input is now called with its own."""
        expected = self._expected_inputs.get(name, {}).pop(index, None)
        if expected is not None and args and args[0] is not expected():
            del self._expected_inputs[name]
            warnings.warn(
                f"{name} shared its input with other layers in the recording pass but not in pass {index}; its statistics come from the other layers' input",
                SameInputWarning,
                stacklevel=2,
            )


def callers_of(target: Target, preparation: Preparation) -> list[str]:
    """The layers that calls go through: the target, and those with the same weight that see inputs of the same sort."""
    tied = [name for name in target.tied if kind_of(preparation.modules[name]) is target.kind]
    return [target.name, *tied] if target.kind.inputs is not None else []


def share_rows(first: Target, other: Target) -> bool:
    """Whether two layers that were given the same tensor see the same rows."""
    plain = first.kind.inputs is rows_of and other.kind.inputs is rows_of
    alone = first.pool or other.pool or first.tied or other.tied or first.guidance or other.guidance
    alone = alone or first.observed != other.observed
    roundings = [
        target.config.activation_bits and (8, target.config.rotation) for target in (first, other)
    ]
    return first is other or (plain and not alone and roundings[0] == roundings[1])
