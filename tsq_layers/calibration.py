"""Calibration: paired passes in lockstep; every layer is solved as the passes reach it."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef
from tqdm.auto import tqdm

from tsq_layers import lockstep
from tsq_layers.errors import CalibrationError, SameInputWarning
from tsq_layers.experts import Experts
from tsq_layers.guidance import TokenWeights
from tsq_layers.journal import HELD_OUT, Journal, Restored, fingerprint_batch
from tsq_layers.layers import kind_of, rows_of
from tsq_layers.layers.offloading import entry_device, run_with_weight
from tsq_layers.observer import Call, HessianObserver
from tsq_layers.parking import Parking
from tsq_layers.preparation import Preparation
from tsq_layers.records import LayerStatistics
from tsq_layers.solving import Shortfall, solve
from tsq_layers.targets import Solved, Target

VALIDATION_SHARE = 0.2  # of the tokens of each call, where something is chosen on tokens that are not fitted

Batch = Any
Forward = Callable[[nn.Module, Any], object]
PaddingMask = Callable[[Any, str, Tensor], Tensor | None]


@dataclass(frozen=True)
class Role:
    """What one pass is for: a batch on one of the two streams, fitted or held out."""

    batch: Batch
    index: int
    stream: str  # "quantised" or "reference"
    held_out: bool = False


def default_forward(model: nn.Module, batch: Batch) -> object:
    """Call the model with a tensor, positional arguments (tuple, list) or keyword arguments (mapping)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def attention_mask(batch: Batch, name: str, x: Tensor) -> Tensor | None:  # noqa: ARG001  (other masks go by the layer)
    """The padding mask of a layer input: the batch's ``attention_mask`` if it has the input's tokens.

    A batch with inputs for a decoder has tokens of two kinds, which cannot be told apart by shape:
    then every token counts, unless a ``padding_mask`` function is given to ``calibrate``.
    """
    if not isinstance(batch, Mapping) or any(key.startswith("decoder_") for key in batch):
        return None
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if mask.shape == x.shape[:-1] or (x.dim() == 2 and mask.numel() == x.shape[0]):  # the tokens may be flattened
        return mask.to(x.device)
    return None


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
    parking: Parking | None = None
    guidance: TokenWeights | None = None

    solved: dict[str, Solved] = field(default_factory=dict)
    _roles: list[Role] = field(default_factory=list)
    _digests: list[str] = field(default_factory=list)
    _reached: set[str] = field(default_factory=set)
    _observers: dict[str, HessianObserver] = field(default_factory=dict)
    _held_out_observers: dict[str, HessianObserver] = field(default_factory=dict)
    _validation: dict[str, HessianObserver] = field(default_factory=dict)
    _dense: dict[str, nn.Parameter] = field(default_factory=dict)
    _expected_inputs: dict[str, dict[int, TensorWeakRef]] = field(default_factory=dict)

    def run(self) -> dict[str, Solved]:
        """Run all passes; returns the solved layers by name."""
        targets = self.preparation.targets
        callers = {name: target for target in targets.values() for name in callers_of(target, self.preparation)}
        modules = {name: self.preparation.modules[name] for name in callers}
        self._targets = callers
        with ExitStack() as self._swaps, evaluating(self.model), torch.no_grad():
            for name, target in callers.items():
                self._wrap(name, target)
            first, batches = _peeked(self.batches)
            self._recording = lockstep.record(modules, lambda: self._pass(Role(first, 0, "quantised")))
            self._experts = Experts(targets, self._recording.order)
            with tqdm(
                total=len(targets),
                desc="calibrate",
                unit="layer",
                disable=None if self.progress is None else not self.progress,
            ) as self._bar:
                parking = self.parking
                suspend = None if parking is None else lambda index: parking.park(index, self._roles[index].batch)
                lockstep.run(self._passes(batches), modules, self._visit, order=self._experts.order, suspend=suspend)
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

    def _pass(self, role: Role) -> None:
        self.forward(self.model, moved_to(role.batch, entry_device(self.model)))

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
            self._observe(stage, arrivals)
            if stage[0].name not in self._reached:
                return ()  # so far only the full-precision stream, or a held-out batch, came here
        expected = self._experts.calls(stage[0], self._recording.calls)
        if expected is None or stage[0].tied or any(arrival.ordinal + 1 < expected for arrival in arrivals):
            return ()  # passes may yet come here, at different times: it is solved when all have ended
        for follower in stage[1:]:
            self._expected_inputs[follower.name] = {a.pass_index: TensorWeakRef(a.input) for a in arrivals}
        self._solve(stage)
        return [target.name for target in stage]

    def _stage(self, name: str) -> list[Target]:
        """The layers that the recording pass fed with the same tensor as ``name``, itself first."""
        first = self._targets[name]
        group = next((group for group in self._recording.groups if name in group), (name,))
        others = [self._targets[other] for other in group if other != name and other not in self.solved]
        return [first, *(other for other in others if share_rows(first, other))]

    def _observe(self, stage: Sequence[Target], arrivals: Sequence[lockstep.Arrival]) -> None:
        known = self._needs_no_statistics(stage)
        references = {self._roles[a.pass_index].index: a for a in arrivals if self._stream(a) == "reference"}
        for arrival in arrivals:
            role = self._roles[arrival.pass_index]
            if self._stream(arrival) == "reference" or not arrival.input.numel():
                continue
            if not role.held_out:
                self._reached.add(stage[0].name)
            if not known:
                self._observe_call(stage, role, arrival, references.get(role.index))

    def _observe_call(
        self, stage: Sequence[Target], role: Role, arrival: lockstep.Arrival, other: lockstep.Arrival | None
    ) -> None:
        """Add a call on the quantised stream, beside the same batch's call on the other one."""
        first = stage[0]
        paired = self.paired and not role.held_out and any(target.uses_deviation for target in stage)
        with self._present(arrival), self._present(other):
            x = first.rows(arrival.input)
            reference = None
            if paired:
                reference = x if other is None else first.rows(other.input)
                if reference.shape != x.shape:
                    reference = x  # the streams took different ways: no deviation here but that of rounding
            mask = self.padding_mask(role.batch, first.name, x)
            x = first.rounded(x)
            if role.held_out:
                observed = self._held_out_observers.setdefault(first.name, first.observer())
                observed.observe(x, reference, mask)
                return
            call = Call(x, reference, mask, self._weights(first, role, arrival))
            observed = self._observers.setdefault(first.name, first.observer(guided=True))
            if all(target.config.is_settled for target in stage) or first.pool is not None:
                call.add_to(observed)
                return
            fitted, validated = call.split(VALIDATION_SHARE, dims=1 if first.blocks == 1 else 2)
            fitted.add_to(observed)
            validated.add_to(self._validation.setdefault(first.name, first.observer(guided=True)))

    def _weights(self, target: Target, role: Role, arrival: lockstep.Arrival) -> Tensor | None:
        """How much the tokens of a call count, (T, k); all alike where the gradient pass did not see it."""
        if not target.guidance or self.guidance is None:
            return None
        found = self.guidance.of(target.name, role.index, arrival.ordinal)
        if found is not None:
            return found
        tokens = arrival.input.shape[:-1].numel()
        return torch.ones(tokens, target.guidance, device=arrival.input.device)

    def _stream(self, arrival: lockstep.Arrival) -> str:
        return self._roles[arrival.pass_index].stream

    def _present(self, arrival: lockstep.Arrival | None) -> AbstractContextManager[None]:
        if self.parking is None or arrival is None:
            return nullcontext()
        return self.parking.present(arrival.pass_index)

    def _solve(self, stage: Sequence[Target]) -> None:
        name = stage[0].name
        statistics = _taken(self._observers, name)
        if statistics is not None and stage[0].pool is not None and self._experts.lend(stage[0], statistics):
            return  # too few tokens of its own: it waits for what its fellows see
        if statistics is None and (known := self._restored(stage)) and known[name].report.status == "fallback":
            return  # as in the run that solved it
        held_out, validation = (_taken(seen, name) for seen in (self._held_out_observers, self._validation))
        self._keep(stage, statistics, held_out, validation=validation)

    def _solve_pool(self, name: str) -> None:
        """Solve the experts of a pool that are left: those with enough tokens, then the others with those of all."""
        for waiting in self._experts.waiting(name):
            if waiting in self._observers:
                self._solve([self._targets[waiting]])
        for target, statistics, shortfall in self._experts.close(name):
            if statistics is not None or self._restored([target]) is not None:
                self._keep([target], statistics, shortfall=shortfall)

    def _solve_the_rest(self) -> None:
        """Layers whose last call could not be told before all passes had ended, and those that need no call."""
        for pool in self._experts.open():
            self._solve_pool(pool)
        for name, target in self.preparation.targets.items():
            if name not in self.solved and (name in self._reached or not target.observed):
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
                self.journal.write({name: (layer.matrix, layer.report) for name, layer in solved.items()})
        self.solved.update(solved)
        self._bar.update(len(stage))

    def _restored(self, stage: Sequence[Target]) -> dict[str, Solved] | None:
        """Layers as an earlier run solved them; ``None`` unless it solved them all."""
        if self.journal is None or not all(target.name in self._known(self.journal) for target in stage):
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
            self._dense[target.name] = nn.Parameter(target.kind.from_matrix(target.module, matrix), requires_grad=False)
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


