"""Define :class:`HessianObserver`, which sums the second moments of a layer's inputs, and :class:`Call`.

Shapes: T tokens, K columns of the weight (input features), B row blocks of the weight that have
inputs of their own (the groups of a convolution). A leading "…" stands for any axes over tokens.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tsq_layers.errors import CalibrationError
from tsq_layers.numerics.statistics import LayerStatistics
from tsq_layers.passes.modes import full_precision
from tsq_layers.passes.recording import first_tensor

# Columns of H that one matrix product updates. Only the upper triangle of H is needed; narrower
# panels compute less of the lower one.
_PANEL = 128
# Elements of the inputs that are transposed by row block at once; it bounds the memory of the copy.
_CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True, eq=False)
class Call:
    """The inputs of one call of a layer: the arguments of :meth:`HessianObserver.observe`.

    Args:
        x: inputs on the quantised stream, (…, K) or (…, B, K).
        reference: inputs of the same tokens on the full-precision stream, shaped like ``x``.
        mask: bool or integer (…), 0 where a token is padding.
        weights: float (…, B), the weight of each token in the sums of each row block.
    """

    x: Tensor
    reference: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None

    def add_to(self, observer: "HessianObserver") -> None:
        """Pass the call to :meth:`HessianObserver.observe`."""
        observer.observe(self.x, self.reference, self.mask, self.weights)

    def split(self, last: int, dims: int = 1) -> tuple["Call", "Call"]:
        """Split the call into its first tokens and its ``last`` ones.

        Args:
            last: number of tokens of the second part.
            dims: number of dimensions of one token, 1 for (K,) and 2 for (B, K).

        Returns:
            both parts, their tokens flattened to one axis.

        Example:
            >>> first, last = Call(torch.zeros(2, 10, 8)).split(4)
            >>> first.x.shape, last.x.shape
            (torch.Size([16, 8]), torch.Size([4, 8]))
        """
        rows = self._flatten_tokens(dims)
        border = len(rows.x) - last
        return rows._select(slice(None, border)), rows._select(slice(border, None))

    def split_masked(self, last: Tensor, most: int, dims: int = 1) -> tuple["Call", "Call"]:
        """Split a call that has a mask into its first tokens and its ``last`` ones that are no padding.

        No value is read from the device, so the shapes of the parts do not depend on the mask: both
        parts hold tokens that are masked out.

        Args:
            last: number of unmasked tokens of the second part, an integer scalar tensor.
            most: upper bound of ``last``; the second part has this many tokens in all.
            dims: as in :meth:`split`.

        Returns:
            both parts, each with a mask; the tokens of the second part are flattened to one axis.

        Example:
            >>> call = Call(torch.arange(4.0).reshape(4, 1), mask=torch.tensor([1, 1, 1, 0]))
            >>> first, last = call.split_masked(torch.tensor(1), most=2)
            >>> first.mask, last.x[last.mask]
            (tensor([ True,  True, False, False]), tensor([[2.]]))
        """
        assert self.mask is not None
        is_token = self.mask.reshape(-1) != 0
        rank = is_token.cumsum(0)
        is_last = is_token & (rank > is_token.sum() - last)
        # A stable sort of 0 and 1 puts the tokens of the second part at the end, in their order.
        positions = is_last.to(torch.uint8).argsort(stable=True)[len(is_last) - most :]
        rows = self._flatten_tokens(dims)
        second = dataclasses.replace(rows, mask=is_last)._select(positions)
        return Call(self.x, self.reference, is_token & ~is_last, self.weights), second

    def _flatten_tokens(self, dims: int) -> "Call":
        """Return the same call with one axis over its tokens."""
        count = self.x.shape[:-dims].numel()
        token = self.x.shape[-dims:]
        return Call(
            self.x.reshape(count, *token),
            None if self.reference is None else self.reference.reshape(count, *token),
            None if self.mask is None else self.mask.reshape(count),
            None if self.weights is None else self.weights.reshape(count, -1),
        )

    def _select(self, where: slice | Tensor) -> "Call":
        """Return some tokens of a call whose tokens are one axis."""
        return Call(
            self.x[where],
            None if self.reference is None else self.reference[where],
            None if self.mask is None else self.mask[where],
            None if self.weights is None else self.weights[where],
        )


class HessianObserver(nn.Module):
    """A module that sums x xᵀ, (x − x̃) xᵀ and the number of tokens over the inputs x of a layer.

    Register it as a forward pre-hook, which sums the inputs of the hooked model alone, or call
    :meth:`observe`, which also takes the inputs x̃ of the full-precision model. The sums are buffers:
    they follow ``.to(device)`` and are saved in a ``state_dict``. They are created on the device of
    the first input.

    Args:
        columns: K, the number of input features of the layer.
        blocks: B, the number of row blocks of the weight that have inputs of their own (the groups of
            a convolution). If B > 1, a token is a matrix (B, K), and the sums are (B, K, K).
        dtype: dtype of the sums, float32 or float64.

    Raises:
        CalibrationError: ``dtype`` is another one, or ``blocks`` is less than 1.

    Source: H = Σ x xᵀ is the Hessian of GPTQ (arXiv 2210.17323, section 3), without its factor 2.

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
        self.columns = columns
        self.blocks = blocks
        self.dtype = dtype
        self.register_buffer("hessian", None)
        self.register_buffer("deviation", None)
        self.register_buffer("count", None)

    def forward(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Observe the first tensor argument of a layer; the signature is that of a forward pre-hook.

        Args:
            module: the layer, not used.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call, if the hook was registered with ``with_kwargs=True``.

        Raises:
            CalibrationError: no argument is a tensor. A hook that was registered without
                ``with_kwargs=True`` does not see keyword arguments.
        """
        x = first_tensor(args, kwargs or {})
        if x is None:
            raise CalibrationError(
                "the observer saw a call without a tensor; if the layer is called with arguments "
                "by name, register it by register_forward_pre_hook(observer, with_kwargs=True)"
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
        """Add the tokens of one call to the sums.

        Args:
            x: inputs on the quantised stream, any floating-point dtype, (…, K), or (…, B, K) if B > 1.
            reference: inputs x̃ of the same tokens on the full-precision stream, shaped like ``x``;
                given in every call or in none.
            mask: bool or integer (…), 0 where a token is padding and does not count.
            weights: float (…, B), the factor of each token in the sums of each row block. With weights,
                all row blocks share their inputs, and ``x`` is (…, K) also if B > 1. The number of
                tokens is not weighted.

        Raises:
            CalibrationError: shapes do not fit together, ``x`` is not floating point, or calls with and
                without ``reference`` were mixed.
        """
        if weights is not None:
            self._observe_weighted(x, reference, mask, weights)
            return
        self._check(x, reference, mask, self.blocks)
        token_shape = x.shape[:-1] if self.blocks == 1 else x.shape[:-2]
        padding = None
        if mask is not None:
            padding = mask.reshape(token_shape) == 0
        count = token_shape.numel() if padding is None else (~padding).sum()
        self._allocate(x.device, reference is not None)
        self.count += count
        piece = _Piece(x, reference, padding)
        with full_precision():
            if self.blocks == 1:
                self._add(piece)
                return
            for part in _cut(piece):
                self._add(part)

    def _observe_weighted(
        self, x: Tensor, reference: Tensor | None, mask: Tensor | None, weights: Tensor
    ) -> None:
        """Add what inputs √w·x of each row block would add, without making B copies of the inputs."""
        self._check(x, reference, mask, 1)
        count = x.shape[:-1].numel()
        if weights.numel() != count * self.blocks:
            raise CalibrationError(
                f"x has shape {tuple(x.shape)} and its weights {tuple(weights.shape)}; "
                f"they need one for each token and block, {count}×{self.blocks}"
            )
        is_token = _token_flags(mask, count, x.device)
        self._allocate(x.device, reference is not None)
        self.count += is_token.sum()
        rows = x.reshape(count, self.columns)
        reference_rows = None
        if reference is not None:
            reference_rows = reference.reshape(count, self.columns)
        size = max(1, _CHUNK_ELEMENTS // (self.columns * self.blocks))
        with full_precision():
            for start in range(0, count, size):
                chunk = slice(start, start + size)
                self._add_weighted(
                    rows[chunk],
                    None if reference_rows is None else reference_rows[chunk],
                    weights.reshape(count, self.blocks)[chunk].to(self.dtype),
                    is_token[chunk],
                )

    def _add_weighted(
        self, x: Tensor, reference: Tensor | None, weights: Tensor, is_token: Tensor
    ) -> None:
        """Add a chunk of tokens: x and reference (T, K), weights (T, B), is_token (T,)."""
        tokens = x.to(self.dtype).masked_fill(~is_token.unsqueeze(1), 0)
        weighted_tokens = tokens * weights.mT.unsqueeze(-1)  # (B, T, K)
        hessian = self.hessian.view(self.blocks, self.columns, self.columns)
        for start in range(0, self.columns, _PANEL):
            stop = start + _PANEL
            right = tokens[:, start:].expand(self.blocks, -1, -1)
            _add_product(hessian[..., start:stop, start:], weighted_tokens[..., start:stop], right)
        if reference is not None and self.deviation is not None:
            deviation = self.deviation.view(self.blocks, self.columns, self.columns)
            difference = tokens - reference.to(self.dtype).masked_fill(~is_token.unsqueeze(1), 0)
            _add_product(deviation, difference.expand(self.blocks, -1, -1), weighted_tokens)

    def _add(self, piece: "_Piece") -> None:
        """Add a piece of a call to the upper triangle of H, panel by panel, and to R."""
        tokens = self._tokens(piece.x, piece.padding)
        for start in range(0, self.columns, _PANEL):
            stop = start + _PANEL
            panel = tokens[..., start:stop]
            _add_product(self.hessian[..., start:stop, start:], panel, tokens[..., start:])
        if piece.reference is not None and self.deviation is not None:
            difference = tokens - self._tokens(piece.reference, piece.padding)
            _add_product(self.deviation, difference, tokens)

    @torch.inference_mode(False)
    def statistics(self) -> LayerStatistics:
        """Return a copy of the sums over all calls so far.

        Returns:
            H (K, K) or (B, K, K), the number of tokens, and R if calls had a reference.

        Raises:
            CalibrationError: no call was observed.
        """
        if self.hessian is None:
            raise CalibrationError("the observer saw no input; run data through the layer first")
        upper = self.hessian.triu()
        deviation = None if self.deviation is None else self.deviation.clone()
        return LayerStatistics(upper + upper.triu(1).mT, self.count.clone(), deviation)

    def reset(self) -> None:
        """Delete the sums; the next call may be on another device."""
        self.hessian = self.deviation = self.count = None  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """Return the width, the row blocks and the dtype, for ``repr``."""
        blocks = f", blocks={self.blocks}" if self.blocks > 1 else ""
        return f"columns={self.columns}{blocks}, dtype={self.dtype}"

    def _check(self, x: Tensor, reference: Tensor | None, mask: Tensor | None, blocks: int) -> None:
        """Refuse inputs that do not fit together, or not to earlier calls.

        Args:
            x: as in :meth:`observe`, as ``reference`` and ``mask``.
            reference: see above.
            mask: see above.
            blocks: the number of row blocks that ``x`` holds inputs of.
        """
        token_shape = (blocks, self.columns) if blocks > 1 else (self.columns,)
        if tuple(x.shape[-len(token_shape) :]) != token_shape or not x.is_floating_point():
            sizes = ", ".join(map(str, token_shape))
            raise CalibrationError(
                f"the observer was given {x.dtype} of shape {tuple(x.shape)}; "
                f"give floating point (…, {sizes})"
            )
        if reference is not None and reference.shape != x.shape:
            raise CalibrationError(
                f"x has shape {tuple(x.shape)} and its reference {tuple(reference.shape)}; "
                "both must agree"
            )
        if mask is not None and mask.numel() * blocks * self.columns != x.numel():
            raise CalibrationError(
                f"x has shape {tuple(x.shape)} and its mask {tuple(mask.shape)}; "
                "the mask has one entry a token"
            )
        if self.hessian is not None and (reference is None) != (self.deviation is None):
            raise CalibrationError(
                "calls with and without a reference were mixed; give one in every call or in none"
            )

    def _tokens(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Return inputs as rows (T, K) or (B, T, K) in the dtype of the sums, with 0 for padding."""
        if self.blocks == 1:
            tokens = x.reshape(-1, self.columns)
        else:
            tokens = x.reshape(-1, self.blocks, self.columns).transpose(0, 1).contiguous()
        tokens = tokens.to(self.dtype)
        if padding is None:
            return tokens
        # Filled, not multiplied: padding may hold NaN, and NaN · 0 is not 0.
        return tokens.masked_fill(padding.reshape(-1, 1), 0)

    def _allocate(self, device: torch.device, paired: bool) -> None:
        """Create the sums at the first call."""
        if self.hessian is not None:
            return
        shape: tuple[int, ...] = (self.columns, self.columns)
        if self.blocks > 1:
            shape = (self.blocks, *shape)
        # An inference tensor could not be added to outside of inference mode.
        with torch.inference_mode(False):
            self.hessian = torch.zeros(shape, dtype=self.dtype, device=device)
            self.count = torch.zeros((), dtype=torch.int64, device=device)
            if paired:
                self.deviation = torch.zeros(shape, dtype=self.dtype, device=device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # torch loads only into buffers that exist, and these are made by the first call.
        hessian = state_dict.get(prefix + "hessian")
        if hessian is not None:
            self._allocate(hessian.device, prefix + "deviation" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _token_flags(mask: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Return bool (T,), False where a token is padding."""
    if mask is None:
        return torch.ones(count, dtype=torch.bool, device=device)
    return mask.reshape(count) != 0


class _Piece(NamedTuple):
    """A part of a call: inputs, those of the full-precision stream, and True where padding is."""

    x: Tensor
    reference: Tensor | None
    padding: Tensor | None

    def select(self, where: int | slice) -> "_Piece":
        """Return the entries of the first axis that ``where`` selects."""
        return _Piece(
            self.x[where],
            None if self.reference is None else self.reference[where],
            None if self.padding is None else self.padding[where],
        )


def _cut(piece: _Piece) -> Iterator[_Piece]:
    """Cut a call with row blocks (…, B, K) into pieces of at most ``_CHUNK_ELEMENTS`` along its first axis.

    Where one entry of the first axis is larger than that, it is cut along the next axis.
    """
    x = piece.x
    entry_elements = x.shape[1:].numel()
    if x.dim() == 2:  # a single token (B, K)
        yield piece
    elif entry_elements > _CHUNK_ELEMENTS and x.dim() > 3:
        for index in range(x.shape[0]):
            yield from _cut(piece.select(index))
    else:
        length = max(1, _CHUNK_ELEMENTS // max(1, entry_elements))
        for start in range(0, x.shape[0], length):
            yield piece.select(slice(start, start + length))


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to the sums, of each row block if there are several."""
    if sums.dim() == 2:
        sums.addmm_(left.mT, right)
    else:
        sums.baddbmm_(left.mT, right)
