"""Run a packed layer that does more than multiply by its codes: another basis, 8-bit inputs, a sparse part.

    y = (Q + S) q(T x) + b

Q the matrix of the codes, S the sparse part, T the change of basis, q the rounding of inputs; each but Q
optional. The words themselves are run by :mod:`tsq_layers.runtime.kernels`.

Shapes: N rows of the weight (outputs), K columns (inputs), G groups a row, W words a row, M rows of
input, E entries and C columns of the sparse part.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.numerics import activations, basis, packing
from tsq_layers.numerics.autograd import has_dual_numbers, is_differentiated
from tsq_layers.runtime import kernels

_INTEGER_ROWS = 17  # torch._int_mm takes no fewer on a GPU
_INTEGER_MULTIPLE = 8  # of which N and K must be there
_INTEGER_COLUMNS = 32768  # more could overflow 32 bits: 127 · (128 + 255) a column


class Parts(NamedTuple):
    """The tensors of a layer.

    Args:
        words: packed codes, int32 (N, W).
        grids: scales or tables, see :mod:`tsq_layers.runtime.kernels`.
        shifts: packed zero points, offsets or ``None``, see there.
        signs: int8 (K,), of a rotation.
        scaling: float32 (K,), of the input columns.
        values: of the sparse part, in the dtype of the grids: (E,), or (N, C).
        places: int32, of its entries (E,), or of its columns (C,).
    """

    words: Tensor
    grids: Tensor
    shifts: Tensor | None
    signs: Tensor | None = None
    scaling: Tensor | None = None
    values: Tensor | None = None
    places: Tensor | None = None


class Form(NamedTuple):
    """What the tensors do not say of a layer: width of a code, columns that share a scale, K, block of the rotation."""

    bits: int
    group_size: int
    columns: int
    rotation: int | None = None


def dequantize(parts: Parts, form: Form, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) for the layer's own inputs, in any floating dtype.

    Example:
        >>> words = packing.pack(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), bits=2)
        >>> scaled = Parts(words, torch.tensor([[0.5]]), None, scaling=torch.tensor([1.0, 1.0, 1.0, 2.0]))
        >>> dequantize(scaled, Form(2, 4, 4), torch.float32)
        tensor([[-1.0000, -0.5000,  0.0000,  0.2500]])
    """
    working = _working(parts, dtype)
    weight = _codes(parts, form, working)
    if parts.values is not None and parts.places is not None:
        flat = (
            weight.reshape(-1) if parts.values.dim() == 1 else weight
        )  # a ragged last group leaves gaps
        weight = flat.index_add(flat.dim() - 1, parts.places, parts.values.to(working)).view(
            weight.shape
        )
    return basis.restore(weight, form.rotation, parts.signs, parts.scaling).to(dtype)


def rows(ids: Tensor, parts: Parts, form: Form, dtype: torch.dtype) -> Tensor:
    """Some rows of :func:`dequantize`, without the others: ids (R,) → (R, K).

    Bit-equal to them, but for a rotation, whose sums may be taken in another order.
    """
    working = _working(parts, dtype)
    shifts = None if parts.shifts is None else parts.shifts.index_select(0, ids)
    chosen = parts._replace(
        words=parts.words.index_select(0, ids),
        grids=parts.grids.index_select(0, ids),
        shifts=shifts,
    )
    weight = _codes(chosen, form, working)
    if parts.values is not None and parts.places is not None:
        if parts.values.dim() == 2:
            weight = weight.index_add(
                1, parts.places, parts.values.index_select(0, ids).to(working)
            )
        elif len(parts.places):
            weight = weight + _entries_of(ids, parts.values, parts.places, form.columns).to(working)
    return basis.restore(weight, form.rotation, parts.signs, parts.scaling).to(dtype)


def linear(
    x: Tensor, bias: Tensor | None, parts: Parts, form: Form, activation_bits: int | None
) -> Tensor:
    """What the layer makes of its input, in the dtype of ``x`` (that of autocast, if it is on).

    Gradients flow to ``x``, straight through its rounding, and to ``bias``.

    Args:
        x: floating point (…, K).
        bias: (N,) or ``None``.
        parts: of the layer.
        form: of the layer.
        activation_bits: 8 if inputs are rounded.

    Returns:
        (…, N).

    Raises:
        LayerError: ``x`` is not floating point or its last dimension is not K.
    """
    kernels.check_input(x, form.columns, parts.words.shape[0])
    x = basis.apply(x, form.rotation, parts.signs, parts.scaling)
    plain = parts._replace(signs=None, scaling=None)
    form = form._replace(rotation=None)
    if activation_bits is not None:
        if _integers_pay(x, bias, plain, form):
            return integer_product(x, bias, plain, form)
        x = activations.fake_quantized(x)
    if plain.values is None or plain.places is None:
        return kernels.linear(x, *plain[:3], bias, *form[:3])
    if plain.values.dim() == 2:
        y = kernels.linear(x, *plain[:3], bias, *form[:3])
        x = kernels.autocast(x)
        return y + F.linear(x.index_select(-1, plain.places), plain.values.to(x.dtype))
    return _with_entries(x, bias, plain, form)


def round_input(x: Tensor, parts: Parts, form: Form) -> Tensor:
    """Round an input of a layer to 8 bits as the layer does; see :func:`~tsq_layers.numerics.activations.round_in_basis`."""
    if parts.signs is None and parts.scaling is None:
        return activations.round_in_basis(x, None)
    return activations.round_in_basis(
        x, basis.Basis(form.rotation, parts.signs, parts.scaling).to(x.device)
    )


