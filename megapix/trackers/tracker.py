"""A tracker as the run sees it: what is to be logged goes into a queue, and from there to the tracker's process."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

import megapix
from megapix.dist import warn
from megapix.files import write_atomic

FOLDER = "trackers"
"""In the run folder: what each tracker calls the run and how far it has logged (NAME.json), and its log (NAME.log)."""
WAITING = 4096
"""Rows that may wait for a tracker; with more of them the newest are lost."""
PATIENCE = 30.0
"""Seconds that a run's end waits for a tracker."""


class Tracker:
    """Rows, images and texts of one run for one tracker, as `monitoring.tensorboard.Writer` takes them.

    No method waits, but `close`, and none raises: what goes wrong is one warning.
    """

    def __init__(self, name: str, run: Path, first_step: int) -> None:
        """Start the tracker's process.

        Args:
            name: 'wandb', 'trackio' or 'mlflow'.
            run: the run folder.
            first_step: what was logged after it by an earlier process belongs to steps that are taken again.
        """
        self._name, self._first_step = name, first_step
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING)
        self._warned, self._process = False, self._start(run)
        if self._process:
            self._threads = [
                threading.Thread(target=work, args=(pipe,), daemon=True)
                for work, pipe in ((self._write, self._process.stdin), (self._listen, self._process.stdout))
            ]
            for thread in self._threads:
                thread.start()

    def configuration(self, step: int, config: dict[str, Any]) -> None:
        """Begin: the tracker gets the resolved configuration with the run."""
        self._put({"config": config, "first_step": self._first_step})

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Log one row of scalars; NaN stands for a missing value and is left out."""
        known = {tag: value for tag, value in row.items() if not math.isnan(value)}
        if known:
            self._put({"step": step, "scalars": known})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a uint8 image [H, W, 3]."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        self._put({"step": step, "image": name, "png": base64.b64encode(file.getvalue()).decode()})

    def event(self, step: int, text: str) -> None:
        """Log an event, under the text tag `events`."""
        self.text(step, "events", text)

    def text(self, step: int, name: str, text: str) -> None:
        """Log a text, in Markdown."""
        self._put({"step": step, "text": name, "value": text})

    def close(self) -> None:
        """Let the tracker end the run, for `PATIENCE` seconds; then its process is killed."""
        if not self._process:
            return
        with suppress(queue.Full):
            self._queue.put(None, timeout=1.0)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._warn(f"has not ended within {PATIENCE:.0f} s; what it had not sent stays here, or is lost")
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(1.0)

    def _start(self, run: Path) -> subprocess.Popen[bytes] | None:
        root = str(Path(megapix.__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "megapix.trackers.process", self._name, str(run.resolve())]
        try:
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            with open(run / FOLDER / f"{self._name}.log", "ab") as log:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=os.environ | {"PYTHONPATH": path},
                    start_new_session=True,  # signals to the run's processes are not for it
                )
        except OSError as error:
            self._warn(f"cannot be started: {error}")
            return None

    def _put(self, message: dict[str, Any]) -> None:
        if self._process:
            try:
                self._queue.put_nowait(message)
            except queue.Full:
                self._warn(f"{WAITING:,} rows wait for it: newer ones are lost")

    def _write(self, pipe: IO[bytes]) -> None:
        with suppress(OSError), pipe:  # the process has died: `_listen` says so
            while (message := self._queue.get()) is not None:
                pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()

    def _listen(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            with suppress(ValueError):
                message = json.loads(line)
                self._warn(message["warning"], always="note" in message)
        if self._process and self._process.wait():
            self._warn(f"its process has ended with {self._process.returncode}; the run goes on without it")

    def _warn(self, what: str, always: bool = False) -> None:
        """One warning for all that goes wrong; a note is always printed."""
        if always or not self._warned:
            warn(f"log.tracker {self._name}: {what}")
        self._warned = self._warned or not always


def remembered(run: Path, name: str) -> dict[str, Any]:
    """What a tracker calls the run, and the last step that it has logged: {'id': …, 'step': …}; empty if it is new."""
    try:
        found = json.loads((run / FOLDER / f"{name}.json").read_text())
        return {"id": str(found["id"]), "step": int(found["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def remember(run: Path, name: str, identity: str, step: int) -> None:
    """Keep them.

    Raises:
        OSError: the run folder refuses.
    """
    write_atomic(run / FOLDER / f"{name}.json", json.dumps({"id": identity, "step": step}).encode())
