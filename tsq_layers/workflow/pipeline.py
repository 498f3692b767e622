"""`prepare`, `calibrate`, and `quantize`: these and `convert` in one call."""

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from tsq_layers.calibration import preparation as preparations
from tsq_layers.calibration.coverage import check_share
from tsq_layers.calibration.distillation import Distance, Student, distil
from tsq_layers.calibration.guidance import Loss, TokenWeights, Watched, model_loss, token_weights
from tsq_layers.calibration.journal import Journal
from tsq_layers.calibration.journal.resuming import journal_of
from tsq_layers.calibration.preparation import Preparation, guided_layers
from tsq_layers.calibration.run import Calibration, RunOptions
from tsq_layers.calibration.schedule import callers_of
from tsq_layers.calibration.solving import warn_few_tokens
from tsq_layers.calibration.targets import Solved
from tsq_layers.config import QuantConfig
from tsq_layers.errors import StateError
from tsq_layers.layers.offloading import entry_device
from tsq_layers.passes.batches import (
    Batch,
    Forward,
    PaddingMask,
    attention_mask,
    checked_batches,
    copied_to,
    default_forward,
    evaluating,
    moved_to,
)
from tsq_layers.passes.offload import ActivationOffload
from tsq_layers.workflow.conversion import check_attainable, convert_prepared, warn_never_called


def prepare(model: nn.Module, config: QuantConfig) -> nn.Module:
    """Attach an observer to every layer that ``config`` does not skip. Changes no output.

    Undone by :func:`unprepare`. Between ``prepare`` and :func:`convert` either call
    :func:`calibrate`, or run the model on data in a loop of your own; the latter is the one-pass
    form: H from the full-precision model, no deviation.

    Args:
        model: any module on a real device. Targets are its layers of every kind that is registered
            (:func:`tsq_layers.layers.register`):
            linear layers, convolutions, embeddings if ``config`` says so, and the linear layers of which attention
            modules and fused experts consist.
        config: what to do with each.

    Returns:
        the same model.

    Raises:
        StateError: not a module, or one that is already prepared or converted.
        ConfigError: the configuration leaves no layer.
        LayerError: a weight on the meta device, or NaN or inf in it.

    Warns:
        UnmatchedPatternWarning: a pattern of ``config`` matches no layer.
        SkippedLayerWarning: a layer is left alone because its weight is tied to another module's.
        LostZerosWarning: a pruned layer is quantised in a way that cannot hold a zero.

    Example:
        >>> import torch
        >>> from tsq_layers import convert
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> _ = prepare(model, QuantConfig(bits=4, group_size=16))
        >>> for _ in range(8):
        ...     _ = model(torch.randn(64, 32))
        >>> type(convert(model)[0]).__name__
        'QuantLinear'
    """
    _prepare(model, config)
    return model


def _prepare(model: nn.Module, config: QuantConfig) -> Preparation:
    """Sort the layers of a model, and attach observers to those that will be quantised."""
    preparation = preparations.inspect(model, config)
    for name, target in preparation.targets.items():
        if target.observed:
            preparation.observers[name] = target.observer()
    preparations.store(model, preparation)
    preparation.attach()
    return preparation


