"""TensorBoard itself on a run folder: the real server, asked over HTTP, sees one line through interruptions."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megapix.checkpoint.folder import latest
from megapix.monitoring.processes import processes
from megapix.monitoring.tensorboard import Writer
from tests.support.launch import free_port, succeed
from tests.support.programs import needs
from tests.support.small_run import STEP_BATCH, arguments, scalars

DEADLINE = 120.0
"""Seconds in which the server has to show what it was started for."""
END, BACK_TO = 8, 4
"""Steps of the run, and the step of the checkpoint that it goes back to."""


class Server:
    """A TensorBoard process on a folder, and its answers."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.base = process, f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: str) -> bytes:
        """An answer's body."""
        url = f"{self.base}/{path}" + (f"?{urlencode(query)}" if query else "")
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read()

    def json(self, path: str, **query: str) -> Any:
        return json.loads(self.get(path, **query))

    def tags(self, plugin: str) -> dict[str, Any]:
        """Tags of the only run, waiting until the server has read the folder."""
        deadline = time.monotonic() + DEADLINE
        while True:
            assert self.process.poll() is None, "TensorBoard has ended"
            try:
                if tags := self.json(f"data/plugin/{plugin}/tags").get("."):
                    return tags
            except (urllib.error.URLError, ConnectionError):
                pass  # not listening yet
            assert time.monotonic() < deadline, "TensorBoard shows nothing"
            time.sleep(0.2)

    def scalars(self, tag: str) -> list[tuple[int, float]]:
        """(step, value) of a tag, as the browser gets them."""
        return [(step, value) for _, step, value in self.json("data/plugin/scalars/scalars", run=".", tag=tag)]


@contextmanager
def tensorboard(folder: Path, *options: str) -> Iterator[Server]:
    """TensorBoard on a free port."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        yield Server(process, port)
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def interrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that has lost its last checkpoint, and so has gone back to step 4 with other rows to log.

    The second part logs every second step only: nothing replaces the first part's rows of steps 5 and 7. It runs on a
    host whose clock is a day behind that of the first one.
    """
    run = tmp_path_factory.mktemp("interrupted") / "run"
    options = ["--optim.end-at", str(END * STEP_BATCH), "--checkpoint.every", str(BACK_TO * STEP_BATCH)]
    options += ["--log.samples-every", str(BACK_TO * STEP_BATCH), "--log.grid-columns", "2"]
    succeed(1, "megapix", arguments(shards, run, *options))
    (events,) = (run / "tensorboard").iterdir()
    stamp = events.name.split(".")[3]
    events.rename(events.with_name(events.name.replace(stamp, str(int(stamp) + 86_400))))
    newest = latest(run)
    assert newest is not None
    shutil.rmtree(newest)
    pointer = run / "checkpoints" / "latest"
    if pointer.is_file():
        pointer.write_text(f"images-{BACK_TO * STEP_BATCH:012d}")
    out = succeed(1, "megapix", arguments(shards, run, *options, "--log.every", str(2 * STEP_BATCH)))[0].out
    assert f"at {BACK_TO * STEP_BATCH:,} images seen" in out
    return run


EXPECTED = [1, 2, 3, 4, 6, 8]


