"""Measure imports: layers of the contract, arrows between packages, circles of files.

Imports count wherever they stand: at the top, inside functions, under ``TYPE_CHECKING``, and by a
string that names a module of the package.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

_STRING = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+")


def modules_of(package: Path) -> dict[str, Path]:
    """Return the dotted name of every module of a package, and its file."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        modules[".".join(parts)] = path
    return modules


def graph_of(package: Path) -> dict[str, set[str]]:
    """Return, for every module, the modules of the package that it imports."""
    modules = modules_of(package)
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {target for target in _imported(tree, modules) if target != name}
    return graph


def _imported(tree: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.Call):
            yield from _by_string(node, modules)


def _by_string(call: ast.Call, modules: dict[str, Path]) -> Iterator[str]:
    """Yield modules that a call names by a string, as ``importlib.import_module`` takes it."""
    for argument in call.args:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            text = argument.value
            if _STRING.fullmatch(text) and text in modules:
                yield text


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of modules that import each other, directly or through others.

    Each is a strongly connected component of more than one module (Tarjan's algorithm).
    """
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for target in sorted(graph.get(name, ())):
            if target not in index:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], index[target])
        if lowest[name] == index[name]:
            component = []
            while not component or component[-1] != name:
                component.append(stack.pop())
            if len(component) > 1:
                components.append(sorted(component))

    for name in graph:
        if name not in index:
            visit(name)
    return sorted(components)


def layers_of(project: Path) -> list[set[str]]:
    """Return the layers of the import contract, the highest first; each a set of children."""
    values = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in values["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "layers":
            return [set(re.split(r"\s*[|:]\s*", layer)) for layer in contract["layers"]]
    raise ValueError(f"{project / 'pyproject.toml'} has no contract of layers")


def heights(layers: list[set[str]]) -> dict[str, int]:
    """Return the height of each child of the package; the lowest is 0."""
    return {child: height for height, children in enumerate(reversed(layers)) for child in children}


def child_of(module: str) -> str:
    """Return the package or root module that a module belongs to; ``""`` for the root itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def upward(graph: dict[str, set[str]], layers: list[set[str]]) -> list[tuple[str, str]]:
    """Return the imports that run up in the contract, or to a neighbour in the same layer."""
    height = heights(layers)
    climbing = []
    for name, targets in graph.items():
        for target in sorted(targets):
            here, there = child_of(name), child_of(target)
            if here == there or here not in height or there not in height:
                continue
            if height[there] >= height[here]:
                climbing.append((name, target))
    return climbing


def arrows(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Return the pairs of packages of which the first imports the second."""
    pairs = set()
    for name, targets in graph.items():
        for target in targets:
            here, there = child_of(name), child_of(target)
            if here and there and here != there:
                pairs.add((here, there))
    return pairs
