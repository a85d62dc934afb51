"""Run folders read back: the table of runs, the difference of two, and the page, also in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megapix import config
from megapix.cli import main as cli
from megapix.config import Config
from megapix.dist import World
from megapix.monitoring.processes import Process, note
from megapix.monitoring.tensorboard import Writer
from megapix.report.chart import nice, thin
from megapix.report.page import page_of
from megapix.report.pictures import spread
from megapix.report.run_facts import read_run
from megapix.report.tables import runs_table
from megapix.resilience.run_lock import run_lock
from tests.support.made_run import add_checkpoint
from tests.support.programs import needs
from tests.support.small_run import SMALL, STEP_BATCH, refused

END = 20
"""Steps of SMALL."""
NOW = 1_800_000_000.0


def made(folder: Path, saved: int, steps: int, c: Config = SMALL) -> Path:
    """A run that has saved its step `saved` (0: none) and logged every step up to `steps`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(config.replace(c, "out", str(folder)))))
    (folder / "lock").write_text("process 1 on a\n")
    if saved:
        add_checkpoint(folder, saved * STEP_BATCH)
    board = Writer(folder / "tensorboard", 0, enabled=True)
    for step in range(1, steps + 1):
        row = {"loss/train": 1 / step, "schedule/images_seen": step * STEP_BATCH, "speed/images_per_s": 100.0 + step}
        board.scalars(step, row | ({"validation/loss_ema": 0.25} if step == 3 else {}))
    board.close()
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    made(tmp_path / "sweep" / "finished", END, END)
    made(tmp_path / "sweep" / "interrupted", 5, 7)
    made(tmp_path / "sweep" / "stopped", 7, 7)
    made(tmp_path / "started", 0, 0)
    broken = made(tmp_path / "broken", 0, 3)
    (broken / "config.json").write_text('{"seed": "one"}')
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "config.json").write_text("{}")  # nothing of a run beside it
    return tmp_path


def test_a_table_of_runs(runs: Path) -> None:
    with run_lock(made(runs / "running", 2, 9), World()):
        lines = runs_table(runs).splitlines()
    found = {line.split()[0]: re.split(r"  +", line.strip()) for line in lines[1:7]}
    assert list(found) == ["broken", "running", "started", "sweep/finished", "sweep/interrupted", "sweep/stopped"]
    assert {name: row[1] for name, row in found.items()} == {
        "broken": "unreadable",
        "running": "running",
        "started": "not begun",
        "sweep/finished": "finished",
        "sweep/interrupted": "interrupted",
        "sweep/stopped": "stopped",
    }
    assert found["running"][2:8] == ["72", "45 %", "0.1111", "0.25", "-", "105"], "the median of the nine rows"
    assert found["sweep/finished"][2:8] == ["160", "100 %", "0.05", "0.25", "-", "116"], "of the last ten"
    assert re.fullmatch(r"\d+ s ago", found["running"][8])
    assert lines[7].startswith("broken: ")
    assert "seed = 'one': input should be a valid integer" in lines[7]


def test_a_score_and_a_longer_end(runs: Path) -> None:
    """A finished run that is to go on is not finished; the score's name says what it is."""
    run = runs / "sweep" / "finished"
    c = json.loads((run / "config.json").read_text())
    c["optim"]["end_at"] = 320
    (run / "config.json").write_text(json.dumps(c))
    for path in list((run / "tensorboard").iterdir()):
        path.rename(path.with_name(path.name + ".0"))
    board = Writer(run / "tensorboard", END, enabled=True)
    board.scalars(END, {"evaluation/fd_effnet_lite0": 12.3456})
    board.close()
    row = next(line for line in runs_table(run.parent).splitlines() if line.startswith("finished"))
    assert re.split(r"  +", row)[1:4] == ["stopped", "160", "50 %"]
    assert "fd_effnet_lite0 12.35" in row


