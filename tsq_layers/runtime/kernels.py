"""Run a packed layer: pure functions from words and grids to outputs.

A packed weight is three tensors and three numbers. ``words`` are the packed codes; what they stand for
say ``grids`` and ``shifts``:

========================  ======================  ============================================
weight                    grids                   shifts
========================  ======================  ============================================
scales · (codes − zeros)  scales (N, G)           zero points packed like codes, int32 (N, W');
                                                  ``None`` is the constant 2^(bits−1)
scales · codes + offsets  scales (N, G)           offsets (N, G) in the dtype of the scales
table[code]               tables (N, T, 2^bits)   ``None``
========================  ======================  ============================================

Grids are float16, bfloat16 or float32. There is a table for each row (T = 1) or each group (T = G).

With few rows of input (decoding) the words are the traffic, so one pass over them must do everything;
with many the weight is dequantised and multiplied. On a CPU both are the operations of
:mod:`tsq_layers.runtime.native`. On other devices :mod:`tsq_layers.runtime.one_pass` and dequantising are compiled here, one
function for each kind of call (where those operations cannot be built on a CPU, only the former); inside
somebody else's ``torch.compile`` they are inlined. Wherever tensors have no values (fake, meta,
exporting) the plain path runs.

Shapes: N rows of the weight (outputs), K columns (inputs), G groups a row, W words a row, M rows of
input, T tables a row.
"""
# A packed layer is six values; Dynamo and autograd want them flat.

import math
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tsq_layers.errors import CompileWarning, LayerError
from tsq_layers.numerics import grid, packing
from tsq_layers.numerics.autograd import has_dual_numbers, is_differentiated
from tsq_layers.runtime import native
from tsq_layers.runtime.one_pass import Format, few_rows, one_pass

FEW_ROWS = 8
"""Up to this many rows of input are done in one pass over the words where that is compiled; not measured on a GPU."""

_BLOCK = 2**21
"""Weights that are dequantised at a time."""