def test_every_step_once_in_the_files(interrupted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(interrupted / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == EXPECTED
    assert [event.step for event in events.Images("samples/ema")] == [4, 8]


def test_each_start_is_noted(interrupted: Path) -> None:
    first, second = processes(interrupted)
    assert (first.images_seen, second.images_seen) == (0, BACK_TO * STEP_BATCH)
    assert (second.ranks, second.hosts, second.cards) == (1, (socket.gethostname(),), "CPUs")
    assert (second.samples, second.versions["torch"]) == (40, version("torch"))


@pytest.mark.parametrize("loading", ["true", pytest.param("false", marks=pytest.mark.long)])
def test_every_step_once_over_http(loading: str, interrupted: Path) -> None:
    """With TensorBoard's fast reader, its default, and with the other one."""
    with tensorboard(interrupted / "tensorboard", "--load_fast", loading) as server:
        tags = server.tags("scalars")
        assert {"loss/train", "health/grad_norm", "speed/images_per_s", "blocks/grad_norm/pit_0"} <= tags.keys()
        for tag in ("loss/train", "schedule/images_seen", "speed/tflops_per_rank"):
            rows = server.scalars(tag)
            assert [step for step, _ in rows] == EXPECTED, tag
            assert dict(rows) == pytest.approx(scalars(interrupted, tag)), tag
        assert dict(server.scalars("schedule/images_seen")) == {step: step * STEP_BATCH for step in EXPECTED}


def test_values_groups_and_a_picture_over_http(interrupted: Path) -> None:
    with tensorboard(interrupted / "tensorboard") as server:
        scalar_tags = server.tags("scalars").keys()
        assert server.tags("images").keys() == {"samples/ema"}
        pictures = server.json("data/plugin/images/images", run=".", tag="samples/ema", sample="0")
        assert [picture["step"] for picture in pictures] == [4, 8]
        image = Image.open(io.BytesIO(server.get(f"data/plugin/images/individualImage?{pictures[-1]['query']}")))
        assert image.size == (2 + 2 * 18, 2 + 3 * 18)

        layout = server.json("data/plugin/custom_scalars/layout")
        groups = {group["title"]: [chart["title"] for chart in group["chart"]] for group in layout["category"]}
        assert list(groups) == ["loss", "health", "speed", "memory"]
        assert groups["loss"] == ["loss", "loss by quarter of t"], "no chart without data"
        shown = set()
        for group in layout["category"]:
            for chart in group["chart"]:
                for pattern in chart["multiline"]["tag"]:
                    answer = server.json("data/plugin/custom_scalars/scalars", run=".", tag=pattern)
                    assert answer["regex_valid"], pattern
                    assert answer["tag_to_events"], f"{chart['title']} is empty"
                    shown |= answer["tag_to_events"].keys()
        assert scalar_tags - shown == {"schedule/lr", "schedule/images_seen"}, "logged, but on no chart"


def test_a_chart_of_an_earlier_process_stays(tmp_path: Path) -> None:
    """Its tags are read from the files; one that was logged beyond the checkpoint alone is gone again."""
    before = Writer(tmp_path, 0, enabled=True)
    before.scalars(3, {"loss/train": 1.0, "validation/loss_ema": 2.0, "loss/repa": float("nan")})
    before.scalars(5, {"memory/host_peak_GiB": 1.0})
    before.close()
    for path in list(tmp_path.iterdir()):  # two writers of one second would share a name
        path.rename(path.with_name(path.name + ".0"))
    after = Writer(tmp_path, 3, enabled=True)
    after.scalars(4, {"speed/images_per_s": 7.0})
    after.close()
    with tensorboard(tmp_path) as server:
        assert server.tags("scalars").keys() == {"loss/train", "validation/loss_ema", "speed/images_per_s"}
        layout = server.json("data/plugin/custom_scalars/layout")
    groups = {group["title"]: [chart["title"] for chart in group["chart"]] for group in layout["category"]}
    assert groups == {"loss": ["loss", "validation loss"], "speed": ["images/s"]}


@needs("mount", "umount")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_full_disk_costs_rows_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system of 256 KiB that fills up and is cleared again; the writer goes on in another file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        board = Writer(disk / "tensorboard", 0, enabled=True)
        board.scalars(1, {"loss/train": 1.0})
        (disk / "filler").write_bytes(bytes(200 * 2**10))
        board.image(2, "samples/ema", np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8))
        board.scalars(2, {"loss/train": 2.0})
        assert "TensorBoard's rows are lost, they cannot be written: No space left on device" in capsys.readouterr().err
        (disk / "filler").unlink()
        board.scalars(3, {"loss/train": 3.0})
        board.close()
        found = {}
        for path in (disk / "tensorboard").iterdir():  # each by itself: names of one second sort 10 before 9
            events = EventAccumulator(str(path))
            events.Reload()
            if "loss/train" in events.Tags()["scalars"]:
                found |= {event.step: event.value for event in events.Scalars("loss/train")}
        assert found.pop(2, 2.0) == 2.0
        assert found == {1: 1.0, 3: 3.0}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
