"""The expressions of --where: comparisons of metadata with numbers and texts, joined by and, or, not.

Python's parser reads them, and nothing that it finds is run: every node is of a kind that is listed here, so there are
no calls, attributes or arithmetic, and an expression takes as long as it has nodes. Logic is SQL's: a comparison with
something missing is neither true nor false, and a sample stays only where the whole expression is true.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from megapix.errors import InputError

Scalar: TypeAlias = str | int | float
LONGEST = 1000
"""Characters of an expression."""
ABSENT = "missing"
"""The word of `COLUMN is missing`."""
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}
QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`([^`]*)`""")
"""A text, or the name of a column that is no word of Python's."""


@dataclass(frozen=True)
class Expression:
    """An expression that has been checked; small, and pickled into worker processes."""

    text: str
    columns: tuple[str, ...]
    """The columns that it names."""
    tree: ast.expr = field(repr=False, compare=False)
    names: dict[str, str] = field(repr=False, compare=False)
    """What stands in the tree for a column in backquotes -> the column."""

    @property
    def option(self) -> str:
        """As it is counted."""
        return f"--where {self.text}"

    def keeps(self, metadata: Mapping[str, Any]) -> bool:
        """Whether it is true of a sample's metadata; a key that is not there is missing, and so is null."""
        return _truth(self.tree, {name: metadata.get(column) for name, column in self.names.items()}) is True


def parse(text: str) -> Expression:
    """Read an expression such as "aesthetic > 5 and `safe-for-work` == 'yes'".

    Raises:
        InputError: anything but comparisons, `in`, `is missing`, and, or, not; says what is not understood.
    """
    text = text.strip()
    if len(text) > LONGEST:
        raise _refused(text[:40] + "…", f"it has {len(text)} characters, at most {LONGEST} are read")
    quoted: dict[str, str] = {}
    try:
        tree = ast.parse(QUOTED.sub(lambda found: _placed(found, quoted), text), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _refused(text, "it is not understood") from error
    columns: dict[str, str] = {}
    try:
        for name in _columns_of_condition(tree):
            columns[name] = quoted.get(name, name)
    except ValueError as error:
        raise _refused(text, str(error)) from error
    if not columns:
        raise _refused(text, "it names no column")
    return Expression(text, tuple(dict.fromkeys(columns.values())), tree, columns)


def _placed(found: re.Match[str], quoted: dict[str, str]) -> str:
    if found[1] is None:
        return found[0]
    name = f"quoted_column_{len(quoted)}"
    quoted[name] = found[1]
    return name


def _refused(text: str, why: str) -> InputError:
    return InputError(
        f"--where {text!r}: {why}; expected comparisons of columns with numbers or texts, in, is missing, joined by "
        "and, or, not, such as \"aesthetic > 5 and lang in ('en', 'de')\""
    )


# ---------------------------------------------------------------------------------------------------------------------
# What may stand in an expression
# ---------------------------------------------------------------------------------------------------------------------


def _columns_of_condition(node: ast.expr) -> Iterator[str]:
    """Names of the columns in a condition; ValueError for what is none."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _columns_of_condition(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _columns_of_condition(node.operand)
    elif isinstance(node, ast.Compare):
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            yield from _columns_of_comparison(left, op, right)
            left = right
    else:
        raise ValueError(f"{_shown(node)} is no comparison")


def _columns_of_comparison(left: ast.expr, op: ast.cmpop, right: ast.expr) -> Iterator[str]:
    yield from _columns_of_value(left)
    if isinstance(op, (ast.Is, ast.IsNot)):
        if not isinstance(right, ast.Name) or right.id != ABSENT or not isinstance(left, ast.Name):
            raise ValueError("'is' stands in COLUMN is missing, and COLUMN is not missing, alone")
    elif isinstance(op, (ast.In, ast.NotIn)) and isinstance(right, (ast.Tuple, ast.List, ast.Set)):
        for one in right.elts:
            if not _is_constant(one):
                raise ValueError(f"{_shown(one)} in a list is no number or text")
    elif isinstance(op, (ast.In, ast.NotIn)) and not isinstance(right, ast.Name):
        raise ValueError(f"{_shown(right)} behind 'in' is no list, such as ('en', 'de'), and no column")
    else:
        yield from _columns_of_value(right)


def _columns_of_value(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    elif not _is_constant(node):
        hint = "; a column that is no plain word stands in `backquotes`" if isinstance(node, ast.BinOp) else ""
        raise ValueError(f"{_shown(node)} is no column, number or text{hint}")


def _is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return isinstance(node.operand, ast.Constant) and type(node.operand.value) in (int, float)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float, str, bool)


def _shown(node: ast.expr) -> str:
    text = ast.unparse(node)
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


# ---------------------------------------------------------------------------------------------------------------------
# What it says of a sample: True, False, or None where that is not known
# ---------------------------------------------------------------------------------------------------------------------


def _truth(node: ast.expr, values: Mapping[str, Any]) -> bool | None:
    if isinstance(node, ast.BoolOp):
        decides = isinstance(node.op, ast.Or)
        return _joined((_truth(value, values) for value in node.values), decides)
    if isinstance(node, ast.UnaryOp):
        found = _truth(node.operand, values)
        return None if found is None else not found
    assert isinstance(node, ast.Compare)
    pairs = zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True)
    return _joined((_compared(left, op, right, values) for left, op, right in pairs), False)


def _joined(found: Iterator[bool | None], decides: bool) -> bool | None:
    """`decides` if one of them is that; else None if one is not known; else the contrary."""
    several = list(found)
    if decides in several:
        return decides
    return None if None in several else not decides


def _compared(left: ast.expr, op: ast.cmpop, right: ast.expr, values: Mapping[str, Any]) -> bool | None:
    a = _value(left, values)
    if isinstance(op, (ast.Is, ast.IsNot)):
        return (a is None) == isinstance(op, ast.Is)
    if isinstance(op, (ast.In, ast.NotIn)):
        found = _within(a, right, values)
        return None if found is None else found == isinstance(op, ast.In)
    return _ordered(type(op), a, _value(right, values))


def _value(node: ast.expr, values: Mapping[str, Any]) -> Scalar | None:
    if isinstance(node, ast.Name):
        found = values.get(node.id)
        return found if isinstance(found, (str, int, float)) and found == found else None
    return ast.literal_eval(node)  # a constant, perhaps with its sign


def _within(a: Scalar | None, right: ast.expr, values: Mapping[str, Any]) -> bool | None:
    if isinstance(right, (ast.Tuple, ast.List, ast.Set)):
        return None if a is None else any(_ordered(ast.Eq, a, _value(one, values)) for one in right.elts)
    text = _value(right, values)
    return a in text if isinstance(a, str) and isinstance(text, str) else None


def _ordered(op: type[ast.cmpop], a: Scalar | None, b: Scalar | None) -> bool | None:
    """Texts compare with texts and numbers with numbers; a text that spells a number, as CSV has them, is one."""
    if a is None or b is None:
        return None
    if isinstance(a, str) != isinstance(b, str):
        try:
            a, b = (float(value) if isinstance(value, str) else value for value in (a, b))
        except ValueError:
            return {ast.Eq: False, ast.NotEq: True}.get(op)
    return COMPARISONS[op](a, b)
