"""`plan`: one pass on tensors without values, in the place of a calibration."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tsq_layers.calibration import preparation as preparations
from tsq_layers.calibration.preparation import Preparation
from tsq_layers.calibration.schedule import all_callers, callers_of
from tsq_layers.config import QuantConfig
from tsq_layers.errors import CalibrationError, ConfigError, StateError
from tsq_layers.layers.offloading import entry_device, is_offloaded
from tsq_layers.passes.batches import Batch, Forward, default_forward
from tsq_layers.passes.pass_state import restored
from tsq_layers.planning.course import Course
from tsq_layers.planning.fake import StandIns
from tsq_layers.planning.ledger import Work
from tsq_layers.planning.needs import Needs
from tsq_layers.planning.outcome import outcome, sees_too_few
from tsq_layers.planning.parts import Passes
from tsq_layers.planning.plan import MeasuredBy, Plan
from tsq_layers.planning.speed import solver_seconds, speed
from tsq_layers.planning.trace import Trace, trace
from tsq_layers.reports import Report

_THREAD_BYTES = 2_200_000  # packed operands that MKL keeps for the next product; measured, less for small weights


def plan(
    model: nn.Module,
    config: QuantConfig,
    example_batch: Batch,
    n_batches: int,
    *,
    forward: Forward = default_forward,
    paired: bool | None = None,
    held_out: int = 0,
    offload: torch.device | str | None = None,
) -> Plan:
    """Say what :func:`~tsq_layers.calibrate` will need, before it is run: memory, time, and the size of the result.

    One batch is run through the model on tensors without values: nothing is computed and nothing
    allocated but a few masks. A model whose course depends on values, as routing to experts does,
    is run for real, once. The model is left as it was: its parameters, buffers, and attributes of
    its modules. (A tensor without values that a forward puts elsewhere, into a cache of a function
    for example, would stay there.)

    Seconds are those of this machine, with the model where it is; for a model on the meta device, on the CPU.
    They are those of rounding, GPTQ and two-stage: what a configuration adds to these is named in
    :attr:`Plan.not_counted`.

    Args:
        model: not prepared; may be on the meta device, if its course does not depend on values.
        config: what would be done.
        example_batch: a batch like those of the calibration; ``None`` if there are to be none.
        n_batches: how many there would be; 0 only if no layer needs calibration.
        forward, paired: as for ``calibrate``.
        offload: as for ``calibrate``. For a model on the meta device it is taken to be another device than the model's.
        held_out: number of held-out batches.

    Raises:
        StateError, ConfigError, LayerError: as ``prepare`` says.
        ConfigError: a number of batches that is not allowed.
        CalibrationError: the batch reaches no layer, or the model is on the meta device and its
            course depends on values.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
        >>> found = plan(model, QuantConfig(bits=4, group_size=32), torch.randn(512, 64), n_batches=4)
        >>> [(stage.names, stage.tokens) for stage in found.stages]
        [(('0',), 2048), (('2',), 2048)]
        >>> found.size_before, found.size_after
        (74784, 12480)
        >>> found.few_tokens[0].names
        ('2',)
    """
    _check(model, n_batches, held_out)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with restored(model):
        empty = _fill_in(model, fake)
        preparation = _inspected(model, config, fake)
        if paired is None:
            paired = any(target.config.uses_deviation for target in preparation.targets.values())
        measured = _measured(
            model, preparation, example_batch, n_batches, forward, fake, empty=empty
        )
        device = entry_device(model) or torch.device("cpu")
        away = offload is not None and (empty or torch.device(offload).type != device.type)
        course, result = _course(
            model, preparation, measured.trace, Passes(n_batches, paired, held_out, away), fake
        )
    return Plan(
        config=config,
        batches=n_batches,
        held_out=held_out,
        paired=paired,
        offload=None if offload is None else str(offload),
        measured_by=measured.by,
        reason=measured.reason,
        recording=0 if measured.trace is None else measured.trace.whole_peak,
        batch_bytes=_batch_bytes(example_batch) * (n_batches + held_out),
        thread_bytes=0 if measured.trace is None else _thread_bytes(course, device),
        stages=tuple(stage.frozen() for stage in course.stages.values()),
        layers=result.layers,
        coverage=result.coverage,
        size_before=result.size_before,
        size_after=result.size_after,
        bits_per_weight=result.bits_per_weight,
        seconds=_seconds(course, measured.trace, device),
        experts=tuple(
            name for name, target in course.targets.items() if sees_too_few(target, course)
        ),
    )


def _check(model: nn.Module, n_batches: int, held_out: int) -> None:
    if not isinstance(model, nn.Module):
        raise StateError(f"the model is a {type(model).__name__}; give an nn.Module")
    for name, value in (("n_batches", n_batches), ("held_out", held_out)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{name}={value!r}: give an integer of at least 0")


def _fill_in(model: nn.Module, fake: FakeTensorMode) -> bool:
    """Put stand-ins into a model on the meta device; whether it was on it."""
    empty = any(
        parameter.is_meta and not is_offloaded(module)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    if empty:
        StandIns(fake).put(model)
    return empty


def _inspected(model: nn.Module, config: QuantConfig, fake: FakeTensorMode) -> Preparation:
    """Prepare a model without looking at its values (but those that a hook must bring), and leave that on it."""
    brought = any(map(is_offloaded, model.modules()))
    with nullcontext() if brought else _TakenForSound(fake):
        preparation = preparations.inspect(model, config)
    preparations.store(model, preparation)
    return preparation


class _TakenForSound(TorchDispatchMode):
    """Computes nothing but views, and answers whether weights are finite with yes."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        with nullcontext() if function.is_view else self._fake:
            return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Measured:
    """One pass, how it was run, and why it was a real one."""

    trace: Trace | None
    by: MeasuredBy
    reason: str = ""


