"""Run a packed layer: the product with its codes, another basis, rounded inputs, a sparse part.

    y = (Q + S) q(T x) + b

Q the matrix of the codes, S the sparse part, T the change of basis, q the rounding of inputs; each but Q
optional. :mod:`tsq_layers.runtime.route` chooses how the product is taken, :mod:`tsq_layers.runtime.kernels`
takes it.

Shapes: N rows of the weight (outputs), K columns (inputs), G groups a row, W words a row, M rows of
input, E entries and C columns of the sparse part.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.numerics import activations, basis, packing
from tsq_layers.numerics.weight import WeightFormat
from tsq_layers.runtime import kernels
from tsq_layers.runtime.environment import autocast_dtype, environment_of
from tsq_layers.runtime.parts import Parts
from tsq_layers.runtime.route import Route, route


def dequantize(parts: Parts, format: WeightFormat, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) for the layer's own inputs, in any floating dtype.

    Args:
        parts: of the weight.
        format: of the weight.
        columns: K.
        dtype: of the result.

    Example:
        >>> words = packing.pack(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), bits=2)
        >>> scaled = Parts(words, torch.tensor([[0.5]]), None, scaling=torch.tensor([1.0, 1.0, 1.0, 2.0]))
        >>> symmetric = WeightFormat(bits=2, grid="symmetric", channel_scaling=True)
        >>> dequantize(scaled, symmetric, 4, torch.float32)
        tensor([[-1.0000, -0.5000,  0.0000,  0.2500]])
    """
    weight = _in_basis(parts, format, columns, _working(parts, dtype))
    return basis.restore(weight, format.rotation, parts.signs, parts.scaling).to(dtype)


def rows(
    ids: Tensor, parts: Parts, format: WeightFormat, columns: int, dtype: torch.dtype
) -> Tensor:
    """Some rows of :func:`dequantize`, without the others: ids (R,) → (R, K).

    Bit-equal to them, but for a rotation, whose sums may be taken in another order.
    """
    working = _working(parts, dtype)
    shifts = None if parts.shifts is None else parts.shifts.index_select(0, ids)
    codes = Parts(parts.words.index_select(0, ids), parts.grids.index_select(0, ids), shifts)
    weight = kernels.dequantize(codes, format, columns, working)
    if parts.values is not None and parts.places is not None:
        if parts.values.dim() == 2:
            values = parts.values.index_select(0, ids).to(working)
            weight = weight.index_add(1, parts.places, values)
        elif len(parts.places):
            weight = weight + _entries_of(ids, parts.values, parts.places, columns).to(working)
    return basis.restore(weight, format.rotation, parts.signs, parts.scaling).to(dtype)


