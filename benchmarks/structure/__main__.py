"""Print the structure of a package: ``python -m benchmarks.structure [PACKAGE …]``.

Examples:
    python -m benchmarks.structure                      # of this checkout
    python -m benchmarks.structure path/to/einops       # style of another package
    python -m benchmarks.structure --worst 10           # the places behind the figures
    python -m benchmarks.structure --walks              # values that go up between packages
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.structure import imports, style

PROJECT = Path(__file__).parents[2]


def main() -> None:
    """Print what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", type=Path, default=[PROJECT / "tsq_layers"])
    parser.add_argument("--project", type=Path, default=PROJECT, help="checkout with the contract")
    parser.add_argument("--worst", type=int, default=0, help="so many places of each figure")
    parser.add_argument("--walks", action="store_true", help="values that go up; runs the package")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.walks:
        print_walks(arguments.project, as_json=arguments.json)
        return
    rows = {str(package): row_of(package) for package in arguments.packages}
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print_table(rows)
    for package in arguments.packages:
        if package.resolve() == (arguments.project / "tsq_layers").resolve():
            print_house(package, imports.layers_of(arguments.project))
        if arguments.worst:
            print_worst(style.measure(package), arguments.worst)


def row_of(package: Path) -> dict[str, Any]:
    """Return the figures of one package."""
    root = [path for path in package.glob("*.py") if path.stem != "__init__"]
    folders = {path.parent for path in package.rglob("*.py")} - {package}
    children = {folder.relative_to(package).parts[0] for folder in folders}
    return {
        "root modules": len(root) + 1,
        "packages": len(children),
        **style.measure(package).row(),
    }


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Print one line a figure, one column a package."""
    names = list(rows)
    print("".ljust(30), *(Path(name).name.rjust(18) for name in names))
    for figure in rows[names[0]]:
        print(figure.ljust(30), *(str(rows[name][figure]).rjust(18) for name in names))


def print_house(package: Path, layers: list[set[str]]) -> None:
    """Print layers, rooms, arrows, circles, and imports that run up."""
    graph = imports.graph_of(package)
    pairs = imports.arrows(graph)
    rooms = {imports.child_of(name) for name in graph} - {""}
    groups = imports.circles(graph)
    up = imports.upward(graph, layers)
    print(f"\nlayers {len(layers)}, rooms {len(rooms)}, arrows between rooms {len(pairs)}")
    print(f"circles of files {len(groups)}, imports that run up {len(up)}")
    for group in groups:
        print("  circle:", ", ".join(group))
    for source, target in up:
        print("  up:", source, "->", target)


def print_worst(measures: style.Measures, count: int) -> None:
    """Print the places that stand out in each figure."""
    for title, places in (("length", measures.lengths), ("McCabe", measures.branches)):
        print(f"\n{title}:")
        for place, value in sorted(places, key=lambda item: -item[1])[:count]:
            print(f"  {value:4} {place}")
    print("\nparticiples:")
    for place, name in measures.participles[:count]:
        print(f"  {name:12} {place}")
    print("\nriddles:")
    for place, text in measures.riddles[:count]:
        print(f"  {place}: {text}")
    print("\nlong lines:", *measures.long_lines[:count])


def print_walks(project: Path, *, as_json: bool) -> None:
    """Print how often each value goes up, and between which functions."""
    from benchmarks.structure.walks import walks  # noqa: PLC0415 - needs torch and the package

    upward = walks(project)
    if as_json:
        print(json.dumps({kind: sorted(pairs) for kind, pairs in upward.items()}, indent=2))
        return
    for kind, pairs in upward.items():
        print(f"{kind}: {len(pairs)}")
        for caller, callee in sorted(pairs):
            print(f"  {caller} -> {callee}")


if __name__ == "__main__":
    main()
