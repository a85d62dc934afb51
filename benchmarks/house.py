"""How the code is laid out, counted from its import statements.

    python -m benchmarks.house [--of COMMIT]...

A room is what stands side by side in `megapix/`, a module or a package; `data_prep` is one more. An arrow goes from a
room to another one that any of its modules imports, inside functions too. Floors are the rooms of the longest chain of
arrows. Printed is a row of a Markdown table for each COMMIT (or folder), or for the working tree.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

from benchmarks.compare import tree
from megapix.errors import InputError

PACKAGES = ("megapix", "data_prep")
HEADER = """| tree | files | rooms | arrows | floors | largest package | largest file |
|---|---|---|---|---|---|---|"""


def modules(root: Path) -> dict[str, Path]:
    """Every module of megapix and data_prep by its dotted name."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def imports(root: Path) -> dict[str, set[str]]:
    """What every module imports, ours and others', anywhere in its file. `from package import module` is the module."""
    known = modules(root)
    found: dict[str, set[str]] = {module: set() for module in known}
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = node.module or ""
                inner = {f"{package}.{alias.name}" for alias in node.names}
                found[module] |= {name if name in known else package for name in inner}
    return found


def room(module: str) -> str | None:
    """megapix.model.layers -> model, data_prep.writing.write -> data_prep; None for others, and for megapix itself."""
    first, _, rest = module.partition(".")
    if first == "megapix":
        return rest.partition(".")[0] or None
    return first if first in PACKAGES else None


def arrows(imported: dict[str, set[str]]) -> dict[str, set[str]]:
    """The other rooms that each room imports."""
    found: dict[str, set[str]] = {}
    for module, targets in imported.items():
        if (start := room(module)) is not None:
            ends = {end for target in targets if (end := room(target)) is not None}
            found.setdefault(start, set()).update(ends - {start})
    return found


def floors(rooms: dict[str, set[str]]) -> int:
    """Rooms of the longest chain of arrows.

    Raises:
        graphlib.CycleError: there is a circle, which its second argument names.
    """
    height: dict[str, int] = {}
    for name in TopologicalSorter(rooms).static_order():
        height[name] = 1 + max((height[below] for below in rooms.get(name, ())), default=0)
    return max(height.values())


def sizes(root: Path) -> Counter[str]:
    """Modules of every package, without its `__init__`; `data_prep.sources` counts for itself."""
    return Counter(
        path.parent.relative_to(root).as_posix() for path in modules(root).values() if path.name != "__init__.py"
    )


def lines(root: Path) -> Counter[str]:
    """Lines of every file, as `wc -l` counts them."""
    return Counter({path.relative_to(root).as_posix(): path.read_text().count("\n") for path in modules(root).values()})


def row(name: str, root: Path) -> str:
    """A row of the table."""
    rooms = arrows(imports(root))
    (package, most), (file, longest) = sizes(root).most_common(1)[0], lines(root).most_common(1)[0]
    counts = len(modules(root)), len(rooms), sum(map(len, rooms.values())), floors(rooms)
    return f"| {name} | {' | '.join(map(str, counts))} | `{package}`, {most} modules | `{file}`, {longest} lines |"


def main(arguments: list[str], repository: Path) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", metavar="COMMIT", action="append", default=[], help="commit or folder; may be repeated")
    asked = parser.parse_args(arguments).of
    print(HEADER)
    for what in asked:
        with tree(what, repository) as root:
            print(row(what, root))
    if not asked:
        print(row("working tree", repository))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], Path.cwd()))
    except InputError as error:
        print(f"benchmarks.house: error: {error}", file=sys.stderr)
        sys.exit(2)
