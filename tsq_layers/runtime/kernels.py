"""The functions that turn words and grids into values and products.

A packed weight is three tensors (``words``, ``grids`` and ``shifts`` of :class:`~tsq_layers.runtime.parts.Parts`)
and a :class:`~tsq_layers.numerics.weight.WeightFormat`. What the format says of a basis, a sparse part or
rounded inputs is not looked at here; :mod:`tsq_layers.runtime.forward` does that.

With few rows of input (decoding) the words are the traffic, so one pass over them must do everything;
with many the weight is dequantised and multiplied. On a CPU both are the operations of
:mod:`tsq_layers.runtime.native`. On other devices :mod:`tsq_layers.runtime.one_pass` and
dequantising are compiled here, one
function for each kind of call (where those operations cannot be built on a CPU, only the former); inside
somebody else's ``torch.compile`` they are inlined. Wherever tensors have no values (fake, meta,
exporting) the plain functions run. :mod:`tsq_layers.runtime.route` says which of them is taken.

Shapes: N rows of the weight (outputs), K columns (inputs), G groups a row, W words a row, M rows of
input, T tables a row.
"""

import math
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsq_layers.errors import CompileWarning, LayerError
from tsq_layers.numerics import grid, packing
from tsq_layers.numerics.weight import WeightFormat
from tsq_layers.runtime import native
from tsq_layers.runtime.environment import Environment, environment_of, has_values
from tsq_layers.runtime.one_pass import few_rows
from tsq_layers.runtime.parts import Parts

FEW_ROWS = 8
"""Up to this many rows of input are done in one pass over the words where that is compiled; not measured on a GPU."""

_BLOCK = 2**21
"""Weights that are dequantised at a time."""


