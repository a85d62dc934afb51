"""Pairwise covers: few cases in which any two values of any two options occur together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows, each with a value for every option, such that any two values of any two options share a row.

    Greedy: each row starts from the first pair that is still missing, and takes for every other option the value that
    adds most missing pairs, the earlier one where they are equal. So slow values should come last.
    """
    names = list(options)
    missing = dict.fromkeys(
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]
    )
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in names:
            if name not in row:
                gains = [sum(pair in missing for pair in _pairs(row, name, value, names)) for value in options[name]]
                row[name] = options[name][gains.index(max(gains))]
        for a, b in itertools.combinations(names, 2):
            missing.pop(((a, row[a]), (b, row[b])), None)
        rows.append({name: row[name] for name in names})
    return rows


def _pairs(row: Mapping[str, Any], name: str, value: Any, names: Sequence[str]) -> list[Any]:
    """Pairs that `name` = `value` would make with what the row holds already, in the order of the options."""
    return [
        ((other, row[other]), (name, value))
        if names.index(other) < names.index(name)
        else ((name, value), (other, row[other]))
        for other in row
    ]