def _taken(observers: dict[str, HessianObserver], name: str) -> LayerStatistics | None:
    """What an observer has seen; the observer, which is as large, is let go of."""
    observer = observers.pop(name, None)
    return None if observer is None else observer.statistics()


def callers_of(target: Target, preparation: Preparation) -> list[str]:
    """The layers that calls go through: the target, and those with the same weight that see inputs of the same sort."""
    tied = [name for name in target.tied if kind_of(preparation.modules[name]) is target.kind]
    return [target.name, *tied] if target.kind.inputs is not None else []


def share_rows(first: Target, other: Target) -> bool:
    """Whether two layers that were given the same tensor see the same rows."""
    plain = first.kind.inputs is rows_of and other.kind.inputs is rows_of
    alone = first.pool or other.pool or first.tied or other.tied or first.guidance or other.guidance
    roundings = [target.config.activation_bits and (8, target.config.rotation) for target in (first, other)]
    return first is other or (plain and not alone and roundings[0] == roundings[1])


def with_input(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with its first tensor changed, positional ones before keywords.

    Example:
        >>> with_input(lambda x: 2 * x, (), {"input": torch.ones(2)})
        ((), {'input': tensor([2., 2.])})
    """
    named = [*enumerate(args), *kwargs.items()]
    first = next((key for key, value in named if isinstance(value, Tensor)), None)
    changed = {key: change(value) if key == first else value for key, value in named}
    return tuple(changed[index] for index in range(len(args))), {key: changed[key] for key in kwargs}


def _peeked(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    iterator = iter(batches)
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise CalibrationError("batches holds no batch; give at least one")


def checked_batches(batches: Iterable[Batch], what: str) -> Iterable[Batch]:
    """The batches, not yet taken.

    Raises:
        CalibrationError: not an iterable of batches, or a list of none.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"{what} is a {type(batches).__name__}; give an iterable of batches, for example [batch]"
        )
    if isinstance(batches, Sized) and not len(batches):
        raise CalibrationError(f"{what} holds no batch; give at least one")
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no key-value cache of a transformers model: it would only hold memory."""
    training = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if isinstance(use_cache, bool):
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        if isinstance(use_cache, bool):
            config.use_cache = use_cache  # type: ignore[union-attr]


def moved_to(batch: Batch, device: torch.device | None) -> Batch:
    """A batch with all its tensors on ``device``; as it is if that is ``None``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved_to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [moved_to(value, device) for value in batch]
        if hasattr(batch, "_make"):  # a named tuple
            return batch._make(moved)
        return tuple(moved) if isinstance(batch, tuple) else moved
    return batch
