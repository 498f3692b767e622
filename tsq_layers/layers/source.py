"""What a module's forward does with its weights, as its source says: nothing is run.

A parameter that holds several matrices can be replaced by layers if it is only multiplied by, with
one matrix at a time or with all at once. Whoever replaces it must know beforehand that nothing else
is done with it, and whether the matrices are (out, in) or (in, out). Both stand in the source.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType, MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Products of an input and one matrix, or all of them; and whether they take matrices as (in, out).
BY_ONE: Mapping[Any, bool] = MappingProxyType(
    {F.linear: False, torch.matmul: True, Tensor.matmul: True, torch.mm: True, Tensor.mm: True}
)
BY_ALL: Mapping[Any, bool] = MappingProxyType(
    {torch.bmm: True, Tensor.bmm: True, torch.matmul: True, Tensor.matmul: True}
)
READABLE = ("shape", "dtype", "device")  # what may be asked of a weight without taking it
_METHODS = {"matmul": Tensor.matmul, "mm": Tensor.mm, "bmm": Tensor.bmm}
_LOOPS = (ast.For, ast.ListComp, ast.GeneratorExp)
_FLIPS = {".mT", ".transpose(-1, -2)", ".transpose(-2, -1)"}
_FLIPS_ONE = {*_FLIPS, ".T", ".t()", ".transpose(0, 1)", ".transpose(1, 0)"}
_FLIPS_ALL = {*_FLIPS, ".transpose(1, 2)", ".transpose(2, 1)"}
_TOLD = "told"


@dataclass(frozen=True)
class Product:
    """A multiplication by a weight.

    Args:
        transposed: its matrices are stored as (in, out).
        as_float: it is turned to float32 first.
    """

    transposed: bool
    as_float: bool


_Use = Product | str | None  # a product; told about; anything else


def products(function: FunctionType, owner: type[nn.Module]) -> dict[str, frozenset[Product]]:
    """The attributes of ``self`` that a method only multiplies by, and how.

    The methods of ``owner`` that it calls are read too. To ask for a weight's shape, dtype or
    device, or to compare it with ``None``, is allowed; an attribute that anything else is done with
    is left out.

    Args:
        function: the method, such as a forward.
        owner: the class of ``self``.

    Returns:
        nothing also where it cannot be told: there is no source; a method is decorated; ``self`` is
        assigned to, or handed on as a whole.

    Example:
        >>> products(nn.Linear.forward, nn.Linear)  # F.linear(input, self.weight, self.bias)
        {}
    """
    found: dict[str, set[_Use]] = {}
    methods, seen = [function], {function}
    while methods:
        reads = _reads(methods.pop())
        if reads is None or any(
            hasattr(nn.Module, name) or name in ("__dict__", "_parameters") for name in reads
        ):
            return {}  # by the methods of nn.Module, every parameter can be reached
        for name, uses in reads.items():
            found.setdefault(name, set()).update(uses - {_TOLD})
            method = inspect.getattr_static(owner, name, None)
            method = method.fget if isinstance(method, property) else method
            if isinstance(method, FunctionType) and method not in seen:
                seen.add(method)
                methods.append(method)
    return {
        name: frozenset(use for use in uses if isinstance(use, Product))
        for name, uses in found.items()
        if uses and None not in uses
    }


@functools.cache
def _reads(function: FunctionType) -> Mapping[str, frozenset[_Use]] | None:
    """Attribute of ``self`` → what is done with it; ``None`` if the source does not tell."""
    if hasattr(function, "__wrapped__"):
        return None
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return None
    itself = definition.args.args[0].arg
    parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
    reads: dict[str, frozenset[_Use]] = {}
    for node in ast.walk(definition):
        if isinstance(node, ast.Name) and node.id in (itself, "super", "__class__"):
            attribute = parents[node]
            if not isinstance(attribute, ast.Attribute) or not isinstance(attribute.ctx, ast.Load):
                return None
            use = _use(attribute, parents, function.__globals__)
            reads[attribute.attr] = reads.get(attribute.attr, frozenset()) | {use}
    return reads


def _use(weight: ast.expr, parents: Mapping[ast.AST, ast.AST], names: Mapping[str, Any]) -> _Use:
    """What is done with an attribute, by the expressions that it stands in."""
    node, parent = weight, parents[weight]
    if isinstance(parent, ast.Attribute) and parent.attr in READABLE:
        return _TOLD
    if isinstance(parent, ast.Compare) and all(
        isinstance(sign, (ast.Is, ast.IsNot)) for sign in parent.ops
    ):
        return _TOLD
    index = parent.slice if isinstance(parent, ast.Subscript) and parent.value is weight else None
    one = index is not None and not isinstance(index, (ast.Slice, ast.Tuple))
    if one:
        assert isinstance(parent, ast.Subscript)
        node = parent
    node, flipped, as_float = _through_views(node, parents, one=one)
    product = _product(node, parents[node], names)
    if one and product in (torch.matmul, Tensor.matmul) and not _is_number(index, parents):
        return None  # with several indices it would be a batched product
    takes_transposed = (BY_ONE if one else BY_ALL).get(product)
    return None if takes_transposed is None else Product(takes_transposed != flipped, as_float)


def _through_views(
    node: ast.expr, parents: Mapping[ast.AST, ast.AST], *, one: bool
) -> tuple[ast.expr, bool, bool]:
    """``x`` → the ``x.float().T`` that it stands in; whether that is transposed, and turned to float32."""
    flips, casts = (_FLIPS_ONE, {".float()"}) if one else (_FLIPS_ALL, set())
    flipped = as_float = False
    while isinstance(attribute := parents[node], ast.Attribute):
        call = parents[attribute]
        outer = call if isinstance(call, ast.Call) and call.func is attribute else attribute
        view = ast.unparse(outer).removeprefix(ast.unparse(node))
        if view not in flips | casts:
            break
        flipped ^= view in flips
        as_float |= view in casts
        node = outer
    return node, flipped, as_float


def _product(node: ast.expr, parent: ast.AST, names: Mapping[str, Any]) -> Any:
    """The function that multiplies by ``node``, which is its second operand; ``None`` if there is none."""
    if (
        isinstance(parent, ast.BinOp)
        and isinstance(parent.op, ast.MatMult)
        and parent.right is node
    ):
        return torch.matmul
    if not isinstance(parent, ast.Call):
        return None
    function = _resolved(parent.func, names)
    operands, keywords = parent.args, {keyword.arg for keyword in parent.keywords}
    if function is None and isinstance(parent.func, ast.Attribute):
        return _METHODS.get(parent.func.attr) if operands == [node] and not keywords else None
    plain = len(operands) == 2 and not keywords
    with_bias = function is F.linear and len(operands) in (2, 3) and keywords <= {"bias"}
    known = any(function is product for product in (*BY_ONE, *BY_ALL))
    return function if known and (plain or with_bias) and operands[1] is node else None


def _resolved(name: ast.expr, names: Mapping[str, Any]) -> Any:
    """What a dotted name stands for, ``None`` if it is not global."""
    if isinstance(name, ast.Attribute):
        return getattr(_resolved(name.value, names), name.attr, None)
    return names.get(name.id) if isinstance(name, ast.Name) else None


def _is_number(index: ast.AST | None, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """Whether an index is one number, as far as that can be seen: a constant, or inside of a loop."""
    number = isinstance(index, ast.Constant)
    while index is not None and not number:
        index = parents.get(index)
        number = isinstance(index, _LOOPS)
    return number
