"""`megapix report`: a run as one HTML file with everything in it. It loads nothing, from a network or a disk."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from megapix import config as configuration
from megapix.files import write_atomic
from megapix.monitoring import charts
from megapix.report.chart import chart, short
from megapix.report.pictures import figures
from megapix.report.run_facts import RunFacts, checkpoints
from megapix.report.tables import data_of, number, speed

TITLES = {"loss": "Loss and scores", "health": "Health", "speed": "Speed", "memory": "Memory"}
MOST_EVENTS = 200
"""Events that are listed, the newest ones."""


def write_page(run: RunFacts, out: Path, now: float | None = None) -> int:
    """Write a run's page; returns its size in bytes.

    Args:
        run: read with its pictures.
        now: seconds since 1970, for the page's date.

    Raises:
        OSError: it cannot be written.
    """
    page = page_of(run, time.time() if now is None else now).encode()
    write_atomic(out, page)
    return len(page)


def page_of(run: RunFacts, now: float) -> str:
    """A run's page as HTML."""
    name = run.folder.resolve().name
    loss, *others = _charts(run) or [""]
    sections = [_facts(run), loss, _samples(run), *others, _events(run), _checkpoints(run), _data(run), _machines(run)]
    body = "\n".join(section for section in [*sections, _configuration(run)] if section)
    css, js = (resources.files("megapix.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(name)} – megapix</title><style>{css}</style></head><body>
<h1>{_text(name)}</h1>
<p class="dim">{_text(run.folder)}, read {_date(now)}</p>
{body}
<script>{js}</script>
</body></html>
"""


def _facts(run: RunFacts) -> str:
    last, model = run.events.last, run.config.model
    found = {
        "state": run.standing,
        "images seen": f"{run.images_seen:,}",
        f"of {run.end:,}": f"{100 * run.images_seen / run.end:.1f} %",
        "steps": f"{run.step:,}",
        "training loss": _value(last("loss/train")),
        "validation loss, EMA": _value(last("validation/loss_ema")),
        "images/s": number(speed(run)),
        "network": f"{model.width} wide, {model.depth} + {model.pixel_depth} blocks",
    }
    if score := run.score:
        found[f"{score[0]}, last"] = number(score[1].value)
    cells = "".join(f"<div><b>{_text(v)}</b><span>{_text(k)}</span></div>" for k, v in found.items() if v != "-")
    return f'<div class="facts">{cells}</div>'


def _charts(run: RunFacts) -> list[str]:
    sections = []
    for group, found in charts.of_tags(run.events.scalars).items():
        drawn = "".join(
            f"<figure><h3>{_text(title)}</h3>"
            + chart({tag: {step: point.value for step, point in run.events.scalars[tag].items()} for tag in tags})
            + "</figure>"
            for title, tags in found.items()
        )
        sections.append(_section(TITLES.get(group, group), f'<div class="charts">{drawn}</div>'))
    return sections


def _samples(run: RunFacts) -> str:
    return "".join(
        _section(f"Samples: {tag.rpartition('/')[2]}", figures(pictures, run.images_at))
        for tag, pictures in run.events.images.items()
    )


def _events(run: RunFacts) -> str:
    found = [(step, text) for step, texts in run.events.texts.get("events", {}).items() for text in texts]
    rows = [(f"{step:,}", text) for step, text in found[-MOST_EVENTS:]]
    title = f"Events, the last {MOST_EVENTS} of {len(found):,}" if len(found) > MOST_EVENTS else "Events"
    return _section(title, _table(("step", "what"), rows)) if rows else ""


def _checkpoints(run: RunFacts) -> str:
    rows = []
    for path, state in checkpoints(run):
        marks = [mark.lower() for mark in ("KEEP", "HEALTHY") if (path / mark).exists()]
        marks += ["latest"] if path.name == run.checkpoint else []
        loss = number(state.loss)
        health = str(state.spikes), str(state.rollbacks)
        rows.append((path.name, f"{state.counters.images_seen:,}", loss, *health, ", ".join(marks)))
    head = ("checkpoint", "images seen", "mean loss", "spikes", "rollbacks", "")
    return _section("Checkpoints", _table(head, rows)) if rows else ""


def _data(run: RunFacts) -> str:
    c = run.config
    rows = [("path", c.data.path), *data_of(run), ("image size", str(c.data.image_size))]
    rows += [("validation set", c.validation.path)] if c.validation.path else []
    return _section("Data", _table(None, rows))


def _machines(run: RunFacts) -> str:
    head = ("started", "at images seen", "ranks", "hosts", "machine", "versions")
    rows = [
        (
            _date(process.started),
            f"{process.images_seen:,}",
            str(process.ranks),
            _some(process.hosts),
            process.cards,
            ", ".join(f"{name} {version}" for name, version in process.versions.items()),
        )
        for process in run.processes
    ]
    return _section("Processes", _table(head, rows)) if rows else ""


def _configuration(run: RunFacts) -> str:
    rows = [(key, str(value)) for key, value, _ in configuration.leaves(run.config)]
    return _section("Configuration", f"<details><summary>{len(rows)} options</summary>{_table(None, rows)}</details>")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _table(head: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> str:
    first = f"<tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr>" if head else ""
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{first}{lines}</table></div>'


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _value(point: object) -> str:
    value = getattr(point, "value", None)
    return "-" if value is None else short(value)


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))


def _text(value: object) -> str:
    return html.escape(str(value))
