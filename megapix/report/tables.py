"""`megapix runs` and `megapix diff`: runs side by side, as text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megapix import config as configuration
from megapix.errors import InputError
from megapix.monitoring.events import Point
from megapix.report.run_facts import RunFacts, read_run, runs_in

HEAD = ("run", "state", "images seen", "", "loss", "validation", "score", "images/s", "last row")
NONE = "-"
RECENT = 10
"""Rows whose median is a run's speed."""


def runs_table(folder: Path, now: float | None = None) -> str:
    """All runs at or below `folder`, a line each; why one cannot be read stands below.

    Args:
        now: seconds since 1970.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder; expected one with run folders in it")
    rows, why = list[tuple[str, ...]](), list[str]()
    for path in runs_in(folder):
        name = str(path.relative_to(folder)) if path != folder else path.name or str(path)
        try:
            rows.append((name, *_row(read_run(path), time.time() if now is None else now)))
        except InputError as error:
            rows.append((name, "unreadable", *[NONE] * (len(HEAD) - 2)))
            why.append(f"{name}: {error}")
    if not rows:
        raise InputError(
            f"{str(folder)!r} holds no run folder (one with config.json, as `megapix train --out` makes it)"
        )
    return "\n".join([columns([HEAD, *rows]), *why])


def speed(run: RunFacts) -> float | None:
    """Images/s, the median of its last rows."""
    last = sorted(point.value for point in list(run.events.scalars.get("speed/images_per_s", {}).values())[-RECENT:])
    return last[len(last) // 2] if last else None


def diff_text(a: RunFacts, b: RunFacts) -> str:
    """What two runs differ in: configuration, data and versions."""
    parts = {"configuration": _options(a, b), "data": _data(a, b), "versions": _versions(a, b)}
    lines = []
    for title, rows in parts.items():
        found = [row for row in rows if row[1] != row[2]]
        entries = "options" if title == "configuration" else "entries"
        same = f"{title}: no difference in {len(rows)} {entries}"
        lines.append(columns([(title, str(a.folder), str(b.folder)), *found]) if found else same)
    return "\n\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def number(value: float | None) -> str:
    """Four significant digits."""
    return NONE if value is None else f"{value:.4g}"


def ago(seconds: float) -> str:
    """A time in the past in words."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _row(run: RunFacts, now: float) -> tuple[str, ...]:
    score, when = run.score, run.events.when
    return (
        run.standing,
        f"{run.images_seen:,}",
        f"{100 * run.images_seen / run.end:.0f} %",
        _last(run.events.last("loss/train")),
        _last(run.events.last("validation/loss_ema")),
        f"{score[0]} {number(score[1].value)}" if score else NONE,
        number(speed(run)),
        ago(now - when) if when else NONE,
    )


def _last(point: Point | None) -> str:
    return number(point.value if point else None)


def _options(a: RunFacts, b: RunFacts) -> list[tuple[str, str, str]]:
    theirs = {key: value for key, value, _ in configuration.leaves(b.config)}
    return [(key, _shown(v), _shown(theirs[key])) for key, v, _ in configuration.leaves(a.config) if key != "out"]


def _data(a: RunFacts, b: RunFacts) -> list[tuple[str, str, str]]:
    ours, theirs = dict(data_of(a)), dict(data_of(b))
    return [(key, ours[key], theirs[key]) for key in ours]


def data_of(run: RunFacts) -> Iterator[tuple[str, str]]:
    """What a run's data set is: its identity, samples and classes."""
    last = run.processes[-1] if run.processes else None
    digest = last.data_digest if last else run.saved.data_digest if run.saved else ""
    yield "digest", digest[:16] or NONE
    yield "samples", f"{last.samples:,}" if last else NONE
    names = run.saved.classes if run.saved else ()
    yield "classes", f"{len(names)}: {', '.join(names[:12])}{', …' * (len(names) > 12)}" if names else NONE


def _versions(a: RunFacts, b: RunFacts) -> list[tuple[str, str, str]]:
    ours, theirs = (run.processes[-1].versions if run.processes else {} for run in (a, b))
    names = list(dict.fromkeys([*ours, *theirs]))
    here, there = (run.processes[-1].cards if run.processes else "not recorded" for run in (a, b))
    return [*((name, ours.get(name, NONE), theirs.get(name, NONE)) for name in names), ("machine", here, there)]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)
