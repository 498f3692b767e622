"""Read in the source code of a module's forward what it does with its weights; nothing is run.

A parameter that holds several matrices can be replaced by layers if the forward only multiplies by
it, by one matrix at a time or by all at once. Before it is replaced, it must be known that the forward
does nothing else with it, and if the matrices are (out, in) or (in, out). The source shows both.
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

# Functions that multiply an input by one matrix, or by all of them → True if they take matrices as (in, out).
BY_ONE: Mapping[Any, bool] = MappingProxyType(
    {F.linear: False, torch.matmul: True, Tensor.matmul: True, torch.mm: True, Tensor.mm: True}
)
BY_ALL: Mapping[Any, bool] = MappingProxyType(
    {torch.bmm: True, Tensor.bmm: True, torch.matmul: True, Tensor.matmul: True}
)
READABLE = ("shape", "dtype", "device")  # attributes of a weight that a forward may read
_METHODS = {"matmul": Tensor.matmul, "mm": Tensor.mm, "bmm": Tensor.bmm}
_LOOPS = (ast.For, ast.ListComp, ast.GeneratorExp)
_FLIPS = {".mT", ".transpose(-1, -2)", ".transpose(-2, -1)"}
_FLIPS_ONE = {*_FLIPS, ".T", ".t()", ".transpose(0, 1)", ".transpose(1, 0)"}
_FLIPS_ALL = {*_FLIPS, ".transpose(1, 2)", ".transpose(2, 1)"}
_READ = "read"


@dataclass(frozen=True)
class Product:
    """A multiplication by a weight.

    Args:
        transposed: True if the matrices of the weight are stored as (in, out).
        as_float: True if the weight is converted to float32 first.
    """

    transposed: bool
    as_float: bool


# The use of a weight: a product, the reading of an attribute (_READ), or anything else (None).
_Use = Product | str | None


def products(function: FunctionType, owner: type[nn.Module]) -> dict[str, frozenset[Product]]:
    """Return the attributes of ``self`` that a method only multiplies by, and the products.

    Methods of ``owner`` that it calls are read too. A method may also read the shape, dtype or device of
    an attribute, or compare it with ``None``. Attributes that it uses in any other way are left out.

    Args:
        function: the method, such as a forward.
        owner: the class of ``self``.

    Returns:
        the products of each attribute, by name. Empty too if the source does not show them: it is not
        available, a method is decorated, or ``self`` is assigned to or passed on as a whole.

    Example:
        >>> products(nn.Linear.forward, nn.Linear)  # F.linear(input, self.weight, self.bias)
        {}
    """
    uses: dict[str, set[_Use]] = {}
    methods = [function]
    visited = {function}
    while methods:
        reads = _reads(methods.pop())
        if reads is None or any(_reaches_all(name) for name in reads):
            return {}
        for name, uses_of_name in reads.items():
            uses.setdefault(name, set()).update(uses_of_name - {_READ})
            method = _method(owner, name)
            if method is not None and method not in visited:
                visited.add(method)
                methods.append(method)
    return _products_only(uses)


def _products_only(uses: Mapping[str, set[_Use]]) -> dict[str, frozenset[Product]]:
    """Return the products of the attributes that have no other uses."""
    result: dict[str, frozenset[Product]] = {}
    for name, uses_of_name in uses.items():
        if uses_of_name and None not in uses_of_name:
            result[name] = frozenset(use for use in uses_of_name if isinstance(use, Product))
    return result


def _reaches_all(name: str) -> bool:
    """Return True if an attribute of ``self`` may give access to every parameter, as methods of ``nn.Module`` do."""
    return hasattr(nn.Module, name) or name in ("__dict__", "_parameters")


def _method(owner: type[nn.Module], name: str) -> FunctionType | None:
    """Return the function of a method or property of a class, or ``None``."""
    attribute = inspect.getattr_static(owner, name, None)
    if isinstance(attribute, property):
        attribute = attribute.fget
    return attribute if isinstance(attribute, FunctionType) else None


@functools.cache
def _reads(function: FunctionType) -> Mapping[str, frozenset[_Use]] | None:
    """Return the uses of each attribute of ``self`` in a method; ``None`` if the source does not show them."""
    definition = _definition(function)
    if definition is None:
        return None
    self_name = definition.args.args[0].arg
    parents: dict[ast.AST, ast.AST] = {}
    for node in ast.walk(definition):
        for child in ast.iter_child_nodes(node):
            parents[child] = node
    reads: dict[str, frozenset[_Use]] = {}
    for node in ast.walk(definition):
        if not isinstance(node, ast.Name) or node.id not in (self_name, "super", "__class__"):
            continue
        attribute = parents[node]
        if not isinstance(attribute, ast.Attribute) or not isinstance(attribute.ctx, ast.Load):
            return None
        use = _use(attribute, parents, function.__globals__)
        reads[attribute.attr] = reads.get(attribute.attr, frozenset()) | {use}
    return reads


def _definition(function: FunctionType) -> ast.FunctionDef | None:
    """Return the syntax tree of a method with at least one argument; ``None`` if it is decorated or has no source."""
    if hasattr(function, "__wrapped__"):
        return None
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return None
    return definition


def _use(weight: ast.expr, parents: Mapping[ast.AST, ast.AST], names: Mapping[str, Any]) -> _Use:
    """Return the use of an attribute, by the expressions around it.

    Args:
        weight: the expression ``self.weight``.
        parents: the parent of each node.
        names: the global names of the method.
    """
    parent = parents[weight]
    if _is_reading(parent):
        return _READ
    node = weight
    index = _index(weight, parent)
    takes_one = index is not None
    if takes_one:
        assert isinstance(parent, ast.Subscript)
        node = parent
    node, flipped, as_float = _through_views(node, parents, one=takes_one)
    product = _product(node, parents[node], names)
    is_matmul = product in (torch.matmul, Tensor.matmul)
    if takes_one and is_matmul and not _is_number(index, parents):
        return None  # with several indices it would be a batched product
    layouts = BY_ONE if takes_one else BY_ALL
    if product not in layouts:
        return None
    return Product(transposed=layouts[product] != flipped, as_float=as_float)


def _index(weight: ast.expr, parent: ast.AST) -> ast.expr | None:
    """Return the index of ``weight[index]``; ``None`` if there is none, or it is a slice or a tuple."""
    if not isinstance(parent, ast.Subscript) or parent.value is not weight:
        return None
    return None if isinstance(parent.slice, (ast.Slice, ast.Tuple)) else parent.slice


def _is_reading(parent: ast.AST) -> bool:
    """Return True if the parent of a weight reads an attribute of it, or compares it by ``is``."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in READABLE
    if isinstance(parent, ast.Compare):
        return all(isinstance(sign, (ast.Is, ast.IsNot)) for sign in parent.ops)
    return False