def linear(
    x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat, columns: int
) -> Tensor:
    """``x Wᵀ + b`` in the dtype of ``x`` (that of autocast, if it is on).

    Gradients flow to ``x``, straight through its rounding, and to ``bias``, forward and backward; the dequantised
    matrix is not kept for them. Sums are taken in float32 (float64), also for half-precision inputs.

    Args:
        x: floating point (…, K); any number of dimensions from one, any number of rows.
        bias: (N,) or ``None``.
        parts: of the weight.
        format: of the weight.
        columns: K.

    Returns:
        (…, N).

    Raises:
        LayerError: ``x`` is not floating point or its last dimension is not K.

    Warns:
        CompileWarning: once for each device type on which ``torch.compile`` fails.

    Example:
        >>> words = packing.pack(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), bits=2)
        >>> symmetric = WeightFormat(bits=2, grid="symmetric", scale_dtype=torch.float32)
        >>> linear(torch.ones(4), None, Parts(words, torch.tensor([[0.5]]), None), symmetric, 4)
        tensor([-1.])
    """
    kernels.check_input(x, columns, parts.words.shape[0])
    if parts.signs is not None or parts.scaling is not None:
        x = basis.apply(x, format.rotation, parts.signs, parts.scaling)
    environment = environment_of(x, bias)
    way = route(x, parts, format, environment)
    if way == "integers":
        return integer_product(x, bias, parts, format)
    if format.activation_bits is not None:
        x = activations.fake_quantized(x)
    x = x.to(environment.dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    keeps_packed = environment.differentiating and not (
        environment.exporting or environment.transforming or environment.dual_numbers
    )
    if keeps_packed:
        y: Tensor = _Product.apply(x, bias, way, format, *parts)
    else:
        y = PRODUCTS[way](x, bias, parts, format)
    if parts.values is None or parts.places is None or way == "dense_with_entries":
        return y
    if parts.values.dim() == 2:
        return y + F.linear(x.index_select(-1, parts.places), parts.values.to(x.dtype))
    return (y + _sparse_product(x, parts.values, parts.places, parts.words.shape[0])).to(y.dtype)


def round_input(x: Tensor, parts: Parts, format: WeightFormat) -> Tensor:
    """Round an input to 8 bits as the layer does.

    See :func:`~tsq_layers.numerics.activations.round_in_basis`.
    """
    if parts.signs is None and parts.scaling is None:
        return activations.round_in_basis(x, None)
    changed = basis.Basis(format.rotation, parts.signs, parts.scaling)
    return activations.round_in_basis(x, changed.to(x.device))


class _Product(torch.autograd.Function):
    """A product that keeps the packed weight, not the dequantised one, for the gradient of the input."""

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, way: Route, format: WeightFormat, *parts: Any
    ) -> Tensor:
        return PRODUCTS[way](x, bias, Parts(*parts), format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        x, _, ctx.way, ctx.format, *parts = inputs
        ctx.columns = x.shape[-1]
        ctx.save_for_backward(*parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = Parts(*ctx.saved_tensors)
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            make = _in_basis if ctx.way == "dense_with_entries" else kernels.dense_weight
            to_x = gradient @ make(parts, ctx.format, ctx.columns, gradient.dtype)
        if ctx.needs_input_grad[1]:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return to_x, to_bias, None, None, *(None for _ in parts)


def _dense_with_entries(
    x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat
) -> Tensor:
    """Many rows of input: codes and sparse part in one dense weight, not kept."""
    return F.linear(x, _in_basis(parts, format, x.shape[-1], x.dtype), bias)


PRODUCTS: dict[str, Callable[[Tensor, Tensor | None, Parts, WeightFormat], Tensor]] = {
    "dense_with_entries": _dense_with_entries,
    "dense_eager": kernels.dense_eager,
    "native": kernels.native_product,
    "dense": kernels.dense_product,
    "decode_inlined": kernels.decode_inlined,
    "decode_compiled": kernels.decode_compiled,
    "dense_rows": kernels.dense_rows,
}
"""Route → function of x (…, K) and bias (N,) in one dtype.

``"integers"`` takes an input that is not rounded yet.
"""


# --- the sparse part -----------------------------------------------------------------------------


def _entries_of(ids: Tensor, values: Tensor, places: Tensor, columns: int) -> Tensor:
    """The sparse entries of some rows, dense (R, K): every place is looked up, so that no size depends on values."""
    all_columns = torch.arange(columns, dtype=torch.int32, device=ids.device)
    targets = ids.to(torch.int32).unsqueeze(1) * columns + all_columns
    positions = torch.searchsorted(places, targets).clamp(max=len(places) - 1)
    return torch.where(places[positions] == targets, values[positions], 0)


def _sparse_product(x: Tensor, values: Tensor, places: Tensor, outputs: int) -> Tensor:
    """S x, in at least float32: (…, K) → (…, N)."""
    columns = x.shape[-1]
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    row, column = places // columns, places % columns
    terms_ME = x.reshape(-1, columns).to(working).index_select(1, column) * values.to(working)
    # Not index_add, which takes 3 to 8 times as long on a CPU.
    y_MN = terms_ME.new_zeros(len(terms_ME), outputs).scatter_add(
        1, row.long().expand(len(terms_ME), -1), terms_ME
    )
    return y_MN.reshape(*x.shape[:-1], outputs)


# --- integers --------------------------------------------------------------------------------------


def integer_product(x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat) -> Tensor:
    """Run the layer on 8-bit inputs in integers.

    For scales of one group a row with integer zero points, and no sparse part.

    Σ_k c_k (n_k − z) = Σ_k c_k (n_k − o) + (o − z) Σ_k c_k with o = 2^(bits−1), so that n − o are
    signed bytes; exact in 32 bits for K up to 32768, and rounded once.

    Args:
        x: floating point (…, K), in the basis of the codes.
        bias: (N,) or ``None``.
        parts: of the weight; without a sparse part.
        format: of one group a row.

    Returns:
        (…, N) in the dtype of ``x``, or in that of autocast.
    """
    columns = x.shape[-1]
    offset = 2 ** (format.bits - 1)
    codes, scales = activations.quantize_rows(x.reshape(-1, columns))
    unsigned = packing.unpack(parts.words, format.bits, columns)
    weight = unsigned.sub(offset).view(torch.int8)  # wraps to signed
    sums = torch._int_mm(codes, weight.mT)
    if parts.shifts is not None:
        zeros = kernels.zero_points(parts.grids, parts.shifts, format.bits).to(torch.int32)
        sums = sums + codes.sum(-1, keepdim=True, dtype=torch.int32) * (offset - zeros).mT
    y = sums.to(scales.dtype) * scales * parts.grids.to(scales.dtype).mT
    if bias is not None:
        y = y + bias.to(scales.dtype)
    return y.to(autocast_dtype(x)).reshape(*x.shape[:-1], y.shape[-1])


# --- the weight --------------------------------------------------------------------------------------


def _working(parts: Parts, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight is put together."""
    if parts.signs is None and parts.scaling is None and parts.values is None:
        return dtype  # products are rounded once, where they are made
    return torch.float64 if dtype == torch.float64 else torch.float32


def _in_basis(parts: Parts, format: WeightFormat, columns: int, dtype: torch.dtype) -> Tensor:
    """Q + S, the weight (N, K) for inputs in the basis of the codes."""
    working = dtype
    if parts.values is not None:
        working = torch.float64 if dtype == torch.float64 else torch.float32
    weight = kernels.dequantize(parts, format, columns, working)
    if parts.values is None or parts.places is None:
        return weight.to(dtype)
    values = parts.values.to(working)
    if parts.values.dim() == 2:
        return weight.index_add(1, parts.places, values).to(dtype)
    # A ragged last group leaves gaps, so this may be a copy.
    entries = weight.reshape(-1).index_add(0, parts.places, values)
    return entries.view(weight.shape).to(dtype)
