"""Calibration: paired passes in lockstep; every layer is solved as the passes reach it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef
from tqdm.auto import tqdm

from tsq_layers import lockstep
from tsq_layers.errors import CalibrationError, SameInputWarning
from tsq_layers.observer import HessianObserver
from tsq_layers.preparation import Preparation, Solved, Target
from tsq_layers.solving import solve

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
    if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
        return mask.to(x.device)
    return None


@dataclass(eq=False)
class Calibration:
    """One run over a prepared model. Solved layers are collected; the model is as before afterwards.

    Args:
        model: the prepared model.
        preparation: its targets.
        batches, held_out: what is run through it.
        paired: whether the full-precision stream runs too.
        forward: how a batch is run.
        padding_mask: which tokens of a layer input count.
        progress: whether a bar is shown; ``None`` on a terminal only.
    """

    model: nn.Module
    preparation: Preparation
    batches: Sequence[Batch]
    held_out: Sequence[Batch]
    paired: bool
    forward: Forward
    padding_mask: PaddingMask
    progress: bool | None

    solved: dict[str, Solved] = field(default_factory=dict)
    _observers: dict[str, HessianObserver] = field(default_factory=dict)
    _held_out_observers: dict[str, HessianObserver] = field(default_factory=dict)
    _dense: dict[str, nn.Parameter] = field(default_factory=dict)
    _expected_inputs: dict[str, dict[int, TensorWeakRef]] = field(default_factory=dict)

    def run(self) -> dict[str, Solved]:
        """Run all passes; returns the solved layers by name."""
        modules = {name: target.module for name, target in self.preparation.targets.items()}
        self._roles = self._all_roles()
        with ExitStack() as self._swaps, _evaluating(self.model), torch.no_grad():
            first = self._roles[0]
            for target in self.preparation.targets.values():
                self._wrap(target)
            self._recording = lockstep.record(modules, lambda: self._pass(first))
            with tqdm(
                total=len(modules),
                desc="calibrate",
                unit="layer",
                disable=None if self.progress is None else not self.progress,
            ) as self._bar:
                passes = [lambda role=role: self._pass(role) for role in self._roles]
                lockstep.run(passes, modules, self._visit, order=self._recording.order)
                for name in [name for name in self._observers if name not in self.solved]:
                    self._solve(self._stage(name), self._observers[name])
                for name, target in self.preparation.targets.items():
                    if name not in self.solved and not target.config.needs_calibration:
                        self._solve([target], None)  # it needs no call to be solved
        return self.solved

    def _all_roles(self) -> list[Role]:
        roles = [Role(batch, index, "quantised") for index, batch in enumerate(self.batches)]
        if self.paired:
            roles += [Role(batch, index, "reference") for index, batch in enumerate(self.batches)]
        return roles + [Role(batch, index, "quantised", held_out=True) for index, batch in enumerate(self.held_out)]

    def _pass(self, role: Role) -> None:
        device = next(self.model.parameters()).device
        self.forward(self.model, _moved(role.batch, device))

    def _visit(self, name: str, arrivals: list[lockstep.Arrival]) -> Iterable[str]:
        """See the calls that wait at ``name``; solve its stage once nobody will call it again."""
        self._dense.clear()
        stage = self._stage(name)
        self._bar.set_postfix_str(name)
        if any(target.config.needs_calibration for target in stage):
            self._observe(name, stage, arrivals)
            if name not in self._observers:
                return ()  # so far only the full-precision stream, or a held-out batch, came here
        if name not in self._recording.calls:
            return ()  # passes may reach it from several places, at different times: it is solved when all have ended
        expected = self._recording.calls[name]
        if any(arrival.ordinal + 1 < expected for arrival in arrivals):
            return ()
        for follower in stage[1:]:
            self._expected_inputs[follower.name] = {a.pass_index: TensorWeakRef(a.input) for a in arrivals}
        self._solve(stage, self._observers.get(name))
        return [target.name for target in stage]

    def _stage(self, name: str) -> list[Target]:
        """The layers that the recording pass fed with the same tensor as ``name``, itself first."""
        group = next((group for group in self._recording.groups if name in group), (name,))
        others = [other for other in group if other != name and other not in self.solved]
        return [self.preparation.targets[member] for member in [name, *others]]

    def _observe(self, name: str, stage: Sequence[Target], arrivals: Sequence[lockstep.Arrival]) -> None:
        columns = stage[0].weight.shape[1]
        paired = self.paired and any(target.config.uses_deviation for target in stage)
        roles = {arrival.pass_index: self._roles[arrival.pass_index] for arrival in arrivals}
        references = {roles[a.pass_index].index: a.input for a in arrivals if roles[a.pass_index].stream == "reference"}
        for arrival in arrivals:
            role, x = roles[arrival.pass_index], arrival.input
            if role.stream == "reference":
                continue
            observers = self._held_out_observers if role.held_out else self._observers
            observer = observers.setdefault(name, HessianObserver(columns))
            reference = None
            if paired and not role.held_out:
                reference = references.get(role.index)
                if reference is None or reference.shape != x.shape:
                    reference = x  # the streams took different ways: no deviation here
            observer.observe(x, reference, self.padding_mask(role.batch, name, x))

    def _solve(self, stage: Sequence[Target], observer: HessianObserver | None) -> None:
        held_out = self._held_out_observers.pop(stage[0].name, None)
        statistics = None if observer is None else observer.statistics()
        solved = solve(stage, statistics, None if held_out is None else held_out.statistics())
        self._observers.pop(stage[0].name, None)
        for target in stage:
            self.solved[target.name] = solved[target.name]
        self._bar.update(len(stage))

    def _wrap(self, target: Target) -> None:
        """Once the layer is solved, let the quantised stream call it with its quantised weight.

        Its ``forward`` is wrapped, not hooked: the calls that wait while the layer is solved stand
        among its pre-hooks, and torch calls no pre-hook that is registered meanwhile.
        """
        module, name = target.module, target.name
        forward, attributes = module.forward, vars(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            index = lockstep.current_pass()
            if index is None or name not in self.solved:
                return forward(*args, **kwargs)
            self._check_input(name, index, args)
            if self._roles[index].stream != "quantised":
                return forward(*args, **kwargs)
            original = module._parameters["weight"]
            module._parameters["weight"] = self._dense_weight(target)
            try:
                return forward(*args, **kwargs)
            finally:
                module._parameters["weight"] = original

        if "forward" in attributes:
            self._swaps.callback(attributes.__setitem__, "forward", forward)
        else:
            self._swaps.callback(attributes.__delitem__, "forward")
        attributes["forward"] = call

    def _dense_weight(self, target: Target) -> nn.Parameter:
        """The quantised weight as the layer's own kind holds it; kept until the next layer is visited."""
        if target.name not in self._dense:
            matrix = self.solved[target.name].weight.dequantize(target.weight.dtype)
            self._dense[target.name] = nn.Parameter(target.kind.from_matrix(matrix), requires_grad=False)
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


def checked_batches(batches: Iterable[Batch], what: str) -> list[Batch]:
    """The batches as a list.

    Raises:
        CalibrationError: not an iterable of batches, or empty.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"{what} is a {type(batches).__name__}; give an iterable of batches, for example [batch]"
        )
    found = list(batches)
    if not found:
        raise CalibrationError(f"{what} holds no batch; give at least one")
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
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


def _moved(batch: Batch, device: torch.device) -> Batch:
    """A batch with all its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [_moved(value, device) for value in batch]
        if hasattr(batch, "_make"):  # a named tuple
            return batch._make(moved)
        return tuple(moved) if isinstance(batch, tuple) else moved
    return batch