def _through_views(
    node: ast.expr, parents: Mapping[ast.AST, ast.AST], *, one: bool
) -> tuple[ast.expr, bool, bool]:
    """Return the outermost view or cast of an expression: of ``x`` in ``x.float().T``, the whole.

    Args:
        node: the expression.
        parents: the parent of each node.
        one: True if the expression is one matrix, False if it is all of them.

    Returns:
        the view, True if it is transposed, and True if it is converted to float32.
    """
    flips = _FLIPS_ONE if one else _FLIPS_ALL
    casts = {".float()"} if one else set()
    flipped = False
    as_float = False
    while isinstance(attribute := parents[node], ast.Attribute):
        call = parents[attribute]
        outer: ast.expr = attribute
        if isinstance(call, ast.Call) and call.func is attribute:
            outer = call
        view = ast.unparse(outer).removeprefix(ast.unparse(node))
        if view in flips:
            flipped = not flipped
        elif view in casts:
            as_float = True
        else:
            break
        node = outer
    return node, flipped, as_float


def _product(node: ast.expr, parent: ast.AST, names: Mapping[str, Any]) -> Any:
    """Return the function that multiplies by ``node``, its second operand; ``None`` if there is none."""
    if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.MatMult):
        return torch.matmul if parent.right is node else None
    if not isinstance(parent, ast.Call):
        return None
    function = _resolved(parent.func, names)
    if function is None and isinstance(parent.func, ast.Attribute):
        # x.matmul(weight): the first operand is before the dot, and its type is not known.
        is_only_operand = parent.args == [node] and not parent.keywords
        return _METHODS.get(parent.func.attr) if is_only_operand else None
    return function if _is_product(function, parent, node) else None


def _is_product(function: Any, call: ast.Call, node: ast.expr) -> bool:
    """Return True if a call of a function is a product with ``node`` as its second operand."""
    if not any(function is product for product in (*BY_ONE, *BY_ALL)):
        return False
    operands = call.args
    if len(operands) < 2 or operands[1] is not node:
        return False
    keywords = {keyword.arg for keyword in call.keywords}
    if function is F.linear:
        return len(operands) <= 3 and keywords <= {"bias"}
    return len(operands) == 2 and not keywords


def _resolved(name: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return the object that a dotted name stands for, ``None`` if it is not global."""
    if isinstance(name, ast.Attribute):
        return getattr(_resolved(name.value, names), name.attr, None)
    return names.get(name.id) if isinstance(name, ast.Name) else None


def _is_number(index: ast.AST | None, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """Return True if an index seems to be one number: it is a constant, or inside of a loop."""
    if isinstance(index, ast.Constant):
        return True
    node = index
    while node is not None:
        node = parents.get(node)
        if isinstance(node, _LOOPS):
            return True
    return False
