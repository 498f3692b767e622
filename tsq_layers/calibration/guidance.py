"""GuidedQuant: how much each token matters to the loss of the whole model, for groups of output channels.

arXiv 2505.07004. To second order, an error e = (Q − W) x of a layer's output changes the end loss ℓ by
½ Σ_c (∂ℓ/∂z_c)² e_c² (Fisher information, its diagonal), z the layer's output. With the squares averaged
over each of k contiguous groups of output channels,

    s_{k,t} = mean over c in group k of (∂ℓ/∂z_{c,t})²,        H_k = Σ_t s_{k,t} x_t x_tᵀ,

the rows of group k are solved under H_k; R likewise. The weights of a group are divided by their mean, so
that H_k has the size that H has.

Unlike there, weights are then drawn towards 1, that is, H_k towards H, until the tokens are worth at least
half their number: (Σ s)² ≥ ½ T Σ s². Squared gradients have heavy tails. Of 2,048 tokens the gradients of a
value projection of SmolLM2-135M are worth 2 to 20, since one token, at which attention rests, has nearly
all of them; H_k would be the outer products of so few.

The loss is taken to be a mean over the tokens of a batch: gradients are multiplied by their number, so that a token
weighs alike in long and short batches. Tokens without a gradient, padding above all, are left out of means.

The gradients come from one forward and one backward pass of the full-precision model for each batch, with
hooks on the outputs of the layers. No gradient of a parameter is computed.
"""

import functools
import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.errors import CalibrationError, UnguidedLayerWarning
from tsq_layers.numerics.sync import to_host
from tsq_layers.passes.batches import Batch, Forward, with_items

Loss = Callable[[nn.Module, Batch], Tensor]

_IGNORED = -100  # a label that cross-entropy leaves out
_LARGEST_VARIANCE = 1.0  # of weights with mean 1: T tokens are worth T / (1 + variance)


@dataclass(frozen=True)
class Watched:
    """A layer whose tokens are weighted.

    Args:
        module: in the full-precision model; its output is (…, N).
        groups: k, a divisor of N.
    """

    module: nn.Module
    groups: int


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """The weights of the tokens in the calls of every layer, mean 1.

    Attributes:
        calls: layer → batch → one float32 tensor (T, k) for each call, in order.
    """

    calls: Mapping[str, Mapping[int, Sequence[Tensor]]]

    def of(self, name: str, batch: int, call: int) -> Tensor | None:
        """The weights of a call's tokens (T, k); ``None`` if the gradient pass did not see the call."""
        calls = self.calls.get(name, {}).get(batch, ())
        return calls[call] if call < len(calls) else None


def groups_of(rows: int, wanted: int) -> int:
    """The largest number of equal groups of channels up to the wanted one.

    Example:
        >>> groups_of(576, 4), groups_of(9, 4), groups_of(7, 4)
        (4, 3, 1)
    """
    return max(count for count in range(1, wanted + 1) if rows % count == 0)


def token_weights(
    model: nn.Module, layers: Mapping[str, Watched], batches: Sequence[Batch], loss: Loss
) -> TokenWeights:
    """One forward and one backward pass for each batch.

    Args:
        model: in full precision and evaluation mode; unchanged afterwards.
        layers: name → what is watched.
        batches: on the model's device.
        loss: the scalar loss of a batch, a mean over its tokens.

    Raises:
        CalibrationError: the loss is no scalar that depends on the layers, or is NaN or inf for a batch.

    Warns:
        UnguidedLayerWarning: the loss has no gradient at the output of a layer that was called.
    """
    calls: dict[str, dict[int, list[Tensor]]] = defaultdict(dict)
    without: dict[str, None] = {}
    losses = []
    for index, batch in enumerate(batches):
        value, squares = _squares_of_batch(model, layers, batch, loss)
        losses.append(value)
        tokens = _tokens_of(squares)
        for name, entries in squares.items():
            parts = [part for part in entries if part is not None]
            if len(parts) == len(entries):
                # Squared gradients of the sum of the losses of a batch's tokens, from those of their mean.
                calls[name][index] = [part * tokens.to(part).square() for part in parts]
            else:
                without[name] = None
    for index, number in enumerate(to_host(*losses)):
        if not math.isfinite(number):
            raise CalibrationError(
                f"guidance: the loss of batch {index} is {number}; leave that batch out, or look "
                "at its labels (a mean over none is NaN)"
            )
    if not calls:
        raise CalibrationError(
            "guidance: no layer's output has a gradient; check that the loss depends on the model"
        )
    if without:
        examples = ", ".join([*without][:5]) + (", …" if len(without) > 5 else "")
        warnings.warn(
            f"guidance: the loss has no gradient at the output of {len(without)} layers in some "
            f"batches, where all their tokens count alike: {examples}; "
            "check that the loss depends on them, and that they do not run in torch.no_grad() or a "
            "reentrant checkpoint",
            UnguidedLayerWarning,
            stacklevel=4,
        )
    return TokenWeights({name: _tempered(parts) for name, parts in calls.items()})


