"""Inputs in 8 bits: symmetric, one scale a token, found at run time.

    x̂ = s · round(x / s),    s = max |x| / 127

as in LLM.int8() (arXiv 2208.07339, section 2.1, vector-wise) and SmoothQuant (arXiv 2211.10438, section 2).
Rounding has no useful derivative; gradients pass as if it were not there (straight through).

Shapes: K columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tsq_layers.numerics.autograd import has_dual_numbers, is_differentiated
from tsq_layers.numerics.basis import Basis

LARGEST = 127
"""The codes are −127 … 127: symmetric, so that no sign is favoured."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of every token.

    Args:
        x: floating point (…, K).

    Returns:
        codes int8 (…, K) and scales (…, 1), float32 or, of a float64 ``x``, float64. A token of zeros has scale 1.

    Example:
        >>> quantize_rows(torch.tensor([[127.0, -63.6], [0.0, 0.0]]))[0]
        tensor([[127, -64],
                [  0,   0]], dtype=torch.int8)
    """
    codes, scales = _rounded(x)
    return codes.to(torch.int8), scales


def fake_quantized(x: Tensor) -> Tensor:
    """x̂, in the dtype of ``x`` (…, K); gradients pass straight through, forward too.

    Example:
        >>> fake_quantized(torch.tensor([127.0, -63.6]))
        tensor([127., -64.])
    """
    if torch._C._are_functorch_transforms_active():
        return _fake(x)
    if has_dual_numbers():
        plain, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            dual: Tensor = forward_ad.make_dual(fake_quantized(plain), tangent)
            return dual
    if is_differentiated(x):
        rounded: Tensor = _StraightThrough.apply(x)
        return rounded
    return _fake(x)


def round_in_basis(x: Tensor, basis: Basis | None) -> Tensor:
    """Round inputs to 8 bits in another basis, and return to their own: T⁻¹ q(T x).

    Args:
        x: floating point (…, K).
        basis: T; ``None`` is the inputs' own.

    Returns:
        (…, K) in at least float32.
    """
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    if basis is None:
        return fake_quantized(wide)
    return basis.undo(fake_quantized(basis.apply(wide)))


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    scales = wide.abs().amax(-1, keepdim=True) / LARGEST
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (wide / scales).round().clamp(-LARGEST, LARGEST), scales


def _fake(x: Tensor) -> Tensor:
    codes, scales = _rounded(x)
    return (codes * scales).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _fake(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient
