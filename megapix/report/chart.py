"""A line chart as inline SVG: small, sharp at any width, and read without a library or a network."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 8, 22
"""Pixels around the plot."""
MOST_POINTS = 400
"""Points of a line that are drawn, so that pages of long runs stay small; of more of them minima and maxima."""
LOGARITHMIC = 30.0
"""Ratio of the largest to the smallest value from which on a chart is logarithmic."""
FEW = 8
"""Lines that have a colour of their own; more of them are shaded in their order."""

Line = Mapping[int, float]
"""Step -> value."""


def chart(lines: Mapping[str, Line]) -> str:
    """One chart of several lines, with its legend, as HTML.

    Args:
        lines: by tag; each has a value.
    """
    thinned = {tag: thin(line, MOST_POINTS if len(lines) <= FEW else MOST_POINTS // 2) for tag, line in lines.items()}
    steps = [step for line in thinned.values() for step in line]
    values = [value for line in thinned.values() for value in line.values() if math.isfinite(value)]
    low, high, logarithmic = _range(values)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(value: float) -> float:
        share = _share(value, low, high, logarithmic)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(share, 0.0), 1.0)

    parts = []
    for tick in _ticks(low, high, logarithmic):
        parts.append(f'<path class="g" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in nice(first, last, 4):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{short(tick)}</text>')
    for number, (tag, line) in enumerate(thinned.items()):
        points = [(f"{x(step):.1f}", f"{y(value):.1f}") for step, value in line.items() if math.isfinite(value)]
        colour = _colour(number, len(lines))
        if len(points) == 1:
            parts.append('<circle style="fill:{}" cx="{}" cy="{}" r="2.5"/>'.format(colour, *points[0]))
        elif points:
            drawn, name = " ".join(map(",".join, points)), html.escape(tag)
            parts.append(f'<polyline style="stroke:{colour}" points="{drawn}" data-tag="{name}"/>')
    about = f'data-x="{first} {last}" data-y="{low:.6g} {high:.6g} {int(logarithmic)}"'
    box = f'data-box="{LEFT} {TOP} {WIDTH - RIGHT} {HEIGHT - BOTTOM}"'
    names = html.escape(", ".join(lines))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{names}" {about} {box}>{"".join(parts)}'
        f'<path class="at" d=""/></svg><p class="read"></p>{_legend(lines)}'
    )


def thin(line: Line, most: int) -> dict[int, float]:
    """At most about `most` points of a line: of each run of steps the smallest and the largest value."""
    steps = sorted(line)
    if len(steps) <= most:
        return {step: line[step] for step in steps}
    size, kept = 2 * len(steps) / most, set()
    for number in range(math.ceil(len(steps) / size)):
        some = steps[int(number * size) : int((number + 1) * size)]
        kept |= {min(some, key=line.__getitem__), max(some, key=line.__getitem__)} if some else set()
    kept |= {steps[0], steps[-1]}
    return {step: line[step] for step in sorted(kept)}


def nice(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about that many."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.99)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number as an axis has it: 25k, 1.2M, 0.35."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _range(values: Sequence[float]) -> tuple[float, float, bool]:
    """Lowest and highest value that is drawn, and whether the axis is logarithmic. What lies far beyond nearly all
    others, as the first losses do, ends at the edge."""
    ordered = sorted(values) or [0.0]
    low, high = ordered[int(0.002 * len(ordered))], ordered[min(int(0.998 * len(ordered)), len(ordered) - 1)]
    if low > 0 and high / low >= LOGARITHMIC:
        return low, high, True
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if low >= 0 > low - room else low - room), high + room, False


def _share(value: float, low: float, high: float, logarithmic: bool) -> float:
    if logarithmic:
        return math.log(max(value, low) / low) / math.log(high / low)
    return (value - low) / (high - low)


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    if not logarithmic:
        return nice(low, high, 4)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 3)
    return [t for power in powers for factor in factors if low <= (t := factor * 10.0**power) <= high]


def _colour(number: int, count: int) -> str:
    return f"var(--c{number})" if count <= FEW else f"hsl({int(260 * number / (count - 1))} 65% 52%)"


def _legend(lines: Mapping[str, Line]) -> str:
    names = _short_names(list(lines))
    items = "".join(
        f'<li><i style="background:{_colour(number, len(lines))}"></i>{html.escape(name)} '
        f"<b>{short(line[max(line)])}</b></li>"
        for number, (name, line) in enumerate(zip(names, lines.values(), strict=True))
    )
    listed = f"<ul>{items}</ul>"
    return f"<details><summary>{len(lines)} lines</summary>{listed}</details>" if len(lines) > FEW else listed


def _short_names(tags: list[str]) -> list[str]:
    """Tags without the sections that all of them have."""
    parts = [tag.split("/") for tag in tags]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]