# --- the sparse part -----------------------------------------------------------------------------


def _entries_of(ids: Tensor, values: Tensor, places: Tensor, columns: int) -> Tensor:
    """The sparse entries of some rows, dense (R, K): every place is looked up, so that no size depends on values."""
    wanted = ids.to(torch.int32).unsqueeze(1) * columns + torch.arange(
        columns, dtype=torch.int32, device=ids.device
    )
    found = torch.searchsorted(places, wanted).clamp(max=len(places) - 1)
    return torch.where(places[found] == wanted, values[found], 0)


def _with_entries(x: Tensor, bias: Tensor | None, parts: Parts, form: Form) -> Tensor:
    """Few rows of input: entry by entry, beside the pass over the words; many: in one dense weight, not kept."""
    x = kernels.autocast(x)
    assert parts.values is not None
    assert parts.places is not None
    exporting = (
        torch.compiler.is_exporting()
    )  # then the number of rows may be a symbol that must not be compared
    if not exporting and math.prod(x.shape[:-1]) <= kernels.FEW_ROWS:
        y = kernels.linear(x, *parts[:3], bias, *form[:3])
        return (y + _sparse_product(x, parts.values, parts.places, parts.words.shape[0])).to(
            y.dtype
        )
    bias = None if bias is None else bias.to(x.dtype)
    plain = exporting or has_dual_numbers() or torch._C._are_functorch_transforms_active()
    if not plain and is_differentiated(x, bias):
        output: Tensor = _Dense.apply(x, bias, form, *parts)
        return output
    return F.linear(x, dequantize(parts, form, x.dtype), bias)


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


class _Dense(torch.autograd.Function):
    """Keeps the packed weight, not the dequantised one, for the gradient of the input."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, form: Form, *parts: Tensor | None) -> Tensor:
        return F.linear(x, dequantize(Parts(*parts), form, x.dtype), bias)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, _, ctx.form, *parts = inputs
        ctx.save_for_backward(*parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = Parts(*ctx.saved_tensors)
        to_x = (
            gradient @ dequantize(parts, ctx.form, gradient.dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        to_bias = (
            gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        )
        return to_x, to_bias, None, *(None for _ in parts)


# --- integers --------------------------------------------------------------------------------------


def integer_product(x: Tensor, bias: Tensor | None, parts: Parts, form: Form) -> Tensor:
    """The layer on 8-bit inputs in integers, for scales of one group a row with integer zero points, and no sparse part.

    Σ_k c_k (n_k − z) = Σ_k c_k (n_k − o) + (o − z) Σ_k c_k with o = 2^(bits−1), so that n − o are
    signed bytes; exact in 32 bits for K up to 32768, and rounded once.

    Args:
        x: floating point (…, K), in the basis of the codes.
        bias: (N,) or ``None``.
        parts: without basis and sparse part.
        form: of one group a row.

    Returns:
        (…, N) in the dtype of ``x``, or in that of autocast.
    """
    offset = 2 ** (form.bits - 1)
    codes, scales = activations.quantize_rows(x.reshape(-1, form.columns))
    weight = (
        packing.unpack(parts.words, form.bits, form.columns).sub(offset).view(torch.int8)
    )  # wraps to signed
    sums = torch._int_mm(codes, weight.mT)
    if parts.shifts is not None:
        zeros = kernels.zero_points(parts.grids, parts.shifts, form.bits).to(torch.int32)
        sums = sums + codes.sum(-1, keepdim=True, dtype=torch.int32) * (offset - zeros).mT
    y = sums.to(scales.dtype) * scales * parts.grids.to(scales.dtype).mT
    y = y if bias is None else y + bias.to(scales.dtype)
    return y.to(kernels.autocast(x).dtype).reshape(*x.shape[:-1], y.shape[-1])


def _integers_pay(x: Tensor, bias: Tensor | None, parts: Parts, form: Form) -> bool:
    """Whether integers can be multiplied here and are worth it: on accelerators, for many rows of input.

    Not on a CPU: without instructions for 8-bit products ``torch._int_mm`` takes 8 to 25 times as long as
    the product of float32 (measured on AVX2). Not for gradients, which go through the rounded input.
    """
    compiled = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if x.device.type == "cpu" or compiled or x.dtype == torch.float64:
        return False
    fits = (
        form.group_size >= form.columns
        and form.columns <= _INTEGER_COLUMNS
        and form.columns % _INTEGER_MULTIPLE == parts.words.shape[0] % _INTEGER_MULTIPLE == 0
        and math.prod(x.shape[:-1]) >= _INTEGER_ROWS
        and parts.values is None
        and _has_zero_points(parts)
    )
    return fits and not is_differentiated(x, bias) and _has_integer_product(x.device)


def _has_zero_points(parts: Parts) -> bool:
    """Whether grids are scales with integer zero points: neither tables nor offsets."""
    return parts.grids.dim() == 2 and (parts.shifts is None or not parts.shifts.is_floating_point())


def _has_integer_product(device: torch.device) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_int_mm", device.type.upper())


# --- the parts ---------------------------------------------------------------------------------------


def _working(parts: Parts, dtype: torch.dtype) -> torch.dtype:
    if parts.signs is None and parts.scaling is None and parts.values is None:
        return dtype  # products are rounded once, where they are made
    return torch.float64 if dtype == torch.float64 else torch.float32


def _codes(parts: Parts, form: Form, dtype: torch.dtype) -> Tensor:
    return kernels.dequantize(*parts[:3], form.bits, form.group_size, form.columns, dtype)