def unprepare(model: nn.Module) -> nn.Module:
    """Undo :func:`prepare`: the model is as it was before.

    Raises:
        StateError: the model is not prepared.
    """
    preparations.remove(model)
    return model


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    held_out: Iterable[Batch] | None = None,
    paired: bool | None = None,
    forward: Forward = default_forward,
    padding_mask: PaddingMask = attention_mask,
    loss: Loss | None = None,
    distance: Distance | None = None,
    offload: torch.device | str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Solve every layer, sequentially, from paired passes. :func:`convert` then swaps them in.

    Every batch runs through the network twice, once in full precision and once with every layer
    quantised that comes before; all passes advance together from layer to layer, and a layer is
    solved when they reach it. One more pass, on the first batch, records the order of the layers
    and which of them share an input; a layer that it misses is solved last, from all its calls in
    the other batches. Passes end at the last layer that is to be solved. They are all under way at once; what a
    forward changes in attributes of its modules, in random numbers and in settings of torch is each pass's own, both
    passes of a batch draw the same random numbers, and a batch that a model changes in place is copied for each.

    Args:
        model: a prepared model. It runs in evaluation mode without gradients.
        batches: any iterable, taken one by one; a tensor, a tuple (positional arguments) or a dict
            (keyword arguments) each, on any device. Tokens that are 0 in an ``attention_mask`` among the keywords are
            padding and do not count.
        held_out: batches of which only the loss is reported.
        paired: ``False`` leaves the full-precision pass out: half the work, and no deviation.
            ``None`` runs it if the configuration makes use of it.
        forward: ``forward(model, batch)`` runs a batch of any other form.
        padding_mask: ``padding_mask(batch, layer_name, x)`` gives a mask shaped like ``x`` without
            its last dimension (0 is padding), or ``None`` if all tokens count.
        loss: ``loss(model, batch)`` is the scalar that the model is trained for; used where the
            configuration asks for ``guidance``, which takes one forward and one backward pass of every batch,
            all of which are then held at once. A mean over tokens, as losses are. ``None``: the
                ``loss`` of the model's own output.
        distance: ``distance(output, wanted, batch)`` is the scalar that is lowered where the configuration has
            ``distill_epochs``, between outputs of the quantised and the full-precision model; ``None``:
            divergence of logits, or squared error. All batches are then held at once.
        offload: a device, usually ``"cpu"``, to which the activations of waiting passes are moved:
            the device of the model then holds those of one batch at a time.
        checkpoint_dir: a directory in which every layer is kept as soon as it is solved. A calibration that
            was killed, called again in the same way, goes on from there and ends in the very same weights;
            batches must come in the same order.
        progress: show a progress bar; ``None`` shows one on a terminal only.

    Returns:
        the same model, unchanged but for the results that wait for :func:`convert`. When anything
        is raised, a forward's own exception or Ctrl-C included, the model is prepared as before.

    Raises:
        StateError: the model is not prepared, or already calibrated.
        CalibrationError: no batches, NaN or inf in a layer's input; LayerError and
            SingularHessianError as the solver says.
        CheckpointError: ``checkpoint_dir`` belongs to another model, configuration or data (the difference
            is named), is used by another process, or cannot be written.

    Warns:
        FewTokensWarning: a layer saw fewer than 16 tokens for each of its input columns.
        SkippedLayerWarning: a layer was never called; it stays in full precision.
        DampingWarning: a Hessian could be factorised with more damping only.
        SameInputWarning: layers that shared their input in the first pass did not later.
        UnguidedLayerWarning: the loss has no gradient at a layer that was to be guided by it.
        JournalWarning: part of ``checkpoint_dir`` is damaged, and is solved again.
    """
    preparation = preparations.fetch(model, "calibrate")
    if preparation.solved is not None:
        raise StateError(
            "the model is already calibrated; call convert(model), or unprepare(model) to start again"
        )
    request = _Request(
        batches=batches,
        held_out=held_out,
        paired=paired,
        forward=forward,
        padding_mask=padding_mask,
        loss=loss,
        distance=distance,
        offload=offload,
        checkpoint_dir=checkpoint_dir,
        progress=progress,
    )
    _calibrate(model, preparation, request)
    return model


@dataclass(frozen=True, eq=False, kw_only=True)
class _Request:
    """The arguments of :func:`calibrate`."""

    batches: Iterable[Batch]
    held_out: Iterable[Batch] | None
    paired: bool | None
    forward: Forward
    padding_mask: PaddingMask
    loss: Loss | None
    distance: Distance | None
    offload: torch.device | str | None
    checkpoint_dir: str | os.PathLike[str] | None
    progress: bool | None


def _calibrate(model: nn.Module, preparation: Preparation, request: _Request) -> None:
    """Solve the target layers of a preparation, and note the results in it.

    When anything is raised, the observers are attached as before.
    """
    paired = request.paired
    if paired is None:
        paired = any(target.config.uses_deviation for target in preparation.targets.values())
    batches = checked_batches(request.batches, "batches")
    held_out: Iterable[Batch] = ()
    if request.held_out is not None:
        held_out = checked_batches(request.held_out, "held_out")
    parking = None if request.offload is None else ActivationOffload(request.offload, model)
    guided = guided_layers(preparation)
    if guided or preparation.config.distill_epochs:
        batches = list(batches)  # they are run more than once
    start = time.perf_counter()
    preparation.detach()
    try:
        with _journal(model, preparation, request, paired=paired) as journal:
            guidance = None
            if guided:
                guidance = _guidance(model, guided, batches, request.forward, request.loss)
            options = RunOptions(
                batches=batches,
                held_out=held_out,
                paired=paired,
                forward=request.forward,
                padding_mask=request.padding_mask,
                progress=request.progress,
                journal=journal,
                parking=parking,
                guidance=guidance,
            )
            solved = Calibration(model, preparation, options).run()
        if preparation.config.distill_epochs:
            preparation.distances = _distilled(model, preparation, solved, batches, request)
        warn_few_tokens(solved)
        warn_never_called(preparation, solved)
    except BaseException:
        preparation.attach()
        raise
    preparation.solved, preparation.paired = solved, paired
    preparation.seconds = time.perf_counter() - start


def _journal(
    model: nn.Module, preparation: Preparation, request: _Request, *, paired: bool
) -> AbstractContextManager[Journal | None]:
    """Return the context of the journal; one that does nothing where no directory was given."""
    if request.checkpoint_dir is None:
        return nullcontext()
    functions = (request.forward, request.padding_mask, request.loss)
    return journal_of(request.checkpoint_dir, model, preparation, paired, *functions)


def quantize(
    model: nn.Module,
    config: QuantConfig,
    batches: Iterable[Batch] | None = None,
    *,
    held_out: Iterable[Batch] | None = None,
    paired: bool | None = None,
    forward: Forward = default_forward,
    padding_mask: PaddingMask = attention_mask,
    loss: Loss | None = None,
    distance: Distance | None = None,
    offload: torch.device | str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    min_coverage: float = 0.0,
    progress: bool | None = None,
) -> nn.Module:
    """:func:`prepare`, :func:`calibrate` and :func:`convert` in one call; in place.

    Args:
        batches: may be ``None`` if no method in ``config`` needs calibration (``method="rtn"``).

    Everything else, exceptions and warnings too, is as for the three functions. When anything is raised, the model is
    as it was.

    Returns:
        the converted model; a new object only where the model is itself a layer.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> model = quantize(model, QuantConfig(bits=4, group_size=16), [torch.randn(512, 32)])
        >>> model.tsq_report.layers[0].bits
        4
    """
    check_share(min_coverage)
    preparation = _prepare(model, config)
    try:
        check_attainable(preparation, min_coverage)
        if batches is not None:
            request = _Request(
                batches=batches,
                held_out=held_out,
                paired=paired,
                forward=forward,
                padding_mask=padding_mask,
                loss=loss,
                distance=distance,
                offload=offload,
                checkpoint_dir=checkpoint_dir,
                progress=progress,
            )
            _calibrate(model, preparation, request)
        return convert_prepared(model, preparation, min_coverage)
    except BaseException:
        if preparations.is_prepared(model):
            unprepare(model)
        raise


def _guidance(
    model: nn.Module,
    guided: Mapping[str, Watched],
    batches: Iterable[Batch],
    forward: Forward,
    loss: Loss | None,
) -> TokenWeights:
    """Return how much each token counts, from the gradients of the loss."""
    device = entry_device(model)
    function = loss or (lambda model, batch: model_loss(model, batch, forward))
    with evaluating(model):
        copies = [copied_to(batch, device) for batch in batches]
        return token_weights(model, guided, copies, function)


def _distilled(
    model: nn.Module,
    preparation: Preparation,
    solved: Mapping[str, Solved],
    batches: Iterable[Batch],
    request: _Request,
) -> tuple[float, ...]:
    """Train the grids of all solved layers together, and return the distance after each epoch."""
    students = []
    for name, layer in solved.items():
        target = preparation.targets[name]
        for caller in callers_of(target, preparation.modules):
            module = preparation.modules[caller]
            students.append(Student(module, layer.matrix, target.kind.from_matrix))
    device = entry_device(model)
    with evaluating(model):
        distances = distil(
            model,
            students,
            [moved_to(batch, device) for batch in batches],
            lambda model, batch: request.forward(model, copied_to(batch, None)),
            epochs=preparation.config.distill_epochs,
            rate=preparation.config.distill_rate,
            distance=request.distance,
            progress=request.progress,
        )
    return tuple(distances)
