"""One pass through a prepared model, and what it holds at every layer that is to be quantised."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tsq_layers.errors import CalibrationError
from tsq_layers.layers.offloading import entry_device
from tsq_layers.passes import lockstep
from tsq_layers.passes.batches import Batch, Forward, attention_mask, evaluating, moved_to
from tsq_layers.passes.recording import Recording, record
from tsq_layers.planning.ledger import Ledger, Work


@dataclass(frozen=True)
class Input:
    """The input of a layer, as far as memory goes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    masked: bool

    def empty(self) -> Tensor:
        """A tensor like it."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def mask(self) -> Tensor | None:
        """A padding mask of its tokens, if there is one."""
        return (
            torch.ones(self.shape[:-1], dtype=torch.bool, device=self.device)
            if self.masked
            else None
        )


@dataclass(frozen=True)
class Call:
    """One call of a layer, before it runs.

    Attributes:
        name: of the layer.
        held: bytes that the pass holds as it waits there.
        peak: the most that it held since the call before.
        work: done since the call before.
        input: the layer's input.
        padding: its tokens that do not count, by the batch's attention mask.
    """

    name: str
    held: int
    peak: int
    work: Work
    input: Input
    padding: int


@dataclass(frozen=True)
class Trace:
    """A whole pass.

    Attributes:
        calls: of layers, in order.
        peak: the most that the pass held behind the last call.
        work: done behind the last call.
        recording: the order of the layers, and which share an input.
    """

    calls: tuple[Call, ...]
    peak: int
    work: Work
    recording: Recording

    @property
    def whole_peak(self) -> int:
        """The most that the pass held at any time."""
        return max([self.peak, *(call.peak for call in self.calls)])


@dataclass(eq=False)
class _Watch:
    """The pre-hook of all layers."""

    ledger: Ledger
    batch: Batch
    calls: list[Call] = field(default_factory=list)
    before: Work = field(default_factory=Work)

    def __call__(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = lockstep.Arrival(0, 0, args, kwargs).input
        mask = attention_mask(self.batch, name, x)
        padding = 0 if mask is None or isinstance(mask, FakeTensor) else int((mask == 0).sum())
        layer_input = Input(tuple(x.shape), tuple(x.stride()), x.dtype, x.device, mask is not None)
        self.calls.append(
            Call(name, self.ledger.live, self.ledger.restart(), self.since(), layer_input, padding)
        )

    def since(self) -> Work:
        """Work done since it was asked for last."""
        before, self.before = self.before, self.ledger.work
        return self.ledger.work - before


def trace(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batch: Batch,
    forward: Forward,
    fake: FakeTensorMode | None,
) -> Trace:
    """Run a batch through a model, as a calibration does.

    Args:
        model: with its composites split.
        modules: the layers that are watched, by name.
        batch: one like those of the calibration; stand-ins for it, if ``fake`` is given.
        forward: how it is run.
        fake: of the tensors without values; ``None`` computes everything.

    Raises:
        CalibrationError: the pass calls none of the layers.
    """
    ledger = Ledger(fake)
    watch = _Watch(ledger, batch)

    def run() -> None:
        with ledger:
            forward(model, moved_to(batch, entry_device(model)))

    hooks = [
        module.register_forward_pre_hook(functools.partial(watch, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            recording = record(modules, run)
    finally:
        for hook in hooks:
            hook.remove()
    if modules and not watch.calls:
        raise CalibrationError(
            "the example batch reached none of the layers that are to be quantised; give a batch, "
            "and a forward, like those of calibrate"
        )
    return Trace(tuple(watch.calls), ledger.restart(), watch.since(), recording)