def _tokens_of(squares: Mapping[str, Sequence[Tensor | None]]) -> Tensor:
    """Return how many tokens of a batch the loss depends on.

    These are as many as any call of a layer saw; other calls see a part of them.
    """
    counts = [
        _reached(part).sum() for parts in squares.values() for part in parts if part is not None
    ]
    return (
        torch.stack([count.to(counts[0].device) for count in counts]).max()
        if counts
        else torch.ones(())
    )


def _reached(squares: Tensor) -> Tensor:
    """Tokens that the loss depends on (T,): not padding."""
    return squares.sum(-1) > 0


def _tempered(calls: Mapping[int, Sequence[Tensor]]) -> dict[int, list[Tensor]]:
    """Return s_{k,t} of one layer, batch → calls, divided by their mean and drawn towards 1.

    Mean and share are those of the tokens that the loss depends on.
    """
    every = torch.cat([part for parts in calls.values() for part in parts])
    reached = _reached(every).unsqueeze(-1)
    count = reached.sum().clamp(min=1)
    mean = every.sum(0) / count
    relative = {
        batch: [torch.where(mean > 0, part / mean, 1) for part in parts]
        for batch, parts in calls.items()
    }
    every = torch.cat([part for parts in relative.values() for part in parts])
    variance = ((every - 1).square() * reached).sum(0) / count
    share = (_LARGEST_VARIANCE / variance).sqrt().clamp(max=1)  # of what is above or below 1
    return {batch: [1 + share * (part - 1) for part in parts] for batch, parts in relative.items()}


def _squares_of_batch(
    model: nn.Module, layers: Mapping[str, Watched], batch: Batch, loss: Loss
) -> tuple[Tensor, dict[str, list[Tensor | None]]]:
    """The loss, and the mean squared gradients at the tokens in every call (T, k), ``None`` where none arrived."""
    watch = _Watch()
    with _frozen(model), watch.over(layers), torch.inference_mode(False), torch.enable_grad():
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise CalibrationError(
                f"guidance: the loss is {_described(value)}; give loss=f(model, batch) that "
                "returns a scalar tensor with a gradient"
            )
        watch.forward = False
        value.backward()
    return value.detach(), watch.squares


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + (
            "" if value.requires_grad else " without gradient"
        )
    return f"a {type(value).__name__}"


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient: then only activations do, from the first layer that is watched on."""
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Watch:
    """The weights of every call's tokens, as gradients arrive.

    Attributes:
        squares: layer → one entry a call.
        forward: whether calls are those of the forward pass. What is checkpointed runs again in the backward pass:
            its layers then do what they did, but nothing new is recorded.
    """

    def __init__(self) -> None:
        self.squares: dict[str, list[Tensor | None]] = defaultdict(list)
        self.forward = True

    @contextmanager
    def over(self, layers: Mapping[str, Watched]) -> Iterator[None]:
        """Inside, the outputs of the layers are watched."""
        handles = [
            watched.module.register_forward_hook(
                functools.partial(self._called, name, watched.groups)
            )
            for name, watched in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(
        self,
        name: str,
        groups: int,
        module: nn.Module,  # noqa: ARG002
        args: Any,  # noqa: ARG002
        output: Tensor,
    ) -> Tensor | None:
        place, calls = len(self.squares[name]), self.squares[name]
        if self.forward:
            calls.append(None)
        if not torch.is_grad_enabled():
            return None
        # The first layers depend on nothing that takes a gradient. A leaf could not be changed in
        # place by what follows.
        output = output if output.requires_grad else output.detach().requires_grad_().clone()

        def arrived(gradient: Tensor) -> None:
            squares = (
                gradient.detach()
                .float()
                .square()
                .unflatten(-1, (groups, -1))
                .mean(-1)
                .reshape(-1, groups)
            )
            before = calls[place]
            calls[place] = squares if before is None else before + squares

        if self.forward:
            output.register_hook(arrived)
        return output


def model_loss(model: nn.Module, batch: Batch, forward: Forward) -> Tensor:
    """The loss that the model itself returns, ``out.loss``.

    A causal language model of transformers is given the tokens of a batch as labels, if it has none;
    padding is left out by the ``attention_mask``.

    Raises:
        CalibrationError: its output has no loss.
    """
    if (
        isinstance(batch, Mapping)
        and "labels" not in batch
        and _is_causal(model)
        and "input_ids" in batch
    ):
        labels = batch["input_ids"]
        mask = batch.get("attention_mask")
        batch = with_items(
            batch, {"labels": labels if mask is None else labels.masked_fill(mask == 0, _IGNORED)}
        )
    output = forward(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise CalibrationError(
            f"guidance needs the loss of the whole model, and the output of {type(model).__name__} "
            "has none; put labels into the batches, or give loss=f(model, batch)"
        )
    return loss  # type: ignore[no-any-return]


def _is_causal(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and (
        "labels" in inspect.signature(model.forward).parameters
    )