def dequantize(parts: Parts, format: WeightFormat, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight matrix that packed codes stand for, bit-equal to what :mod:`tsq_layers.numerics.grid` makes of them.

    Args:
        parts: of which words, grids and shifts are used.
        format: of the weight.
        columns: K.
        dtype: of the result; products and sums are taken in float32 (float64) and rounded once.

    Returns:
        (N, K) in ``dtype``.

    Example:
        >>> words = packing.pack(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), bits=2)
        >>> symmetric = WeightFormat(bits=2, group_size=4, grid="symmetric", scale_dtype=torch.float32)
        >>> dequantize(Parts(words, torch.tensor([[0.5]]), None), symmetric, 4, torch.float32)
        tensor([[-1.0000, -0.5000,  0.0000,  0.5000]])
    """
    words = parts.words
    environment = environment_of(words)
    if dtype in native.DTYPES and is_native(words, format, environment) and not _trains(parts):
        packing.check_words(words, format.bits, columns)
        weight: Tensor = torch.ops.tsq_layers.dequantize.default(
            *parts[:3], format.bits, format.group_columns(columns), columns, dtype
        )
        return weight
    rows = words.shape[0]
    in_one = environment.compiling or environment.transforming or rows * columns <= _BLOCK
    if in_one:
        return matrix_of(parts, format, columns, dtype)
    # A block of rows at a time: the many float32 intermediates stay small.
    weight_NK = torch.empty(rows, columns, dtype=dtype, device=words.device)
    step = max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        shifts = None if parts.shifts is None else parts.shifts.narrow(0, first, count)
        block = Parts(words.narrow(0, first, count), parts.grids.narrow(0, first, count), shifts)
        weight_NK.narrow(0, first, count).copy_(matrix_of(block, format, columns, dtype))
    return weight_NK


def matrix_of(parts: Parts, format: WeightFormat, columns: int, dtype: torch.dtype) -> Tensor:
    """:func:`dequantize` all at once, which a compiler makes one loop of."""
    codes_NK = packing.unpack(parts.words, format.bits, columns)
    return MATRICES[format.grid](codes_NK, parts, format, dtype)


def _with_zeros(codes_NK: Tensor, parts: Parts, format: WeightFormat, dtype: torch.dtype) -> Tensor:
    """``scales · (codes − zeros)``."""
    zeros = zero_points(parts.grids, parts.shifts, format.bits)
    group_size = format.group_columns(codes_NK.shape[1])
    return grid.dequantize(codes_NK, parts.grids, zeros, group_size, dtype)


def _with_offsets(
    codes_NK: Tensor, parts: Parts, format: WeightFormat, dtype: torch.dtype
) -> Tensor:
    """``scales · codes + offsets``."""
    assert parts.shifts is not None
    group_size = format.group_columns(codes_NK.shape[1])
    return grid.with_offsets(codes_NK, parts.grids, parts.shifts, group_size, dtype)


def _looked_up(codes_NK: Tensor, parts: Parts, format: WeightFormat, dtype: torch.dtype) -> Tensor:
    """``table[code]``."""
    group_size = format.group_columns(codes_NK.shape[1])
    return grid.look_up(codes_NK, parts.grids, group_size, dtype)


MATRICES: dict[str, Callable[[Tensor, Parts, WeightFormat, torch.dtype], Tensor]] = {
    "symmetric": _with_zeros,
    "zero_points": _with_zeros,
    "offsets": _with_offsets,
    "row_tables": _looked_up,
    "group_tables": _looked_up,
}
"""Kind of grid → the values of codes uint8 (N, K)."""


def zero_points(scales: Tensor, zero_words: Tensor | None, bits: int) -> Tensor:
    """Zero points uint8 (N, G) from their words, or the constant of a symmetric grid."""
    if zero_words is None:
        return torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8, device=scales.device)
    return packing.unpack(zero_words, bits, scales.shape[1])


def check_input(x: Tensor, columns: int, rows: int) -> None:
    """Refuse what is not floating point (…, K); ``rows`` is N, for the message."""
    if x.dim() == 0 or x.shape[-1] != columns or not x.is_floating_point():
        raise LayerError(
            f"input is {x.dtype} of shape {tuple(x.shape)}; this layer takes floating point of shape "
            f"(..., {columns}) and has {rows} outputs"
        )


def is_native(tensor: Tensor, format: WeightFormat, environment: Environment) -> bool:
    """Return whether an operation of :mod:`tsq_layers.runtime.native` can take a tensor.

    It must be on a CPU, with values or inside ``torch.compile``.
    """
    if tensor.device.type != "cpu" or environment.exporting or format.grid not in native.GRIDS:
        return False
    return (environment.compiling or has_values(tensor, environment)) and native.usable()


def can_compile(tensor: Tensor, environment: Environment) -> bool:
    """Return whether a tensor has values, on a device where compilation has not failed."""
    return tensor.device.type not in _uncompilable and has_values(tensor, environment)


def _trains(parts: Parts) -> bool:
    """Return whether gradients of grids are wanted, which the operations do not have."""
    shifts = parts.shifts
    return torch.is_grad_enabled() and (
        parts.grids.requires_grad or (shifts is not None and shifts.requires_grad)
    )


# --- products ------------------------------------------------------------------------------------
# Each takes x (…, K) and bias (N,) in one dtype, and gives (…, N) in that dtype.


def native_product(x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat) -> Tensor:
    """One operation for a CPU."""
    words, grids, shifts = parts[:3]
    columns = x.shape[-1]
    group_size = format.group_columns(columns)
    try:
        y: Tensor = torch.ops.tsq_layers.linear.default(
            x, words, grids, shifts, bias, format.bits, group_size, columns, native.FEW_ROWS
        )
    except RuntimeError:
        packing.check_words(words, format.bits, columns)  # the operation looks too, and says less
        raise
    return y


def dense_product(x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat) -> Tensor:
    """Dequantise, compiled where packed layers are, and multiply."""
    return F.linear(x, dense_weight(parts, format, x.shape[-1], x.dtype), bias)


def dense_eager(x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat) -> Tensor:
    """Dequantise without a compiler, and multiply."""
    return F.linear(x, dequantize(parts, format, x.shape[-1], x.dtype), bias)


def dense_rows(x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat) -> Tensor:
    """:func:`dense_product` of all rows of the input in one dimension."""
    x_MK = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y_MN = dense_product(x_MK, bias, parts, format)
    return y_MN.reshape(*x.shape[:-1], parts.words.shape[0])


def decode_inlined(x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat) -> Tensor:
    """One pass over the words, as a part of the graph that is being compiled."""
    columns = x.shape[-1]
    x_MK = x.reshape(math.prod(x.shape[:-1]), columns)
    y_MN = few_rows(x_MK, parts, bias, format, columns)
    return y_MN.to(x.dtype).reshape(*x.shape[:-1], parts.words.shape[0])


def decode_compiled(x: Tensor, bias: Tensor | None, parts: Parts, format: WeightFormat) -> Tensor:
    """One pass over the words, compiled; where that fails, dequantise and multiply."""
    columns = x.shape[-1]
    x_MK = x.reshape(math.prod(x.shape[:-1]), columns)
    # Inductor vectorises no loop that reads both bfloat16 and float16: only grids may be either.
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_run = x_MK.detach().to(working).contiguous()
    bias_run = None if bias is None else bias.detach().to(working)
    if x_run.shape[0] > 1:
        torch._dynamo.maybe_mark_dynamic(x_run, 0)
    y_MN = _run_compiled(few_rows, parts, x_run, parts.codes, bias_run, format.plain, columns)
    if y_MN is None:
        y_MN = dense_product(x_MK, bias, parts, format)
    return y_MN.to(x.dtype).reshape(*x.shape[:-1], parts.words.shape[0])


def dense_weight(parts: Parts, format: WeightFormat, columns: int, dtype: torch.dtype) -> Tensor:
    """:func:`dequantize` for a product, compiled where that is how packed layers run.

    A compiler may round the product and the sum of an offset once, where :func:`dequantize` rounds twice.
    """
    weight = None
    words = parts.words
    plain = words.device.type in _PLAIN_MATRICES or torch.compiler.is_compiling() or _trains(parts)
    if not plain and can_compile(words, environment_of(words)):
        weight = _run_compiled(matrix_of, parts, parts.codes, format.plain, columns, dtype)
    return dequantize(parts, format, columns, dtype) if weight is None else weight


# --- compilation -------------------------------------------------------------------------------

_compiled: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
_uncompilable: set[str] = set()
_PLAIN_MATRICES = {"cpu"}  # device types on which dequantising is not compiled


def _run_compiled(function: Callable[..., Tensor], parts: Parts, *arguments: Any) -> Tensor | None:
    """Run a function of a packed weight, compiled; ``None`` where that fails, with a warning the first time.

    Dynamo counts recompilations per code object and silently gives up at the eighth: a model with
    nine shapes of layers would run its ninth eagerly. So every kind of call, that is, all that Dynamo
    would recompile for, has a code object of its own.
    """
    device, rows = parts.words.device, parts.words.shape[0]
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
        device.type
    )
    key = function, rows, _traits(arguments), device, autocast, torch.is_inference_mode_enabled()
    if key not in _compiled:
        code = function.__code__.replace(co_name=f"{function.__name__}_{len(_compiled)}")
        fresh = FunctionType(code, function.__globals__)
        _compiled[key] = torch.compile(fresh, fullgraph=True, dynamic=False)
    try:
        with torch.no_grad():
            return _compiled[key](*arguments)
    except (
        torch._dynamo.exc.ShortenTraceback,
        torch._dynamo.exc.InternalTorchDynamoError,
    ) as error:
        _uncompilable.add(device.type)
        reason = " ".join(str(error).strip().splitlines()[:2])
        warnings.warn(
            f"torch.compile fails on {device.type} ({reason}); quantised layers run uncompiled there, "
            "which is slow for few rows of input. Install a C++ compiler (g++ or clang; Triton on a GPU), "
            "or silence this by torch.compiler.set_stance('force_eager')",
            CompileWarning,
            stacklevel=3,
        )
        return None


def _traits(argument: Any) -> Any:
    """Return everything for which Dynamo would recompile, hashable."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.dim(), argument.is_inference(), argument.shape[0] == 1
    if type(argument) in (tuple, Parts):
        return tuple(_traits(value) for value in argument)
    return argument
