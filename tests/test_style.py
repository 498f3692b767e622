"""What must not stand in the library's sources, read as syntax: comments and docstrings may speak of it."""

import ast
from pathlib import Path

import pytest

import tsq_layers

ROOT = Path(tsq_layers.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
# Here a value is read by sync.to_host alone.
ON_THE_DEVICE = {
    "calibration",
    "layers",
    "numerics",
    "observer",
    "passes",
    "runtime",
    "solver",
    "workflow",
}
# The function itself.
MAY_READ = {"numerics/sync.py"}
MAY_PRINT = {ROOT / "__main__.py"}  # what a command says, it prints


def dotted(node):
    """``a.b.c`` of a name or attribute; the part behind anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source, *, may_print=False, may_read=False):
    """Lines and names of what is forbidden."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = ""
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            last = called.rpartition(".")[2]
            if called in ("print", "breakpoint", "eval", "exec") and not (
                may_print and called == "print"
            ):
                name = called
            elif called in ("torch.load", "torch.save") or last in ("cuda", "empty_cache"):
                name = called
            elif last in ("item", "tolist") and not may_read:
                name = called
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            name = next(
                (m for m in modules if m.split(".")[0] in ("pickle", "dill", "joblib", "marshal")),
                "",
            )
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            name = "bare except"
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("cuda")
        ):
            name = "device literal"
        if name:
            found.append((node.lineno, name))
    return found


def test_sources_are_found():
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in SOURCES}
    assert rooms >= ON_THE_DEVICE
    assert {path.name for path in MAY_PRINT} <= {path.name for path in SOURCES}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("print(1)", "print"),
        ("import pickle", "pickle"),
        ("from pickle import load", "pickle"),
        ("torch.load(path)", "torch.load"),
        ("x.cuda()", "x.cuda"),
        ("f(x).sum().item()", ".item"),
        ("torch.zeros(3, device='cuda:0')", "device literal"),
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
    ],
)
def test_offence_is_found(source, name):
    assert [found for _, found in offences(source)] == [pytest.approx(name)] or offences(source)[0][
        1
    ].endswith(name)


def test_harmless_code_is_no_offence():
    assert (
        offences('"""print(1), torch.load and pickle."""\nx.item\ntorch.cuda.current_stream()')
        == []
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_has_no_offence(path):
    name = str(path.relative_to(ROOT))
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    found = offences(
        path.read_text(encoding="utf-8"),
        may_print=path in MAY_PRINT,
        may_read=room not in ON_THE_DEVICE or name in MAY_READ,
    )
    if name == "passes/modes.py":  # all device types that autocast knows
        found = [offence for offence in found if offence[1] != "device literal"]
    assert found == []
