"""The verdict of a check, and the table of all checks on all nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
ORDER: tuple[Status, ...] = ("ok", "warn", "fail")
NAMED = 3
"""Nodes that a row of the table names; the rest is counted."""


@dataclass(frozen=True)
class Verdict:
    """One check on one rank."""

    check: str
    status: Status
    """'ok', 'warn' (the run will work, but look at it), or 'fail' (it would not)."""
    detail: str
    """One line: what was found and, where something is wrong, what would be right."""


def tried(check: str, work: Callable[[], Verdict]) -> Verdict:
    """The verdict of `work`, or 'fail' with the error that it raised, which a run would meet, too."""
    try:
        return work()
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Verdict(check, "fail", first)


@dataclass(frozen=True)
class Findings:
    """All verdicts of one rank."""

    rank: int
    host: str
    verdicts: list[Verdict]


def worst(everyone: list[Findings]) -> Status:
    """The worst status there is."""
    return max((v.status for found in everyone for v in found.verdicts), key=ORDER.index)


def table(everyone: list[Findings]) -> str:
    """One line for each check and outcome: verdict, nodes, check, detail. Nodes with the same outcome share a line."""
    rows = [("verdict", "node", "check", "detail")]
    hosts = list(dict.fromkeys(found.host for found in everyone))
    for check in dict.fromkeys(v.check for found in everyone for v in found.verdicts):
        outcomes: dict[tuple[Status, str], list[str]] = {}
        for host in hosts:
            verdict = _of_node(check, [found for found in everyone if found.host == host])
            if verdict is None:
                continue
            # What is ok is listed once, with the detail of its first node.
            same = next((known for known in outcomes if known[0] == verdict.status == "ok"), None)
            outcomes.setdefault(same or (verdict.status, verdict.detail), []).append(host)
        for (status, detail), nodes in outcomes.items():
            named = ", ".join(nodes[:NAMED]) + (f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else "")
            where = f"all {len(hosts)}" if len(nodes) == len(hosts) > 1 else named
            rows.append((status if status != "fail" else "FAIL", where, check, detail))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _of_node(check: str, ranks: list[Findings]) -> Verdict | None:
    """The worst verdict of a node's ranks, if one made the check; the rank is named where the others don't agree."""
    found = [(r.rank, v) for r in ranks for v in r.verdicts if v.check == check]
    if not found:
        return None
    rank, verdict = max(found, key=lambda pair: ORDER.index(pair[1].status))
    if verdict.status == "ok" or all(v == verdict for _, v in found):
        return verdict
    return Verdict(check, verdict.status, f"rank {rank}: {verdict.detail}")
