"""Model-wise refinement: all grids on the distance between the outputs of the two models, codes frozen.

Stage 1 fits the scales of a layer group by group, stage 2 to the output of the layer. What is left is the
error of the whole model: here the scales of all layers together (offsets or look-up tables, where a layer
has those) are trained by gradients for the outputs of the quantised model to be those of the full-precision
one on the calibration batches. Codes and zero points stay, so nothing is added to what is stored. Training
only the scales of a quantised model end to end is the second phase of EfficientQAT (arXiv 2407.11062); the
loss there is that of the task.

A grid value is g = g₀ + u·δ, u its own size, so that one learning rate suits all of them; δ starts at 0 and
is trained with Adam, a cosine schedule, and one step for each batch.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from tsq_layers.errors import CalibrationError
from tsq_layers.layers.offloading import with_weight
from tsq_layers.numerics import grid
from tsq_layers.numerics.sync import to_host
from tsq_layers.passes.batches import Batch, Forward, with_input, with_tensors
from tsq_layers.passes.pass_state import put_random_state, random_state
from tsq_layers.runtime import forward as running
from tsq_layers.runtime.linear import QuantLinear

Distance = Callable[[object, object, Batch], Tensor]

_BETAS = (0.9, 0.95)


@dataclass(frozen=True, eq=False)
class Student:
    """A layer of the model and the packed matrix that will take its place.

    Args:
        module: the full-precision layer, which has a ``weight``.
        matrix: its packed matrix; its grids are trained.
        shape: ``shape(module, W)`` gives a matrix (N, K) the form of the layer's ``weight``.
    """

    module: nn.Module
    matrix: QuantLinear
    shape: Callable[[nn.Module, Tensor], Tensor]


@torch.inference_mode(False)
def distil(
    model: nn.Module,
    students: Sequence[Student],
    batches: Sequence[Batch],
    forward: Forward,
    *,
    epochs: int,
    rate: float,
    distance: Distance | None = None,
    progress: bool | None = None,
) -> list[float]:
    """Train the grids of ``students`` in place.

    Args:
        model: in full precision and evaluation mode; the same afterwards.
        students: layers of the model. Several may have the same matrix.
        batches: on the model's device; one step is made for each.
        forward: runs a batch.
        epochs: times that every batch is used.
        rate: learning rate of δ, relative to the size of a grid value.
        distance: scalar of (quantised output, full-precision output, batch); by default
            :func:`output_distance`.
        progress: show a progress bar; ``None`` on a terminal only.

    Returns:
        the mean distance over the batches in each epoch, as met while training; none without students.

    Raises:
        CalibrationError: a distance that is not finite.
    """
    if not students:
        return []
    batches = [with_tensors(batch, _recordable) for batch in batches]
    grids = {student.matrix: _Grids(student.matrix) for student in students}
    parameters = [parameter for trained in grids.values() for parameter in trained.deltas]
    optimiser = torch.optim.Adam(parameters, lr=rate, betas=_BETAS)
    measured, steps = [], epochs * len(batches)
    measure = distance or output_distance
    show = tqdm(
        total=steps, desc="distil", unit="batch", disable=None if progress is None else not progress
    )
    with _gradients_kept(model), show as bar:
        for epoch in range(epochs):
            distances = []
            for index in _shuffled(len(batches), epoch):
                for group in optimiser.param_groups:
                    group["lr"] = rate * (1 + math.cos(math.pi * bar.n / steps)) / 2
                distances.append(_step(model, students, grids, batches[index], forward, measure))
                optimiser.step()
                optimiser.zero_grad()
                model.zero_grad()
                bar.update()
            measured.append(to_host(torch.stack(distances).mean())[0])
            if not math.isfinite(measured[-1]):
                raise CalibrationError(
                    f"distillation: the distance between the models is {measured[-1]} in epoch "
                    f"{epoch + 1} of {epochs}; lower distill_rate, which is {rate}"
                )
    for trained in grids.values():
        trained.store()
    return measured


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the gradients of the model's own parameters are what they were before.

    They take gradients inside all the same: a reentrant checkpoint passes none on to the grids
    unless its input has one.
    """
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.zero_grad()
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _recordable(tensor: Tensor) -> Tensor:
    """A tensor that may be kept for a backward pass, whatever mode it was made in."""
    return tensor.clone() if tensor.is_inference() else tensor


def _shuffled(count: int, epoch: int) -> list[int]:
    return random.Random(epoch).sample(range(count), count)  # noqa: S311  (an order, no secret)