def dequantize(
    words: Tensor,
    grids: Tensor,
    shifts: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight matrix that packed codes stand for, bit-equal to what :mod:`tsq_layers.numerics.grid` makes of them.

    Args:
        words: packed codes, int32 (N, W).
        grids: scales or tables, as above.
        shifts: packed zero points, offsets or ``None``, as above.
        bits: width of a code and of a zero point.
        group_size: columns that share a scale or a table.
        columns: K.
        dtype: of the result; products and sums are taken in float32 (float64) and rounded once.

    Returns:
        (N, K) in ``dtype``.

    Example:
        >>> words = packing.pack(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), bits=2)
        >>> dequantize(words, torch.tensor([[0.5]]), None, 2, 4, 4, torch.float32)
        tensor([[-1.0000, -0.5000,  0.0000,  0.5000]])
    """
    form, rows = format_of(grids, bits, group_size, columns), words.shape[0]
    if dtype in native.DTYPES and _native(words) and not _trains(grids, shifts):
        packing.check_words(words, bits, columns)
        made: Tensor = torch.ops.tsq_layers.dequantize.default(
            words, grids, shifts, bits, form.group_size, columns, dtype
        )
        return made
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or rows * columns <= _BLOCK
    ):
        return matrix_of(words, grids, shifts, form, dtype)
    # A block of rows at a time: the many float32 intermediates stay small.
    weight_NK = torch.empty(rows, columns, dtype=dtype, device=words.device)
    step = max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        some = None if shifts is None else shifts.narrow(0, first, count)
        block = matrix_of(
            words.narrow(0, first, count), grids.narrow(0, first, count), some, form, dtype
        )
        weight_NK.narrow(0, first, count).copy_(block)
    return weight_NK


def matrix_of(
    words: Tensor, grids: Tensor, shifts: Tensor | None, form: Format, dtype: torch.dtype
) -> Tensor:
    """:func:`dequantize` all at once, which a compiler makes one loop of."""
    codes_NK = packing.unpack(words, form.bits, form.columns)
    if grids.dim() == 3:
        return grid.look_up(codes_NK, grids, form.group_size, dtype)
    if shifts is not None and shifts.is_floating_point():
        return grid.with_offsets(codes_NK, grids, shifts, form.group_size, dtype)
    return grid.dequantize(
        codes_NK, grids, zero_points(grids, shifts, form.bits), form.group_size, dtype
    )


def format_of(grids: Tensor, bits: int, group_size: int, columns: int) -> Format:
    """With one table a row, the row is the group."""
    return Format(
        bits, columns if grids.dim() == 3 and grids.shape[1] == 1 else group_size, columns
    )


def zero_points(scales: Tensor, zero_words: Tensor | None, bits: int) -> Tensor:
    """Zero points uint8 (N, G) from their words, or the constant of a symmetric grid."""
    if zero_words is None:
        return torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8, device=scales.device)
    return packing.unpack(zero_words, bits, scales.shape[1])


def linear(
    x: Tensor,
    words: Tensor,
    grids: Tensor,
    shifts: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
) -> Tensor:
    """``F.linear(x, dequantised weight, bias)`` in the dtype of ``x`` (that of autocast, if it is on).

    Gradients flow to ``x`` and ``bias``, forward and backward; the dequantised matrix is not kept for them. Sums are
    taken in float32 (float64), also for half-precision inputs.

    Args:
        x: floating point (…, K); any number of dimensions from one, any number of rows.
        words: packed codes, int32 (N, W).
        grids: scales or tables, as above.
        shifts: packed zero points, offsets or ``None``, as above.
        bias: (N,) or ``None``.
        bits: width of a code and of a zero point.
        group_size: columns that share a scale or a table.
        columns: K.

    Returns:
        (…, N).

    Raises:
        LayerError: ``x`` is not floating point or its last dimension is not K.

    Warns:
        CompileWarning: once for each device type on which ``torch.compile`` fails.

    Example:
        >>> words = packing.pack(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), bits=2)
        >>> linear(torch.ones(4), words, torch.tensor([[0.5]]), None, None, 2, 4, 4)
        tensor([-1.])
    """
    if _is_simple(x, bias, columns):
        return _run_native(x, words, grids, shifts, bias, Format(bits, group_size, columns))
    check_input(x, columns, words.shape[0])
    x = autocast(x)
    bias = None if bias is None else bias.to(x.dtype)
    if has_dual_numbers():  # of which neither the operations nor the function below know
        return F.linear(
            x, dequantize(words, grids, shifts, bits, group_size, columns, x.dtype), bias
        )
    form = format_of(grids, bits, group_size, columns)
    if (
        is_differentiated(x, bias)
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
    ):
        output: Tensor = _Linear.apply(x, words, grids, shifts, bias, form)
        return output
    return _forward(x, words, grids, shifts, bias, form)


def _is_simple(x: Tensor, bias: Tensor | None, columns: int) -> bool:
    """A quick look at a call that is nothing but the operation: in a small layer a slow one would cost more than it.

    What it does not let pass, the rest of :func:`linear` looks at again.
    """
    return (
        native.is_loaded()
        and type(x) is Tensor
        and x.is_cpu
        and (
            x.dtype == torch.float32
            or (x.dtype in native.DTYPES and x.numel() <= native.FEW_ROWS * columns)
        )
        and x.shape[-1:] == (columns,)
        and (bias is None or bias.dtype == x.dtype)
        and not (
            torch.is_grad_enabled()
            and (x.requires_grad or (bias is not None and bias.requires_grad))
        )
        and not has_dual_numbers()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
    )


def check_input(x: Tensor, columns: int, rows: int) -> None:
    """Refuse what is not floating point (…, K); ``rows`` is N, for the message."""
    if x.dim() == 0 or x.shape[-1] != columns or not x.is_floating_point():
        raise LayerError(
            f"input is {x.dtype} of shape {tuple(x.shape)}; this layer takes floating point of shape (..., {columns}) and has {rows} outputs"
        )


def autocast(x: Tensor) -> Tensor:
    """What autocast, if it is on, makes of the input of a linear layer or a convolution; float64 stays as it is."""
    device_type = x.device.type
    if (
        x.dtype == torch.float64
        or not torch.amp.is_autocast_available(device_type)
        or not torch.is_autocast_enabled(device_type)
    ):
        return x
    return x.to(torch.get_autocast_dtype(device_type))


class _Linear(torch.autograd.Function):
    """Keeps the packed weight, not the dequantised one, for the gradient of the input."""

    @staticmethod
    def forward(
        x: Tensor,
        words: Tensor,
        grids: Tensor,
        shifts: Tensor | None,
        bias: Tensor | None,
        form: Format,
    ) -> Tensor:
        return _forward(x, words, grids, shifts, bias, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, words, grids, shifts, _, form = inputs
        ctx.save_for_backward(words, grids, shifts)
        ctx.form = form

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        words, grids, shifts = ctx.saved_tensors
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            form: Format = ctx.form
            to_x = gradient @ _matrix(words, grids, shifts, form, gradient.dtype)
        if ctx.needs_input_grad[4]:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return to_x, None, None, None, to_bias, None


def _native(tensor: Tensor) -> bool:
    """Whether an operation of :mod:`tsq_layers.runtime.native` can take it: on a CPU, with values or inside ``torch.compile``."""
    if tensor.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    return (torch.compiler.is_compiling() or _has_values(tensor)) and native.usable()


def _trains(grids: Tensor, shifts: Tensor | None) -> bool:
    """Whether gradients of grids are wanted, which the operations do not have."""
    return torch.is_grad_enabled() and (
        grids.requires_grad or (shifts is not None and shifts.requires_grad)
    )


def _has_values(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
    return (
        plain
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
    )


def _forward(
    x: Tensor,
    words: Tensor,
    grids: Tensor,
    shifts: Tensor | None,
    bias: Tensor | None,
    form: Format,
) -> Tensor:
    if x.dtype in native.DTYPES and _native(x):
        return _run_native(x, words, grids, shifts, bias, form)
    # While exporting, the number of rows may be a symbol that must not be compared.
    if torch.compiler.is_exporting() or not one_pass(form.bits, form.group_size, form.columns):
        return _dense(x, words, grids, shifts, bias, form)
    rows = math.prod(x.shape[:-1])
    if rows == 0 or rows > most_rows(grids, form.bits):
        return _dense(x, words, grids, shifts, bias, form)
    x_MK = x.reshape(rows, form.columns)
    if torch.compiler.is_compiling():
        y_MN = few_rows(x_MK, words, grids, shifts, bias, form)
    elif _can_compile(x):
        y_MN = _few(x_MK, words, grids, shifts, bias, form)
    else:
        y_MN = _dense(x_MK, words, grids, shifts, bias, form)
    return y_MN.to(x.dtype).reshape(*x.shape[:-1], words.shape[0])


def most_rows(grids: Tensor, bits: int) -> int:
    """Rows of input that :func:`few_rows` takes.

    With tables or several planes only one: of more, Inductor would keep the float32 weights to read them again.
    """
    return FEW_ROWS if grids.dim() == 2 and len(packing.planes(1, bits)) == 1 else 1


def _run_native(
    x: Tensor,
    words: Tensor,
    grids: Tensor,
    shifts: Tensor | None,
    bias: Tensor | None,
    form: Format,
) -> Tensor:
    # The number of rows is looked at last: inside torch.compile it would be a guard.
    if (
        x.dtype != torch.float32
        and native.multiplies(x.dtype)
        and math.prod(x.shape[:-1]) > native.FEW_ROWS
    ):
        return _dense(x, words, grids, shifts, bias, form)
    try:
        y: Tensor = torch.ops.tsq_layers.linear.default(
            x, words, grids, shifts, bias, *form, native.FEW_ROWS
        )
    except RuntimeError:
        packing.check_words(
            words, form.bits, form.columns
        )  # the operation looks too, and says less
        raise
    return y


def _dense(
    x: Tensor,
    words: Tensor,
    grids: Tensor,
    shifts: Tensor | None,
    bias: Tensor | None,
    form: Format,
) -> Tensor:
    return F.linear(x, _matrix(words, grids, shifts, form, x.dtype), bias)


# --- compilation -------------------------------------------------------------------------------

_compiled: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
_uncompilable: set[str] = set()
_PLAIN_MATRICES = {"cpu"}  # device types on which dequantising is not compiled


def _can_compile(x: Tensor) -> bool:
    """Whether these are tensors with values, on a device where compilation has not failed."""
    return x.device.type not in _uncompilable and _has_values(x)


def _few(
    x_MK: Tensor,
    words: Tensor,
    grids: Tensor,
    shifts: Tensor | None,
    bias: Tensor | None,
    form: Format,
) -> Tensor:
    """:func:`few_rows`, compiled."""
    # Inductor vectorises no loop that reads both bfloat16 and float16: only grids may be either.
    working = torch.float64 if x_MK.dtype == torch.float64 else torch.float32
    x_run = x_MK.detach().to(working).contiguous()
    bias_run = None if bias is None else bias.detach().to(working)
    if x_run.shape[0] > 1:
        torch._dynamo.maybe_mark_dynamic(x_run, 0)
    y_MN = _run_compiled(few_rows, words.shape[0], x_run, words, grids, shifts, bias_run, form)
    return _dense(x_MK, words, grids, shifts, bias, form) if y_MN is None else y_MN


def _matrix(
    words: Tensor, grids: Tensor, shifts: Tensor | None, form: Format, dtype: torch.dtype
) -> Tensor:
    """:func:`dequantize` for a product, compiled where that is how packed layers run.

    A compiler may round the product and the sum of an offset once, where :func:`dequantize` rounds twice.
    """
    made = None
    plain = (
        words.device.type in _PLAIN_MATRICES
        or torch.compiler.is_compiling()
        or _trains(grids, shifts)
    )
    if not plain and _can_compile(words):
        made = _run_compiled(matrix_of, words.shape[0], words, grids, shifts, form, dtype)
    return dequantize(words, grids, shifts, *form, dtype) if made is None else made


def _run_compiled(function: Callable[..., Tensor], rows: int, *arguments: Any) -> Tensor | None:
    """A function of a packed weight of so many rows, compiled; ``None`` where that fails, with a warning the first time.

    Dynamo counts recompilations per code object and silently gives up at the eighth: a model with
    nine shapes of layers would run its ninth eagerly. So every kind of call, that is, all that Dynamo
    would recompile for, has a code object of its own.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
        device.type
    )
    traits = tuple(
        (argument.dtype, argument.dim(), argument.is_inference(), argument.shape[0] == 1)
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    )
    key = function, rows, traits, device, autocast, torch.is_inference_mode_enabled()
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
            f"torch.compile fails on {device.type} ({reason}); quantised layers run uncompiled there, which is slow for few rows of input. Install a C++ compiler (g++ or clang; Triton on a GPU), or silence this by torch.compiler.set_stance('force_eager')",
            CompileWarning,
            stacklevel=3,
        )
        return None
