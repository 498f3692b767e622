"""`HessianObserver`: what calibration learns about the inputs of a layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.errors import CalibrationError
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.passes.modes import full_precision
from tsq_layers.passes.recording import first_tensor

_PANEL = 128  # columns of H updated by one matrix product; narrower panels waste fewer flops on the half not kept
_CHUNK_ELEMENTS = 2**20  # inputs that are rearranged by block at once: bounds the copy

_Call = tuple[
    Tensor, Tensor | None, Tensor | None
]  # inputs, those of the full-precision stream, where padding is


@dataclass(frozen=True, eq=False)
class Call:
    """What a layer was given in one call; the arguments of :meth:`HessianObserver.observe`."""

    x: Tensor
    reference: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None

    def add_to(self, observer: "HessianObserver") -> None:
        """Let an observer see it."""
        observer.observe(self.x, self.reference, self.mask, self.weights)

    def split(self, last: int, dims: int = 1) -> tuple["Call", "Call"]:
        """The first tokens, and the ``last`` ones.

        Args:
            last: how many.
            dims: dimensions of a token, 1 for (K,) and 2 for (B, K).

        Example:
            >>> first, last = Call(torch.zeros(2, 10, 8)).split(4)
            >>> first.x.shape, last.x.shape
            (torch.Size([16, 8]), torch.Size([4, 8]))
        """
        count = self.x.shape[:-dims].numel()
        border = count - last

        def parts(values: Tensor | None, kept: int) -> list[Tensor | None]:
            if values is None:
                return [None, None]
            flat = values.reshape(count, *values.shape[values.dim() - kept :])
            return [flat[:border], flat[border:]]

        given = (
            parts(self.x, dims),
            parts(self.reference, dims),
            parts(self.mask, 0),
            parts(None if self.weights is None else self.weights.reshape(count, -1), 1),
        )
        return tuple(Call(*(part[index] for part in given)) for index in (0, 1))  # type: ignore[arg-type, return-value]

    def split_kept(self, last: Tensor, most: int, dims: int = 1) -> tuple["Call", "Call"]:
        """The same where some tokens are padding, which are not counted; without asking the device how many are none.

        Args:
            last: how many, an integer scalar.
            most: that it is at most.
            dims: as in :meth:`split`.

        Example:
            >>> call = Call(torch.arange(4.0).reshape(4, 1), mask=torch.tensor([1, 1, 1, 0]))
            >>> first, last = call.split_kept(torch.tensor(1), most=2)
            >>> first.mask, last.x[last.mask]
            (tensor([ True,  True, False, False]), tensor([[2.]]))
        """
        assert self.mask is not None
        kept = self.mask.reshape(-1) != 0
        rank = kept.cumsum(0)
        held = kept & (rank > kept.sum() - last)
        places = held.to(torch.uint8).argsort(stable=True)[len(held) - most :]

        def part(values: Tensor | None, dims: int) -> Tensor | None:
            return (
                None
                if values is None
                else values.reshape(len(kept), *values.shape[values.dim() - dims :])[places]
            )

        weights = None if self.weights is None else self.weights.reshape(len(kept), -1)
        return (
            Call(self.x, self.reference, kept & ~held, self.weights),
            Call(part(self.x, dims), part(self.reference, dims), held[places], part(weights, 1)),  # type: ignore[arg-type]
        )


class HessianObserver(nn.Module):
    """Accumulates Σ x xᵀ, Σ (x − x̃) xᵀ and the number of tokens over the inputs of a layer.

    Usable alone as a forward pre-hook (the full-precision model's H, no deviation), or fed with
    :meth:`observe`. The sums are buffers: they follow ``.to(device)`` and are saved in a
    state_dict. They are made on the device of the first input.

    Args:
        columns: K, the width of the layer's input.
        blocks: B, how many blocks of rows of the weight have inputs of their own (the groups of a
            convolution). A token then is a matrix (B, K), and the sums are (B, K, K).
        dtype: of the sums, float32 or float64.

    Raises:
        CalibrationError: another dtype, or no blocks.

    Example:
        >>> layer = nn.Linear(16, 8)
        >>> observer = HessianObserver(16)
        >>> handle = layer.register_forward_pre_hook(observer)
        >>> _ = layer(torch.randn(4, 10, 16))
        >>> handle.remove()
        >>> int(observer.statistics().count)
        40
        >>> grouped = HessianObserver(9, blocks=32)
        >>> grouped.observe(torch.randn(50, 32, 9))
        >>> tuple(grouped.statistics().hessian.shape)
        (32, 9, 9)
    """

    hessian: Tensor
    deviation: Tensor | None
    count: Tensor

    def __init__(
        self, columns: int, *, blocks: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.float64):
            raise CalibrationError(f"observer dtype {dtype}: give torch.float32 or torch.float64")
        if blocks < 1:
            raise CalibrationError(
                f"observer of {blocks} blocks: give a positive number, 1 if all rows share inputs"
            )
        self.columns, self.blocks, self.dtype = columns, blocks, dtype
        self.register_buffer("hessian", None)
        self.register_buffer("deviation", None)
        self.register_buffer("count", None)

    def forward(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """The pre-hook: observe the layer's first tensor argument, change nothing.

        Raises:
            CalibrationError: there is none; torch tells a hook of arguments by name only if that is asked for.
        """
        x = first_tensor(args, kwargs or {})
        if x is None:
            raise CalibrationError(
                "the observer saw a call without a tensor; if the layer is called with arguments by name, register it by register_forward_pre_hook(observer, with_kwargs=True)"
            )
        self.observe(x)

    @torch.no_grad()
    def observe(
        self,
        x: Tensor,
        reference: Tensor | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Add the tokens of one call.

        Args:
            x: inputs on the quantised stream, any float dtype (…, K), or (…, B, K) with B > 1 blocks.
            reference: the same tokens' inputs on the full-precision stream, shaped like ``x``;
                either every call has one or none has.
            mask: bool or integer (…), 0 where a token is padding and does not count.
            weights: float (…, B): how much each token counts in the sums of each block. All blocks then have
                the same inputs, (…, K). The number of tokens is not weighted.

        Raises:
            CalibrationError: shapes that do not fit, or calls with and without reference mixed.
        """
        if weights is not None:
            self._observe_weighted(x, reference, mask, weights)
            return
        self._check(x, reference, mask, self.blocks)
        tokens = x.shape[:-1] if self.blocks == 1 else x.shape[:-2]
        padding = None if mask is None else mask.reshape(tokens) == 0
        count = tokens.numel() if padding is None else (~padding).sum()
        self._allocate(x.device, reference is not None)
        self.count += count
        call = (x, reference, padding)
        with full_precision():
            for piece in (call,) if self.blocks == 1 else _pieces(call):
                self._add(*piece)

    def _observe_weighted(
        self, x: Tensor, reference: Tensor | None, mask: Tensor | None, weights: Tensor
    ) -> None:
        """As if every block had seen inputs of its own, √w·x, but without making them."""
        self._check(x, reference, mask, 1)
        count = x.shape[:-1].numel()
        if weights.numel() != count * self.blocks:
            raise CalibrationError(
                f"x has shape {tuple(x.shape)} and its weights {tuple(weights.shape)}; they need one for each token and block, {count}×{self.blocks}"
            )
        kept = (
            torch.ones(count, dtype=torch.bool, device=x.device)
            if mask is None
            else mask.reshape(count) != 0
        )
        self._allocate(x.device, reference is not None)
        self.count += kept.sum()
        rows, other = x.reshape(count, self.columns), None
        if reference is not None:
            other = reference.reshape(count, self.columns)
        with full_precision():
            size = max(1, _CHUNK_ELEMENTS // (self.columns * self.blocks))
            for start in range(0, count, size):
                part = slice(start, start + size)
                factors = weights.reshape(count, self.blocks)[part].to(self.dtype)
                given = (rows[part], None if other is None else other[part])
                self._add_weighted(*given, factors, kept[part])

    def _add_weighted(
        self, x: Tensor, reference: Tensor | None, weights: Tensor, kept: Tensor
    ) -> None:
        tokens = x.to(self.dtype).masked_fill(~kept.unsqueeze(1), 0)
        weighted = tokens * weights.mT.unsqueeze(-1)
        hessian = self.hessian.view(self.blocks, self.columns, self.columns)
        for start in range(0, self.columns, _PANEL):
            right = tokens[:, start:].expand(self.blocks, -1, -1)
            _add_product(
                hessian[..., start : start + _PANEL, start:],
                weighted[..., start : start + _PANEL],
                right,
            )
        if reference is not None and self.deviation is not None:
            deviation = self.deviation.view(self.blocks, self.columns, self.columns)
            moved = tokens - reference.to(self.dtype).masked_fill(~kept.unsqueeze(1), 0)
            _add_product(deviation, moved.expand(self.blocks, -1, -1), weighted)

    def _add(self, x: Tensor, reference: Tensor | None, padding: Tensor | None) -> None:
        tokens = self._tokens(x, padding)
        for start in range(0, self.columns, _PANEL):
            panel = tokens[..., start : start + _PANEL]
            _add_product(
                self.hessian[..., start : start + _PANEL, start:], panel, tokens[..., start:]
            )
        if reference is not None and self.deviation is not None:
            _add_product(self.deviation, tokens - self._tokens(reference, padding), tokens)

    @torch.inference_mode(False)
    def statistics(self) -> LayerStatistics:
        """The sums so far.

        Raises:
            CalibrationError: nothing was observed.
        """
        if self.hessian is None:
            raise CalibrationError("the observer saw no input; run data through the layer first")
        upper = self.hessian.triu()
        return LayerStatistics(
            upper + upper.triu(1).mT,
            self.count.clone(),
            None if self.deviation is None else self.deviation.clone(),
        )

    def reset(self) -> None:
        """Forget everything."""
        self.hessian = self.deviation = self.count = None  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """Width, blocks and dtype, for ``repr``."""
        blocks = f", blocks={self.blocks}" if self.blocks > 1 else ""
        return f"columns={self.columns}{blocks}, dtype={self.dtype}"

    def _check(self, x: Tensor, reference: Tensor | None, mask: Tensor | None, blocks: int) -> None:
        token = (blocks, self.columns) if blocks > 1 else (self.columns,)
        if tuple(x.shape[-len(token) :]) != token or not x.is_floating_point():
            wanted = ", ".join(map(str, token))
            raise CalibrationError(
                f"the observer was given {x.dtype} of shape {tuple(x.shape)}; give floating point (…, {wanted})"
            )
        if reference is not None and reference.shape != x.shape:
            raise CalibrationError(
                f"x has shape {tuple(x.shape)} and its reference {tuple(reference.shape)}; both must agree"
            )
        if mask is not None and mask.numel() * blocks * self.columns != x.numel():
            raise CalibrationError(
                f"x has shape {tuple(x.shape)} and its mask {tuple(mask.shape)}; the mask has one entry a token"
            )
        if self.hessian is not None and (reference is None) != (self.deviation is None):
            raise CalibrationError(
                "calls with and without a reference were mixed; give one in every call or in none"
            )

    def _tokens(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Inputs as rows (T, K), or (B, T, K); padding becomes 0, whatever stood there (NaN · 0 is not 0)."""
        if self.blocks == 1:
            tokens = x.reshape(-1, self.columns)
        else:
            tokens = x.reshape(-1, self.blocks, self.columns).transpose(0, 1).contiguous()
        tokens = tokens.to(self.dtype)
        return tokens if padding is None else tokens.masked_fill(padding.reshape(-1, 1), 0)

    def _allocate(self, device: torch.device, paired: bool) -> None:
        if self.hessian is not None:
            return
        square = (
            (self.columns, self.columns)
            if self.blocks == 1
            else (self.blocks, self.columns, self.columns)
        )
        with torch.inference_mode(
            False
        ):  # an inference tensor could not be added to outside of inference mode
            self.hessian = torch.zeros(square, dtype=self.dtype, device=device)
            self.count = torch.zeros((), dtype=torch.int64, device=device)
            if paired:
                self.deviation = torch.zeros(square, dtype=self.dtype, device=device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if (
            prefix + "hessian" in state_dict
        ):  # buffers are made with the first input: make them for the stored ones
            self._allocate(
                state_dict[prefix + "hessian"].device, prefix + "deviation" in state_dict
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _pieces(call: _Call) -> Iterator[_Call]:
    """Cut a call with blocks (…, B, K) along its first axis; where one entry is too much, along the next."""
    x = call[0]
    size = x.shape[1:].numel()
    if x.dim() == 2:
        yield call
    elif size > _CHUNK_ELEMENTS and x.dim() > 3:
        for index in range(x.shape[0]):
            yield from _pieces(_part(call, index))
    else:
        length = max(1, _CHUNK_ELEMENTS // max(1, size))
        for start in range(0, x.shape[0], length):
            yield _part(call, slice(start, start + length))


def _part(call: _Call, where: int | slice) -> _Call:
    x, reference, padding = call
    return (
        x[where],
        None if reference is None else reference[where],
        None if padding is None else padding[where],
    )


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to the sums, of every block if there are blocks."""
    (sums.addmm_ if sums.dim() == 2 else sums.baddbmm_)(left.mT, right)
