"""Calibration: paired passes in lockstep; every layer is solved as the passes reach it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef
from tqdm.auto import tqdm

from tsq_layers.calibration.guidance import TokenWeights
from tsq_layers.calibration.journal import HELD_OUT, Journal, Restored, fingerprint_batch
from tsq_layers.calibration.observation import Observation, Role
from tsq_layers.calibration.preparation import Preparation
from tsq_layers.calibration.schedule import Schedule, all_callers
from tsq_layers.calibration.solving import Shortfall, solve
from tsq_layers.calibration.targets import Solved, Target
from tsq_layers.errors import SameInputWarning
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


@dataclass(frozen=True, eq=False, kw_only=True)
class RunOptions:
    """The data of a calibration, and the way in which it is run.

    Args:
        batches: that are fitted; taken one by one.
        held_out: of which only losses are reported; taken one by one.
        paired: whether the full-precision stream runs too.
        forward: how a batch is run.
        padding_mask: which tokens of a layer's input count.
        progress: whether a bar is shown; ``None`` on a terminal only.
        journal: where solved layers are stored, for a run that continues after this one was killed.
        parking: where the activations of waiting passes are put; ``None`` leaves them.
        guidance: how much each token of the fitted batches counts, for layers that are guided.
    """

    batches: Iterable[Batch]
    held_out: Iterable[Batch]
    paired: bool
    forward: Forward
    padding_mask: PaddingMask
    progress: bool | None = None
    journal: Journal | None = None
    parking: ActivationOffload | None = None
    guidance: TokenWeights | None = None


class Calibration:
    """One run over a model. Solved layers are collected; the model is as before afterwards.

    Args:
        model: with its composites split.
        preparation: its target layers.
        options: what is run, and how.
    """

    def __init__(self, model: nn.Module, preparation: Preparation, options: RunOptions) -> None:
        self.model, self.preparation, self.options = model, preparation, options
        self.solved: dict[str, Solved] = {}
        self._targets = all_callers(preparation.targets, preparation.modules)
        self._roles: list[Role] = []
        self._observation = Observation(
            self._roles,
            options.paired,
            options.padding_mask,
            options.parking,
            options.guidance,
        )
        self._digests: list[str] = []
        self._dense: dict[str, nn.Parameter] = {}
        self._expected_inputs: dict[str, dict[int, TensorWeakRef]] = {}

    def run(self) -> dict[str, Solved]:
        """Run all passes, and return the solved layers by name."""
        modules = {name: self.preparation.modules[name] for name in self._targets}
        with ExitStack() as self._swaps, evaluating(self.model), torch.no_grad():
            for name, target in self._targets.items():
                self._wrap(name, target)
            first, batches = peeked(self.options.batches)
            self._state = PassState(self.model)
            with (
                self._state.first(),
                hooked(modules, lambda name, *_: self._state.note_changes(name)),
            ):
                recording = record(modules, lambda: self._first_pass(first))
            self._schedule = Schedule(self.preparation.targets, self._targets, recording)
            progress = self.options.progress
            with tqdm(
                total=len(self.preparation.targets),
                desc="calibrate",
                unit="layer",
                disable=None if progress is None else not progress,
            ) as self._bar:
                lockstep.run(
                    self._passes(batches),
                    modules,
                    self._visit,
                    order=self._schedule.experts.order,
                    suspend=self._suspend,
                )
                self._solve_the_rest()
        return self.solved

    def _passes(self, batches: Iterable[Batch]) -> Iterator[Callable[[], None]]:
        """All passes, in the order of the batches; the two streams of a batch follow one another."""
        for index, batch in enumerate(batches):
            if self.options.journal is not None:
                self._digests.append(fingerprint_batch(batch, f"batch {index}"))
            for stream in ("quantised", "reference") if self.options.paired else ("quantised",):
                yield self._assigned(Role(batch, index, stream))
        for index, batch in enumerate(self.options.held_out):
            if self.options.journal is not None:
                self._digests.append(HELD_OUT + fingerprint_batch(batch, f"held-out batch {index}"))
            yield self._assigned(Role(batch, index, "quantised", held_out=True))

    def _assigned(self, role: Role) -> Callable[[], None]:
        self._roles.append(role)
        return lambda: self._pass(role)

    def _first_pass(self, batch: Batch) -> None:
        """On a copy, which tells whether the model changes what it is given."""
        copy = copied_to(batch, entry_device(self.model))
        before = versions(copy)
        try:
            self.options.forward(self.model, copy)
        except TypeError as error:
            if self.options.forward is default_forward and isinstance(batch, (tuple, list)):
                error.add_note(
                    f"a batch that is a {type(batch).__name__} gives positional arguments, {len(batch)} here; "
                    "if the model takes its first part only, give forward=lambda model, batch: model(batch[0])"
                )
            raise
        self._changes_batches = versions(copy) != before

    def _pass(self, role: Role) -> None:
        batch = (copied_to if self._changes_batches else moved_to)(
            role.batch, entry_device(self.model)
        )
        with self._state.separate(role.index):
            self.options.forward(self.model, batch)

    def _suspend(self, index: int) -> Callable[[], None]:
        """Put aside what belongs to a pass that waits; the result brings it back."""
        put = self._state.suspend()
        bring = (
            None
            if self.options.parking is None
            else self.options.parking.store(index, self._roles[index].batch)
        )

        def go_on() -> None:
            if bring is not None:
                bring()
            put()

        return go_on

    def _visit(self, name: str, arrivals: list[lockstep.Arrival]) -> Iterable[str]:
        """Observe the calls that wait at a layer, and solve its input group after their last ones.

        Returns:
            names of the layers at which passes need not wait any more.
        """
        self._dense.clear()
        if self._targets[name].name in self.solved:
            return [name]
        for pool in self._schedule.experts.passed(name):
            self._solve_pool(pool)
        group = self._schedule.input_group(name, self.solved)
        first = group[0]
        self._bar.set_postfix_str(name)
        if first.observed:
            self._observation.add(group, arrivals, known=self._needs_no_statistics(group))
            if first.name not in self._observation.reached:
                return ()  # so far only the full-precision stream, or a held-out batch, came here
        calls = min(arrival.ordinal + 1 for arrival in arrivals)
        if not self._schedule.is_last_call(first, calls):
            return ()
        for follower in group[1:]:
            self._expected_inputs[follower.name] = {
                arrival.pass_index: TensorWeakRef(arrival.input) for arrival in arrivals
            }
        self._solve(group)
        return [target.name for target in group]

    def _solve(self, group: Sequence[Target]) -> None:
        """Solve an input group from what was observed of it, but experts with too few tokens."""
        first, experts = group[0], self._schedule.experts
        statistics = self._observation.take_fitted(first.name)
        if statistics is not None and first.pool is not None and experts.lend(first, statistics):
            return  # it waits for the statistics of all experts
        if statistics is None:
            restored = self._restored(group)
            if restored is not None and restored[first.name].report.status == "fallback":
                return  # the run that solved it did so with its pool, and so does this one
        held_out = self._observation.take_held_out(first.name)
        validation = self._observation.take_validated(first.name)
        self._keep(group, statistics, held_out, validation=validation)

    def _solve_pool(self, name: str) -> None:
        """Solve the experts of a pool that are left.

        First those with enough tokens, then the others with the statistics of all.
        """
        experts = self._schedule.experts
        for waiting in experts.waiting(name):
            if self._observation.has(waiting):
                self._solve([self._targets[waiting]])
        for target, statistics, shortfall in experts.close(name):
            if statistics is not None or self._restored([target]) is not None:
                self._keep([target], statistics, shortfall=shortfall)

    def _solve_the_rest(self) -> None:
        """Solve the layers that are left when all passes have ended."""
        for pool in self._schedule.experts.open():
            self._solve_pool(pool)
        reached = self._observation.reached
        for group in self._schedule.remaining(self.solved, lambda name: name in reached):
            self._solve(group)

    def _keep(
        self,
        group: Sequence[Target],
        statistics: LayerStatistics | None,
        held_out: LayerStatistics | None = None,
        shortfall: Shortfall | None = None,
        validation: LayerStatistics | None = None,
    ) -> None:
        """Solve an input group, unless an earlier run has, and store the layers."""
        layers = self._restored(group)
        if layers is None:
            layers = solve(group, statistics, held_out, shortfall, validation)
            if self.options.journal is not None:
                self.options.journal.write(
                    {name: (layer.matrix, layer.report) for name, layer in layers.items()}
                )
        self.solved.update(layers)
        self._bar.update(len(group))

    @torch.inference_mode(False)
    def _restored(self, group: Sequence[Target]) -> dict[str, Solved] | None:
        """Return layers as an earlier run solved them; ``None`` unless it solved them all."""
        if self.options.journal is None or not all(
            target.name in self._known(self.options.journal) for target in group
        ):
            return None
        restored = {}
        for target in group:
            matrix, report = self.options.journal.restored[target.name]
            restored[target.name] = Solved(matrix.to(entry_device(target.module)), report)
        return restored

    def _needs_no_statistics(self, group: Sequence[Target]) -> bool:
        """Return whether an earlier run solved a group, and no expert will need its statistics."""
        if self.options.journal is None:
            return False
        names = [target.name for target in group] + self._schedule.experts.fellows(group[0])
        return all(name in self._known(self.options.journal) for name in names)

    @torch.inference_mode(False)
    def _known(self, journal: Journal) -> Restored:
        """Return what an earlier run solved, once all passes have started and the data are known."""
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
        first_input = self._expected_inputs.get(name, {}).pop(index, None)
        if first_input is not None and args and args[0] is not first_input():
            del self._expected_inputs[name]
            warnings.warn(
                f"{name} shared its input with other layers in the recording pass but not in pass "
                f"{index}; its statistics come from the other layers' input",
                SameInputWarning,
                stacklevel=2,
            )
