"""Round a layer's inputs to 8 bits: symmetric codes, with one scale for each token, computed at run time.

    x̂ = s · round(x / s),    s = max |x| / 127

Source: LLM.int8() (arXiv 2208.07339, section 2.1, vector-wise quantisation) and SmoothQuant
(arXiv 2211.10438, section 2). The derivative of rounding is 0 almost everywhere, so gradients pass
as if nothing were rounded (straight-through estimator).

Shapes: K columns (input features). A leading "…" stands for any axes over tokens.
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
    """Return the codes and the scale of every token.

    Args:
        x: floating point (…, K).

    Returns:
        codes int8 (…, K), and scales (…, 1) in float64 if ``x`` is float64, else in float32. The
        scale of a token of zeros is 1.

    Example:
        >>> quantize_rows(torch.tensor([[127.0, -63.6], [0.0, 0.0]]))[0]
        tensor([[127, -64],
                [  0,   0]], dtype=torch.int8)
    """
    codes, scales = _rounded(x)
    return codes.to(torch.int8), scales


def fake_quantized(x: Tensor) -> Tensor:
    """Return x̂ in the dtype of ``x``, (…, K); gradients pass straight through, in forward mode too.

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
        output: Tensor = _StraightThrough.apply(x)
        return output
    return _fake(x)


def round_in_basis(x: Tensor, basis: Basis | None) -> Tensor:
    """Round inputs to 8 bits in another basis and return them in their own: T⁻¹ q(T x).

    Args:
        x: floating point (…, K).
        basis: T; ``None`` rounds in the basis that the inputs have.

    Returns:
        (…, K) in at least float32.
    """
    values = _at_least_float32(x)
    if basis is None:
        return fake_quantized(values)
    return basis.undo(fake_quantized(basis.apply(values)))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (…, K) and scales (…, 1), both in at least float32."""
    values = _at_least_float32(x)
    scales = values.abs().amax(-1, keepdim=True) / LARGEST
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (values / scales).round().clamp(-LARGEST, LARGEST)
    return codes, scales


def _fake(x: Tensor) -> Tensor:
    codes, scales = _rounded(x)
    return (codes * scales).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """Rounding with the derivative of the identity."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _fake(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient
