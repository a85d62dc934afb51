"""One Python file of a module and all that it needs of this program: what an exported folder samples with.

Definitions (functions, classes, constants) are followed by name from the entry on, and written out as they stand, with
their comments; only `module.name` becomes `name`. So there is one text of the network, the samplers and the noise.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = "megapix"
Definition = tuple[str, str]
"""Module, and name in it."""
Edits = dict[tuple[int, int], tuple[int, str]]
"""Line and column (in bytes) of an expression -> where it ends, and what stands there instead."""


@dataclass
class _Module:
    """A module's text, definitions and imports."""

    name: str
    lines: list[str]
    made: dict[str, list[ast.stmt]] = field(default_factory=dict)
    """Name -> the statements that define it, a docstring behind a constant among them."""
    order: list[str] = field(default_factory=list)
    ours: dict[str, Definition] = field(default_factory=dict)
    """Name here -> what it is elsewhere in this program; a module has the name ''."""
    theirs: dict[str, str] = field(default_factory=dict)
    """Name here -> the import statement of another library's."""


def bundle(entry: str, about: str) -> str:
    """The text of one module that does what the module `entry` does, without this program.

    Args:
        about: its docstring.

    Raises:
        ValueError: two definitions have one name, or a name of a module is hidden by a local one.
    """
    needed, imports, edits = _closure([(entry, name) for name in _read(entry).order])
    owners: dict[str, list[str]] = {}
    for module, name in sorted(needed):
        owners.setdefault(name, []).append(module)
    if twice := {name: modules for name, modules in owners.items() if modules[1:]}:
        raise ValueError(f"names that several modules define: {twice}")
    parts = [f'"""{about}"""', "from __future__ import annotations", "\n".join(sorted(imports))]
    for module in _in_order(entry):
        read = _read(module)
        written = set[int]()
        for name in read.order:
            for statement in read.made[name]:
                if (module, name) in needed and id(statement) not in written:
                    written.add(id(statement))
                    text = _text(read, statement, edits.get(module, {}))
                    if isinstance(statement, ast.Expr):
                        parts[-1] += f"\n{text}"
                    else:
                        parts.append(text)
    return "\n\n\n".join(parts) + "\n"


def _closure(first: list[Definition]) -> tuple[set[Definition], set[str], dict[str, Edits]]:
    """Definitions that are needed, other libraries' imports, and what each module writes otherwise."""
    needed, imports, edits, todo = set[Definition](), set[str](), dict[str, Edits](), list(first)
    while todo:
        definition = todo.pop()
        if definition in needed:
            continue
        needed.add(definition)
        read = _read(definition[0])
        for node, name, hidden in (load for some in read.made[definition[1]] for load in _loads(some, frozenset())):
            if name in hidden or (name not in read.made and hasattr(builtins, name)):
                continue
            if name in read.theirs:
                imports.add(read.theirs[name])
                continue
            module, real = (read.name, name) if name in read.made else read.ours.get(name, ("", name))
            if not module:
                raise ValueError(f"{read.name}: {definition[1]} uses {name}, which nothing defines")
            if not real:  # a module: what is needed is its attribute
                if not isinstance(node, ast.Attribute):
                    continue
                real = node.attr
            elif isinstance(node, ast.Attribute):
                continue  # seen as the name that it begins with
            found = _resolved(module, real)
            if found[1] != ast.unparse(node):
                if found[1] in hidden:
                    raise ValueError(f"{read.name}: {definition[1]} hides {found[1]} of {found[0]}")
                assert node.end_col_offset is not None
                edits.setdefault(read.name, {})[node.lineno, node.col_offset] = (node.end_col_offset, found[1])
            todo.append(found)
    return needed, imports, edits


def _loads(node: ast.AST, hidden: frozenset[str]) -> Iterator[tuple[ast.expr, str, frozenset[str]]]:
    """Names that are read, and the first attribute of one: the expression, the name, and what functions hide there."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        yield node, node.value.id, hidden
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node, node.id, hidden
    inside = hidden
    if isinstance(node, ast.FunctionDef | ast.Lambda):
        inside = hidden | _locals(node)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        inside = hidden | {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
    outside = [*node.decorator_list, *node.args.defaults] if isinstance(node, ast.FunctionDef) else []
    for child in ast.iter_child_nodes(node):
        if child in outside:
            yield from _loads(child, hidden)
        else:
            yield from _loads(child, inside)


def _locals(function: ast.FunctionDef | ast.Lambda) -> frozenset[str]:
    """Arguments, and names that are set in a function or imported into it."""
    a = function.args
    every = (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg)
    names = {argument.arg for argument in every if argument}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ExceptHandler) and node is not function and node.name:
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return frozenset(names)


def _resolved(module: str, name: str) -> Definition:
    """Where a name of a module is really defined."""
    read = _read(module)
    if name in read.made:
        return module, name
    if name in read.ours:
        return _resolved(*read.ours[name])
    raise ValueError(f"{module} has no {name}")


@cache
def _read(module: str) -> _Module:
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    text = Path(found.origin).read_text()
    read, before = _Module(module, text.splitlines()), list[str]()
    for statement in _statements(ast.parse(text)):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            _note_import(read, statement)
            continue
        if isinstance(statement, ast.Expr):  # the docstring of what stands before it
            for name in before:
                read.made[name].append(statement)
            continue
        before = _names(statement)
        for name in before:
            read.made.setdefault(name, []).append(statement)
            read.order.append(name)
    return read


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    for statement in tree.body:
        if isinstance(statement, ast.If):  # TYPE_CHECKING
            yield from statement.body
        else:
            yield statement


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)]


def _note_import(read: _Module, statement: ast.Import | ast.ImportFrom) -> None:
    for alias in statement.names:
        name = alias.asname or alias.name
        renamed = f" as {alias.asname}" if alias.asname and alias.asname != alias.name else ""
        if isinstance(statement, ast.Import):
            read.theirs[name.split(".")[0]] = f"import {alias.name}{renamed}"
        elif (source := statement.module or "").split(".")[0] != PACKAGE:
            if source != "__future__":
                read.theirs[name] = f"from {source} import {alias.name}{renamed}"
        elif importlib.util.find_spec(source) and _is_module(f"{source}.{alias.name}"):
            read.ours[name] = (f"{source}.{alias.name}", "")
        else:
            read.ours[name] = (source, alias.name)


def _is_module(name: str) -> bool:
    parent = importlib.util.find_spec(name.rpartition(".")[0])
    return bool(parent and parent.submodule_search_locations and importlib.util.find_spec(name))


def _in_order(entry: str) -> list[str]:
    """Modules, each behind those that it imports."""
    done: list[str] = []

    def visit(module: str) -> None:
        if module in done:
            return
        for source, _ in _read(module).ours.values():
            if source != module:
                visit(source)
        done.append(module)

    visit(entry)
    return done


def _text(read: _Module, statement: ast.stmt, edits: Edits) -> str:
    decorators = getattr(statement, "decorator_list", [])
    start = min([statement.lineno, *(decorator.lineno for decorator in decorators)])
    assert statement.end_lineno is not None
    lines = read.lines[start - 1 : statement.end_lineno]
    for (row, column), (end, text) in sorted(edits.items(), reverse=True):
        if start <= row <= statement.end_lineno:
            line = lines[row - start].encode()  # columns are bytes
            lines[row - start] = (line[:column] + text.encode() + line[end:]).decode()
    return "\n".join(lines)