def _measured(
    model: nn.Module,
    preparation: Preparation,
    batch: Batch,
    n_batches: int,
    forward: Forward,
    fake: FakeTensorMode,
    *,
    empty: bool,
) -> _Measured:
    """Run one pass without values; if that cannot be, and the model is not ``empty``, a real one."""
    targets = preparation.targets.values()
    if n_batches == 0:
        if any(target.observed for target in targets):
            raise ConfigError(
                "n_batches=0, but layers need calibration; give a positive number, or method='rtn'"
            )
        return _Measured(None, "no pass")
    modules = {
        name: preparation.modules[name]
        for target in targets
        for name in callers_of(target, preparation.modules)
    }
    try:
        with restored(model):
            stand_ins = StandIns(fake)
            stand_ins.put(model)
            return _Measured(
                trace(model, modules, stand_ins.of_all(batch), forward, fake), "fake pass"
            )
    except CalibrationError:
        raise
    except Exception as error:
        # A forward may do anything with values that are not there.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if empty:
            raise CalibrationError(
                f"a pass without values is not possible ({reason}) and the model is on the meta "
                "device; load its weights, so that one real pass can be run"
            ) from error
    return _Measured(
        trace(model, modules, batch, forward, None), "real pass", f"without values: {reason}"
    )


def _course(
    model: nn.Module,
    preparation: Preparation,
    found: Trace | None,
    passes: Passes,
    fake: FakeTensorMode,
) -> tuple[Course, Report]:
    """The stages of the calibration, and what the model will be like."""
    targets = preparation.targets
    callers = all_callers(targets, preparation.modules)
    with restored(model):
        StandIns(fake).put(model)
        course = Course(targets, callers, passes, Needs(fake))
        course.run(found)
        return course, outcome(model, preparation, course, paired=passes.paired)


def _batch_bytes(batch: Batch) -> int:
    """Bytes of the tensors of a batch."""
    tensors = [value for value in pytree.tree_leaves(batch) if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _thread_bytes(course: Course, device: torch.device) -> int:
    """Return the bytes that MKL keeps in the threads of all passes."""
    if course.passes.away or device.type != "cpu" or not torch.backends.mkl.is_available():
        return 0
    largest = max(4 * target.shape[0] * target.shape[1] for target in course.targets.values())
    return course.passes.count * min(_THREAD_BYTES, largest)


def _seconds(course: Course, found: Trace | None, device: torch.device) -> dict[str, float]:
    """Estimates, in the dtype that most weights have."""
    weights: Counter[torch.dtype] = Counter()
    for target in course.targets.values():
        weights[target.weight.dtype] += target.shape[0] * target.shape[1]
    dtype = weights.most_common(1)[0][0]
    recording = Work() if found is None else sum((call.work for call in found.calls), found.work)
    return {
        "passes": speed(device, dtype).seconds(course.forward + recording),
        "statistics": speed(device, torch.float32).seconds(course.observing),
        "solver": sum(solver_seconds(solve, device) for solve in course.solves),
    }
