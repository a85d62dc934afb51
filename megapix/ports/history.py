"""What a run tells of itself in a model card: its data, its counters, its curves and its last sample grid."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from megapix.checkpoint.find import Saved
from megapix.monitoring.events import Point, read_events

CURVES = ("loss/train", "validation/loss_ema")
COLOURS = ((30, 100, 200), (220, 110, 20))
WIDTH, HEIGHT, EDGE = 720, 320, 44
"""Of the picture of curves, in pixels."""
GRID = "samples/ema"


@dataclass(frozen=True)
class History:
    """Parts of a model card; empty where a run is not at hand."""

    sections: dict[str, str] = field(default_factory=dict)
    """Title -> Markdown."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """File name -> PNG."""


def history_of(saved: Saved) -> History:
    """That of the run whose checkpoint this is, as far as its folder holds it."""
    c, state = saved.state.config, saved.state
    counters = state.counters
    size = f"{c.data.image_size} pixels"
    sections = {
        "Data": f"Data set `{state.data_digest[:16]}…` (SHA-256 of its index), {len(state.classes)} classes, {size}."
        if state.classes
        else f"Data set `{state.data_digest[:16]}…` (SHA-256 of its index), with captions, {size}.",
        "Training": f"{counters.images_seen:,} images seen in {counters.position // c.optim.global_batch:,} steps of "
        f"{c.optim.global_batch}, learning rate {c.optim.lr:g}, EMA decay {c.optim.ema_decay:g}, {c.precision}, seed "
        f"{c.seed}; {state.rollbacks} rollbacks.",
    }
    pictures: dict[str, bytes] = {}
    events = read_events(saved.folder.parent.parent / "tensorboard")
    if curves := {tag: _rows(points) for tag in CURVES if (points := events.scalars.get(tag))}:
        pictures["curves.png"] = drawn(curves)
        sections["Curves"] = "![loss](curves.png)\n\n" + ", ".join(
            f"`{tag}`: {rows[-1][1]:.4g} at the end" for tag, rows in curves.items()
        )
    if grids := events.images.get(GRID):
        pictures["samples.png"] = grids[max(grids)]
        sections["Samples"] = "Of the EMA, from the run's last grid.\n\n![samples](samples.png)"
    return History(sections, pictures)


def _rows(points: Mapping[int, Point]) -> list[tuple[float, float]]:
    return [(step, point.value) for step, point in points.items()]


def drawn(curves: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """A PNG of curves over steps, one colour each, with the ends of both axes."""
    points = [point for rows in curves.values() for point in rows]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((EDGE, EDGE, WIDTH - EDGE, HEIGHT - EDGE), outline=(180, 180, 180))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / ((right - left) or 1), (y - low) / ((high - low) or 1)
        return EDGE + across * (WIDTH - 2 * EDGE), HEIGHT - EDGE - up * (HEIGHT - 2 * EDGE)

    for number, (tag, rows) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        draw.line([place(*row) for row in rows], fill=colour, width=2)
        draw.text((EDGE + 200 * number, EDGE // 3), tag, fill=colour)
    for x, y, text in ((4, EDGE, f"{high:.3g}"), (4, HEIGHT - EDGE - 10, f"{low:.3g}")):
        draw.text((x, y), text, fill="black")
    draw.text((EDGE, HEIGHT - EDGE + 6), f"step {left:g}", fill="black")
    draw.text((WIDTH - EDGE - 80, HEIGHT - EDGE + 6), f"step {right:g}", fill="black")
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