def _step(
    model: nn.Module,
    students: Sequence[Student],
    grids: Mapping[QuantLinear, "_Grids"],
    batch: Batch,
    forward: Forward,
    measure: Distance,
) -> Tensor:
    numbers = random_state()  # both models are to draw the same ones
    with torch.no_grad():
        reference = forward(model, batch)
    put_random_state(numbers)
    with torch.enable_grad(), _quantised(students, grids):
        distance = measure(forward(model, batch), reference, batch)
        if not isinstance(distance, Tensor) or distance.numel() != 1 or not distance.requires_grad:
            raise CalibrationError(
                "distillation: the distance is no scalar tensor with a gradient; give "
                "distance=f(output, wanted, batch) that depends on the output"
            )
        distance.backward()  # type: ignore[no-untyped-call, unused-ignore]
    return distance.detach()


class _Grids:
    """The grids of one packed matrix, as they are trained: scales and offsets, or tables."""

    def __init__(self, matrix: QuantLinear) -> None:
        self.matrix = matrix
        self.start = [values.float() for values in self._values()]
        self.units = [_unit(self.start[0])] * len(self.start)
        self.deltas = [nn.Parameter(torch.zeros_like(values)) for values in self.start]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) that the present grids and the codes give; differentiable."""
        now = [
            start + unit * delta
            for start, unit, delta in zip(self.start, self.units, self.deltas, strict=True)
        ]
        parts = self.matrix.parts
        shifts = now[1] if len(now) > 1 else parts.shifts
        return running.dequantize(
            parts._replace(grids=now[0], shifts=shifts),
            self.matrix.format,
            self.matrix.in_features,
            torch.float32,
        ).to(dtype)

    @torch.no_grad()
    def store(self) -> None:
        """Write the grids into the matrix. Scales stay positive."""
        now = [
            start + unit * delta
            for start, unit, delta in zip(self.start, self.units, self.deltas, strict=True)
        ]
        if now[0].dim() == 2:  # scales
            positive = torch.where(now[0] > 0, now[0], self.start[0])
            now[0] = grid.storable(positive, self.matrix.scale_dtype)
        for values, trained in zip(self._values(), now, strict=True):
            values.copy_(trained)

    def _values(self) -> list[Tensor]:
        """Views of what the matrix stores."""
        shifts = self.matrix.shifts
        offsets = [shifts] if shifts is not None and shifts.is_floating_point() else []
        return [self.matrix.grids, *offsets]


def _unit(grids: Tensor) -> Tensor:
    """The size of a change: a scale itself, the spread of a table."""
    if grids.dim() == 2:
        return grids.abs()
    return grids.std(-1, keepdim=True) if grids.shape[-1] > 1 else grids.abs()


@contextmanager
def _quantised(students: Sequence[Student], grids: Mapping[QuantLinear, _Grids]) -> Iterator[None]:
    """Inside, the layers run with their quantised weights, which gradients reach.

    Neither the weights nor the codes in float are kept for the backward pass: they are made again there.
    """
    undo: list[tuple[dict[str, Any], Any]] = []
    try:
        for student in students:
            attributes = vars(student.module)
            undo.append((attributes, attributes.get("forward")))
            attributes["forward"] = _forward(student, grids[student.matrix])
        yield
    finally:
        for attributes, before in reversed(undo):
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before


def _forward(student: Student, trained: _Grids) -> Callable[..., Any]:
    module, forward = student.module, student.module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        weight = student.shape(module, trained.weight(module.weight.dtype))  # type: ignore[arg-type]
        return with_weight(module, forward, weight, args, kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        if student.matrix.activation_bits is not None:
            args, kwargs = with_input(student.matrix.rounded_input, args, kwargs)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return call


def output_distance(quantised: object, wanted: object, batch: Batch) -> Tensor:
    """Return the distance of an output from that of the full-precision model.

    ``logits`` of a transformers output: the Kullback–Leibler divergence of the predicted distributions, mean
    over tokens; those that an ``attention_mask`` among the batch's keywords calls padding do not count. Any
    other output: the squared error of its first tensor, relative to the square of the wanted one.

    Raises:
        CalibrationError: the output holds no tensor.
    """
    if getattr(wanted, "logits", None) is not None:
        logits, targets = (value.logits.float() for value in (quantised, wanted))  # type: ignore[attr-defined]
        divergence = F.kl_div(
            logits.log_softmax(-1), targets.log_softmax(-1), reduction="none", log_target=True
        )
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        per_token = divergence.sum(-1)
        if isinstance(mask, Tensor) and mask.shape == per_token.shape:
            return (per_token * mask).sum() / mask.sum()
        return per_token.mean()
    output, goal = (_first_tensor(value) for value in (quantised, wanted))
    return (output.float() - goal.float()).square().sum() / goal.float().square().sum()


def _first_tensor(output: object) -> Tensor:
    """The output itself, or the first floating-point tensor of a tuple, list or mapping."""
    values: Sequence[object] = [output]
    if isinstance(output, Mapping):
        values = list(output.values())
    elif isinstance(output, Sequence):
        values = output
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise CalibrationError(
        f"distillation: the model's output is a {type(output).__name__} without a tensor; give "
        "distance=f(quantised output, full-precision output, batch)"
    )
