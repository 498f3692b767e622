"""`HessianObserver`: what calibration learns about the inputs of a layer."""

from typing import Any

import torch
from torch import Tensor, nn

from tsq_layers.errors import CalibrationError
from tsq_layers.precision import full_precision
from tsq_layers.records import LayerStatistics

_PANEL = 384  # columns of H updated by one matrix product; narrower panels waste fewer flops on the half not kept


class HessianObserver(nn.Module):
    """Accumulates Σ x xᵀ, Σ (x − x̃) xᵀ and the number of tokens over the inputs of a layer.

    Usable alone as a forward pre-hook (the full-precision model's H, no deviation), or fed with
    :meth:`observe`. The sums are buffers: they follow ``.to(device)`` and are saved in a
    state_dict. They are made on the device of the first input.

    Args:
        columns: K, the width of the layer's input.
        dtype: of the sums, float32 or float64.

    Example:
        >>> layer = nn.Linear(16, 8)
        >>> observer = HessianObserver(16)
        >>> handle = layer.register_forward_pre_hook(observer)
        >>> _ = layer(torch.randn(4, 10, 16))
        >>> handle.remove()
        >>> int(observer.statistics().count)
        40
    """

    hessian: Tensor
    deviation: Tensor | None
    count: Tensor

    def __init__(self, columns: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.float64):
            raise CalibrationError(f"observer dtype {dtype}: give torch.float32 or torch.float64")
        self.columns, self.dtype = columns, dtype
        self.register_buffer("hessian", None)
        self.register_buffer("deviation", None)
        self.register_buffer("count", None)

    def forward(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG002  (what torch gives a hook)
        """The pre-hook: observe the layer's first positional argument, change nothing."""
        self.observe(args[0])

    @torch.no_grad()
    def observe(self, x: Tensor, reference: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add the tokens of one call.

        Args:
            x: inputs on the quantised stream, any float dtype (…, K).
            reference: the same tokens' inputs on the full-precision stream, shaped like ``x``;
                either every call has one or none has.
            mask: bool or integer (…), 0 where a token is padding and does not count.

        Raises:
            CalibrationError: shapes that do not fit, or calls with and without reference mixed.
        """
        self._check(x, reference, mask)
        padding = None if mask is None else mask.reshape(-1, 1) == 0
        tokens = self._tokens(x, padding)
        count = torch.tensor(tokens.shape[0], device="cpu").to(x.device) if padding is None else (~padding).sum()
        self._allocate(x.device, reference is not None)
        self.count += count
        with full_precision():
            for start in range(0, self.columns, _PANEL):
                panel = tokens[:, start : start + _PANEL]
                self.hessian[start : start + _PANEL, start:].addmm_(panel.T, tokens[:, start:])
            if reference is not None and self.deviation is not None:
                difference = tokens - self._tokens(reference, padding)
                self.deviation.addmm_(difference.T, tokens)

    def statistics(self) -> LayerStatistics:
        """The sums so far.

        Raises:
            CalibrationError: nothing was observed.
        """
        if self.hessian is None:
            raise CalibrationError("the observer saw no input; run data through the layer first")
        upper = self.hessian.triu()
        return LayerStatistics(
            upper + upper.triu(1).T, self.count.clone(), None if self.deviation is None else self.deviation.clone()
        )

    def reset(self) -> None:
        """Forget everything."""
        self.hessian = self.deviation = self.count = None  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """Width and dtype, for ``repr``."""
        return f"columns={self.columns}, dtype={self.dtype}"

    def _check(self, x: Tensor, reference: Tensor | None, mask: Tensor | None) -> None:
        if x.shape[-1] != self.columns or not x.is_floating_point():
            raise CalibrationError(
                f"the observer was given {x.dtype} of shape {tuple(x.shape)}; give floating point (…, {self.columns})"
            )
        if reference is not None and reference.shape != x.shape:
            raise CalibrationError(
                f"x has shape {tuple(x.shape)} and its reference {tuple(reference.shape)}; both must agree"
            )
        if mask is not None and mask.numel() * self.columns != x.numel():
            raise CalibrationError(
                f"x has shape {tuple(x.shape)} and its mask {tuple(mask.shape)}; the mask has one entry a token"
            )
        if self.hessian is not None and (reference is None) != (self.deviation is None):
            raise CalibrationError("calls with and without a reference were mixed; give one in every call or in none")

    def _tokens(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """Inputs as rows (T, K); padding becomes 0, whatever stood there (NaN · 0 is not 0)."""
        tokens = x.reshape(-1, self.columns).to(self.dtype)
        return tokens if padding is None else tokens.masked_fill(padding, 0)

    def _allocate(self, device: torch.device, paired: bool) -> None:
        if self.hessian is not None:
            return
        square = (self.columns, self.columns)
        with torch.inference_mode(False):  # an inference tensor could not be added to outside of inference mode
            self.hessian = torch.zeros(square, dtype=self.dtype, device=device)
            self.count = torch.zeros((), dtype=torch.int64, device=device)
            if paired:
                self.deviation = torch.zeros(square, dtype=self.dtype, device=device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if prefix + "hessian" in state_dict:  # buffers are made with the first input: make them for the stored ones
            self._allocate(state_dict[prefix + "hessian"].device, prefix + "deviation" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)
