"""The table that says how an input goes through a packed weight.

``TABLE`` is read from the top; the first rule that applies names the route. What each route does is a function
in :mod:`tsq_layers.runtime.forward`.

The order of the rules and of the conditions in them is part of the contract: inside ``torch.compile`` a look at
the number of rows becomes a guard, and while exporting that number may be a symbol. So it is looked at only
where everything before it leaves a choice.

Shapes: N rows of the weight (outputs), K columns (inputs), M rows of input.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tsq_layers.numerics import packing
from tsq_layers.numerics.weight import WeightFormat
from tsq_layers.runtime import kernels, native
from tsq_layers.runtime.environment import Environment
from tsq_layers.runtime.one_pass import one_pass
from tsq_layers.runtime.parts import Parts

Route = Literal[
    "integers",
    "dense_with_entries",
    "dense_eager",
    "native",
    "dense",
    "decode_inlined",
    "decode_compiled",
    "dense_rows",
]
"""A way through a packed weight.

* ``"integers"``: 8-bit inputs times codes, in integers.
* ``"dense_with_entries"``: the weight is dequantised together with the entries of its sparse part.
* ``"dense_eager"``: the weight is dequantised without a compiler.
* ``"native"``: one operation of :mod:`tsq_layers.runtime.native`.
* ``"dense"``: the weight is dequantised, compiled where packed layers are, and multiplied by.
* ``"decode_inlined"``: one pass over the words as part of the graph that is being compiled.
* ``"decode_compiled"``: one pass over the words, compiled here.
* ``"dense_rows"``: as ``"dense"``, with all rows of the input in one dimension.
"""

INTEGER_ROWS = 17  # torch._int_mm takes no fewer on a GPU
INTEGER_MULTIPLE = 8  # of which N and K must be there
INTEGER_COLUMNS = 32768  # more could overflow 32 bits: 127 · (128 + 255) a column


class Call(NamedTuple):
    """All that the rules look at."""

    x: Tensor
    parts: Parts
    format: WeightFormat
    environment: Environment

    @property
    def rows(self) -> int:
        """M."""
        return math.prod(self.x.shape[:-1])


def route(x: Tensor, parts: Parts, format: WeightFormat, environment: Environment) -> Route:
    """The way of an input through a packed weight.

    Args:
        x: floating point (…, K), in the basis of the codes, not yet rounded.
        parts: of the weight.
        format: of the weight.
        environment: of the call.

    Example:
        >>> from tsq_layers.runtime.environment import environment_of
        >>> words, x = packing.pack(torch.zeros(8, 64, dtype=torch.uint8), bits=4), torch.ones(3, 64)
        >>> weight_format = WeightFormat(bits=4, group_size=None, grid="symmetric")
        >>> parts = Parts(words, torch.ones(8, 1).half(), None)
        >>> route(x, parts, weight_format, environment_of(x)._replace(exporting=True))
        'dense'
    """
    call = Call(x, parts, format, environment)
    for rule in TABLE:
        if rule.applies(call):
            return rule.route
    raise AssertionError("the last rule of the table applies to every call")


def _integers_pay(call: Call) -> bool:
    """Return whether inputs are rounded, and integers can be multiplied here and are worth it.

    That is on accelerators, for many rows of input. Not on a CPU: without instructions for 8-bit products
    ``torch._int_mm`` takes 8 to 25 times as long as the product of float32 (measured on AVX2). Not for
    gradients, which go through the rounded input.
    """
    x, parts, format, environment = call
    if format.activation_bits is None or x.device.type == "cpu" or x.dtype == torch.float64:
        return False
    if environment.compiling or environment.transforming or environment.differentiating:
        return False
    columns = x.shape[-1]
    fits = (
        format.has_zero_points
        and not format.has_outliers
        and format.has_one_group(columns)
        and columns <= INTEGER_COLUMNS
        and columns % INTEGER_MULTIPLE == parts.words.shape[0] % INTEGER_MULTIPLE == 0
        and call.rows >= INTEGER_ROWS
    )
    return fits and has_integer_product(x.device)


def has_integer_product(device: torch.device) -> bool:
    """Return whether PyTorch multiplies matrices of 8-bit integers on a device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_int_mm", device.type.upper())


def _has_many_rows_of_entries(call: Call) -> bool:
    """Return whether entries of a sparse part cost less in a dense weight than one by one."""
    if not call.format.outliers:
        return False
    return call.environment.exporting or call.rows > kernels.FEW_ROWS


def _has_dual_numbers(call: Call) -> bool:
    """Of which neither the operations nor functions with a gradient of their own know."""
    return call.environment.dual_numbers


def _is_native(call: Call) -> bool:
    """Return whether an operation for a CPU takes it, and a product of half precision is not faster."""
    environment = call.environment
    dtype = environment.dtype
    if dtype not in native.DTYPES or not kernels.is_native(call.x, call.format, environment):
        return False
    if dtype == torch.float32 or not native.multiplies(dtype):
        return True
    return call.rows <= native.FEW_ROWS


def _is_dense_on_cpu(call: Call) -> bool:
    """Return whether an operation could take it, but a product of half precision is faster."""
    dtype = call.environment.dtype
    return dtype in native.DTYPES and kernels.is_native(call.x, call.format, call.environment)


def _needs_a_dense_weight(call: Call) -> bool:
    """Return whether one pass over the words is not possible, or not worth it, or must not be decided."""
    format = call.format
    if call.environment.exporting or not one_pass(format, call.x.shape[-1]):
        return True
    return not 0 < call.rows <= most_rows(format)


def most_rows(format: WeightFormat) -> int:
    """Rows of input that one pass over the words takes.

    With tables or several planes only one: of more, Inductor would keep the float32 weights to read them again.
    """
    if format.has_tables or len(packing.planes(1, format.bits)) > 1:
        return 1
    return kernels.FEW_ROWS


def _is_compiled_by_others(call: Call) -> bool:
    """Return whether somebody else's ``torch.compile`` is tracing."""
    return call.environment.compiling


def _can_compile(call: Call) -> bool:
    """Return whether there are values, on a device where compilation has not failed."""
    return kernels.can_compile(call.x, call.environment)


def _always(_: Call) -> bool:
    """Applies to what is left: tensors without values, transforms, devices without a compiler."""
    return True


class Rule(NamedTuple):
    """A route, and the condition under which it is taken."""

    applies: Callable[[Call], bool]
    route: Route


TABLE: tuple[Rule, ...] = (
    Rule(_integers_pay, "integers"),
    Rule(_has_many_rows_of_entries, "dense_with_entries"),
    Rule(_has_dual_numbers, "dense_eager"),
    Rule(_is_native, "native"),
    Rule(_is_dense_on_cpu, "dense"),
    Rule(_needs_a_dense_weight, "dense"),
    Rule(_is_compiled_by_others, "decode_inlined"),
    Rule(_can_compile, "decode_compiled"),
    Rule(_always, "dense_rows"),
)
