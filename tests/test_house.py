"""The shape of the package: what may import what, and how large its rooms are."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are beside the package, not in it

from benchmarks.structure import imports

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "tsq_layers"
GRAPH = imports.graph_of(PACKAGE)
LAYERS = imports.layers_of(PROJECT)


def test_files_import_each_other_in_no_circle() -> None:
    assert imports.circles(GRAPH) == []


def test_no_import_runs_up() -> None:
    assert imports.upward(GRAPH, LAYERS) == []


def test_root_and_packages_are_few() -> None:
    modules = list(PACKAGE.glob("*.py"))
    packages = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    assert len(modules) <= 6
    assert len(packages) <= 13
    assert len(LAYERS) <= 10
    named = set().union(*LAYERS)
    assert named == {path.stem for path in modules if path.stem != "__init__"} | {
        path.name for path in packages
    }


def test_tests_mirror_the_packages() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.parent.name for path in (PROJECT / "tests").glob("*/test_*.py")}
    assert packages == folders


def package_of(folder: Path, files: dict[str, str]) -> Path:
    """A package ``house`` of some files."""
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "house"


@pytest.mark.parametrize(
    "back",
    [
        "from house import a",
        "import house.a",
        "def f():\n    from house.a import g",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.a import g",
        "import importlib\ng = importlib.import_module('house.a')",
    ],
    ids=["from", "import", "in a function", "for types", "by a string"],
)
def test_circle_is_found_whatever_way_a_file_is_imported(tmp_path: Path, back: str) -> None:
    files = {"a.py": "from house.b import f\ndef g(): ...", "b.py": back}
    graph = imports.graph_of(package_of(tmp_path, files))
    assert imports.circles(graph) == [["house.a", "house.b"]]
    layers = [{"a"}, {"b"}]
    assert imports.upward(graph, layers) == [("house.b", "house.a")]


def test_circle_over_several_files_is_found_once(tmp_path: Path) -> None:
    files = {
        "a.py": "from house.low import b",
        "low/__init__.py": "",
        "low/b.py": "from house.low.c import f",
        "low/c.py": "from house import a\ndef f(): ...",
        "d.py": "from house import a",
    }
    graph = imports.graph_of(package_of(tmp_path, files))
    assert imports.circles(graph) == [["house.a", "house.low.b", "house.low.c"]]
    assert imports.arrows(graph) == {("a", "low"), ("low", "a"), ("d", "a")}


def test_packages_in_one_layer_may_not_import_each_other(tmp_path: Path) -> None:
    graph = imports.graph_of(package_of(tmp_path, {"a.py": "from house import b", "b.py": ""}))
    assert imports.circles(graph) == []
    assert imports.upward(graph, [{"a", "b"}]) == [("house.a", "house.b")]
    assert imports.upward(graph, [{"a"}, {"b"}]) == []