def test_a_difference(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = config.replace(config.replace(SMALL, "optim.lr", 1e-4), "data.flip", False)
    a, b = runs / "sweep" / "finished", made(tmp_path / "other", 3, 3, other)
    start = Process(NOW, 0, 2, ("a",), "CPUs", {"python": "3.11.2", "torch": "2.13.0"}, 40, "f" * 64)
    note(a, start)
    note(b, start)
    note(b, replace(start, versions={"python": "3.11.2", "torch": "2.12.1"}, samples=41))
    with open(b / "processes.jsonl", "a") as file:
        file.write('{"cut')
    assert cli.main(["diff", str(a), str(b)]) == 0
    parts = capsys.readouterr().out.split("\n\n")
    rows = [[re.split(r"  +", line) for line in part.splitlines()] for part in parts]
    assert rows[0][1:] == [["data.flip", "True", "False"], ["optim.lr", "0.002", "0.0001"]]
    assert rows[1][1:] == [["samples", "40", "41"]]
    assert rows[2][1:] == [["torch", "2.13.0", "2.12.1"]]
    assert cli.main(["diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out.count("no difference in ") == 3


def test_bad_input(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    finished = runs / "sweep" / "finished"
    (empty / "config.json").write_text("{")
    (empty / "lock").touch()
    for command, words in {
        ("runs", str(tmp_path / "nowhere")): "nowhere' is not a folder",
        ("runs", str(tmp_path / "shards")): "shards' holds no run folder",
        ("diff", str(finished), str(tmp_path / "shards")): "shards' is no run folder: expected one with config.json",
        ("report", str(empty)): "config.json: cannot be read: ",
        ("report", str(finished), "--out", str(empty)): "--out",
        ("report", str(runs / "broken")): "seed = 'one'",
    }.items():
        assert words in refused(list(command), capsys)


class Page(HTMLParser):
    """What a page loads, its pictures, its words and its lines."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads, self.pictures, self.words = list[str](), list[bytes](), list[str]()
        self.lines = dict[str, tuple[dict[str, str], str]]()
        self._chart = dict[str, str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "svg":
            self._chart = found
        if tag == "polyline":
            self.lines[found["data-tag"]] = self._chart, found["points"]
        if source := found.get("src") or found.get("href"):
            head, _, data = source.partition("base64,")
            if head == "data:image/png;" or head == "data:image/webp;":
                self.pictures.append(base64.b64decode(data))
            else:
                self.loads.append(source)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def line(self, tag: str) -> Iterator[tuple[float, float]]:
        """Step and value of a line's points, from its pixels and what the chart says of them."""
        chart, points = self.lines[tag]
        left, top, right, bottom = map(float, chart["data-box"].split())
        first, last = map(float, chart["data-x"].split())
        low, high, logarithmic = map(float, chart["data-y"].split())
        for point in points.split():
            x, y = map(float, point.split(","))
            share = (bottom - y) / (bottom - top)
            value = low * (high / low) ** share if logarithmic else low + share * (high - low)
            yield first + (x - left) / (right - left) * (last - first), value


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A run with curves, spikes, grids, an event and a name that a page has to escape."""
    run, rng = made(tmp_path / "a <b> & 'c'", END, 0), np.random.default_rng(0)
    board = Writer(run / "tensorboard", 0, enabled=True)
    for step in range(1, 1002):
        board.scalars(
            step, {"loss/train": 5.0 if step == 617 else 0.2 + 1 / step, "health/grad_norm": 10.0 ** (step % 3)}
        )
    for step, side in ((3, 40), (1001, 700)):
        board.image(step, "samples/ema", rng.integers(0, 256, (side, side + 2, 3)).astype(np.uint8))
    board.event(617, "spike: <loss> 5.0")
    board.close()
    note(run, Process(NOW, 0, 3, ("node-a", "node-b"), "2 x H100", {"torch": "2.13.0"}, 40, "f" * 64))
    return run


def test_a_page(told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(told)]) == 0
    path = told / "report.html"
    assert f"{path}: " in capsys.readouterr().out
    text = path.read_text()
    page = Page(text)
    assert page.loads == [], "it loads nothing"
    assert "http" not in text
    assert "<b> & 'c'" in "".join(page.words)
    words = set(page.words)
    assert {
        "finished",
        "spike: <loss> 5.0",
        "node-a, node-b",
        "2 x H100",
        "images-000000000160",
        "ffffffffffffffff",
    } <= words
    newest, first = (Image.open(BytesIO(picture)) for picture in page.pictures)
    assert (newest.format, newest.size) == ("WEBP", (702, 700))
    assert (first.format, first.size) == ("PNG", (42, 40))
    rng = np.random.default_rng(0)
    assert (np.array(first) == rng.integers(0, 256, (40, 42, 3))).all()
    assert len(text) < 700_000

    norms = dict(page.line("health/grad_norm"))
    assert {round(value, -int(np.log10(value))) for value in norms.values()} == {1, 10, 100}, "a logarithmic axis"
    loss = dict(page.line("loss/train"))
    assert len(loss) < 600
    assert max(loss.values()) == max(value for step, value in loss.items() if abs(step - 617) < 3), "a spike is drawn"
    late = {step: value for step, value in loss.items() if step > 700}
    assert late
    assert all(abs(value - (0.2 + 1 / step)) < 0.01 for step, value in late.items())


def test_a_page_of_a_run_that_has_nothing(tmp_path: Path) -> None:
    run = made(tmp_path / "empty", 0, 0)
    page = Page(page_of(read_run(run, pictures=True), NOW))
    assert "not begun" in page.words
    assert not page.lines


def test_thinning_keeps_extremes_and_ends() -> None:
    line = {step: float(np.sin(step)) for step in range(7, 5007)}
    line[1234], line[4321] = 9.0, -9.0
    thinned = thin(line, 100)
    assert 90 <= len(thinned) <= 110
    assert {7, 1234, 4321, 5006} <= thinned.keys()
    assert list(thinned) == sorted(thinned)
    assert thin({1: 1.0, 2: 2.0}, 100) == {1: 1.0, 2: 2.0}
    assert nice(0, 1, 4) == pytest.approx([0, 0.5, 1])
    assert nice(3, 1003, 4) == [500, 1000]
    assert spread(list(range(100)), 4) == [0, 33, 66, 99]


PROBE = """<script>
const chart = document.querySelector("svg[data-x]"), box = chart.getBoundingClientRect()
chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 2, clientY: box.top + 9}))
document.title = [document.documentElement.scrollWidth, innerWidth, chart.nextElementSibling.textContent,
  [...document.images].every(image => image.complete && image.naturalWidth > 0)].join("|")
</script></body>"""


@pytest.mark.long
@needs("chromium")
@pytest.mark.parametrize("width", [1300, 500])
def test_in_a_browser(width: int, told: Path, tmp_path: Path) -> None:
    """Nothing is wider than the window, every picture is drawn, and the pointer reads values. (Chromium's windows are
    at least 500 pixels wide.)"""
    page = tmp_path / "page.html"
    page.write_text(page_of(read_run(told, pictures=True), NOW).replace("</body>", PROBE))
    browser = shutil.which("chromium")
    assert browser
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    wide, window, read, drawn = title[1].split("|")
    assert int(window) <= width
    assert int(wide) <= int(window)
    assert re.fullmatch(r"step 1,001: train 0\.2\d*", read)
    assert drawn == "true"
