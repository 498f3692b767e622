"""Measure how dense and how plain Python sources are.

Definitions, the same for every package that is measured:

* a code line is a line that is neither blank, nor a comment, nor part of a docstring;
* a function's length is its lines from ``def`` to its end, without docstring;
* McCabe's number is one more than the branches of a function, nested functions included;
* AST nodes are those of ``ast.walk`` but for contexts (``Load``, ``Store``) and docstrings;
* a comment line has a comment, alone or behind code, that is not for a tool (``# noqa``, ``# type:``);
  its share is of code lines and lines with a comment alone;
* a participle is a name that is assigned in a function and stands in :data:`PARTICIPLES`.
"""

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.With)
_CONTEXTS = (ast.Load, ast.Store, ast.Del)

PARTICIPLES = frozenset(
    [
        "asked",
        "called",
        "changed",
        "chosen",
        "copied",
        "counted",
        "done",
        "drawn",
        "expected",
        "fitted",
        "fixed",
        "folded",
        "found",
        "given",
        "gone",
        "held",
        "joined",
        "kept",
        "known",
        "left",
        "listed",
        "loaded",
        "lost",
        "made",
        "marked",
        "met",
        "missed",
        "moved",
        "named",
        "needed",
        "observed",
        "packed",
        "planned",
        "prepared",
        "pulled",
        "quantised",
        "quantized",
        "read",
        "reduced",
        "refined",
        "rounded",
        "said",
        "saved",
        "seen",
        "sent",
        "shared",
        "shifted",
        "shown",
        "solved",
        "sorted",
        "started",
        "stored",
        "taken",
        "told",
        "tried",
        "used",
        "wanted",
        "whitened",
        "written",
    ]
)
"""Participles that say of a value what was done to it, not what it is."""

RIDDLES = ("What", "How", "Which", "Why", "Where", "Who", "Whose", "Whether")
"""First words of docstrings that are neither a verb nor a definition."""

_TOOLS = re.compile(r"#\s*(noqa|type:|fmt:|ruff:|pragma)")
LONGEST_LINE = 120


@dataclass
class Measures:
    """Figures of one package, and the places behind them.

    Attributes:
        lengths: place and lines of every function.
        branches: place and McCabe's number of every function.
        participles: place and name of every assigned participle.
        names: number of assigned names.
        riddles: place and first words of docstrings that begin with a word of :data:`RIDDLES`.
        long_lines: places of lines longer than :data:`LONGEST_LINE`.
    """

    code_lines: int = 0
    comment_lines: int = 0
    lines_of_comment: int = 0
    nodes: int = 0
    comprehensions: int = 0
    names: int = 0
    lengths: list[tuple[str, int]] = field(default_factory=list)
    branches: list[tuple[str, int]] = field(default_factory=list)
    participles: list[tuple[str, str]] = field(default_factory=list)
    riddles: list[tuple[str, str]] = field(default_factory=list)
    long_lines: list[str] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Return the figures of the table."""
        lengths = [length for _, length in self.lengths]
        branches = [number for _, number in self.branches]
        lines = self.code_lines + self.lines_of_comment
        return {
            "fn 90 %": percentile_90(lengths),
            "fn max": max(lengths, default=0),
            "McCabe 90 %": percentile_90(branches),
            "McCabe max": max(branches, default=0),
            "nodes a line": round(self.nodes / max(1, self.code_lines), 2),
            "comprehensions a 1,000 lines": round(
                1000 * self.comprehensions / max(1, self.code_lines), 1
            ),
            "comments %": round(100 * self.comment_lines / max(1, lines), 1),
            "participles %": round(100 * len(self.participles) / max(1, self.names), 1),
            "long lines": len(self.long_lines),
            "riddles": len(self.riddles),
            "code lines": self.code_lines,
        }


def percentile_90(values: list[int]) -> float:
    """Return the value that nine tenths of the values do not exceed."""
    if len(values) < 2:
        return float(sum(values))
    return round(statistics.quantiles(values, n=10, method="inclusive")[-1], 1)


def measure(package: Path) -> Measures:
    """Measure all Python files below a folder."""
    measures = Measures()
    for path in sorted(package.rglob("*.py")):
        add_source(measures, path.read_text(encoding="utf-8"), str(path.relative_to(package)))
    return measures


def add_source(measures: Measures, source: str, name: str) -> None:
    """Add the figures of one file.

    Args:
        measures: is changed.
        source: text of the file.
        name: of the file, in places.
    """
    tree = ast.parse(source)
    docstrings = set(_docstring_lines(tree))
    alone, behind = _comments(source)
    measures.comment_lines += len(alone) + len(behind)
    measures.lines_of_comment += len(alone)
    for number, line in enumerate(source.splitlines(), start=1):
        if len(line) > LONGEST_LINE:
            measures.long_lines.append(f"{name}:{number}")
        if line.strip() and number not in docstrings and number not in alone:
            measures.code_lines += 1
    for node in ast.walk(tree):
        if not isinstance(node, _CONTEXTS):
            measures.nodes += 1
        if isinstance(node, _COMPREHENSIONS):
            measures.comprehensions += 1
        if isinstance(node, _FUNCTIONS):
            _add_function(measures, node, name)
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Module)):
            text = ast.get_docstring(node) or ""
            if text.split(" ", 1)[0] in RIDDLES:
                place = f"{name}:{getattr(node, 'lineno', 1)}"
                measures.riddles.append((place, text.splitlines()[0]))
    measures.nodes -= sum(1 for _ in _docstrings(tree))


def _add_function(measures: Measures, function: Function, name: str) -> None:
    place = f"{name}:{function.lineno} {function.name}"
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    text = _docstring_of(function)
    if text is not None:
        lines -= (text.end_lineno or text.lineno) - text.lineno + 1
    measures.lengths.append((place, lines))
    measures.branches.append((place, mccabe(function)))
    for target in _assigned(function):
        measures.names += 1
        if target.strip("_") in PARTICIPLES:
            measures.participles.append((place, target))


def mccabe(function: ast.AST) -> int:
    """Return McCabe's number: one more than the branches."""
    number = 1
    for node in ast.walk(function):
        if isinstance(node, _BRANCHES) and not isinstance(node, ast.With):
            number += 1
        elif isinstance(node, ast.BoolOp):
            number += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            number += 1 + len(node.ifs)
        elif isinstance(node, ast.match_case):
            number += 1
    return number


def _assigned(function: Function) -> Iterator[str]:
    """Yield the names that a function assigns, one for each assignment."""
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _docstrings(tree: ast.AST) -> Iterator[ast.Expr]:
    for node in ast.walk(tree):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Module)):
            text = _docstring_of(node)
            if text is not None:
                yield text


def _docstring_of(node: Function | ast.ClassDef | ast.Module) -> ast.Expr | None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first if isinstance(first.value.value, str) else None
    return None


def _docstring_lines(tree: ast.AST) -> Iterator[int]:
    # A string that stands alone behind an assignment documents it: no code either.
    for node in ast.walk(tree):
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str):  # type: ignore[attr-defined]
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _comments(source: str) -> tuple[set[int], set[int]]:
    """Return the numbers of lines with a comment alone, and of those with one behind code."""
    lines = source.splitlines()
    alone, behind = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or _TOOLS.match(token.string):
            continue
        is_alone = lines[token.start[0] - 1].lstrip().startswith("#")
        (alone if is_alone else behind).add(token.start[0])
    return alone, behind
