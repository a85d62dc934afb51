"""A tracker's process: `python -m megapix.trackers.process NAME RUN`. Reads messages, a JSON object a line, until the
run closes the pipe or dies; then the tracker ends its run, and the process with it.

Rows cannot be taken out of a tracker again. So rows of steps that it has logged already, which a resumed run takes
again, are passed over, and one line says which; texts come at the last of these steps.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Protocol

from megapix.trackers.tracker import FOLDER, remember, remembered

HANDOVER = 60.0
"""Seconds that a run which resumes at once waits for the process of the one before to end."""


class Adapter(Protocol):
    """One tracker's library: `start(run, id, config)` of its module gives it."""

    id: str
    """What the tracker calls the run."""

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Log a row."""

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Log a PNG file."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Log a text."""

    def finish(self) -> None:
        """End the run, with everything sent or written."""


def main(name: str, run: Path) -> None:
    """Serve one run until the pipe closes."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # the run's end is the pipe's end
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints goes into its log
    with open(run / FOLDER / f"{name}.lock", "a") as lock:
        _wait_for(lock)
        try:
            _serve(name, run, said)
        except Exception as error:  # whatever a library raises, the run needs to hear it once
            _tell(said, error)
            for _ in sys.stdin:  # nobody has to wait for a pipe that is full
                pass


def _serve(name: str, run: Path, said: IO[str]) -> None:
    first = sys.stdin.readline()
    if not first:
        return
    begin, before = json.loads(first), remembered(run, name)
    adapter: Adapter = import_module(f"megapix.trackers.{name}_run").start(run, before.get("id", ""), begin["config"])
    last = before.get("step", 0)
    remember(run, name, adapter.id, last)
    if last > begin["first_step"]:
        steps = (
            f"step {last:,}" if last == begin["first_step"] + 1 else f"steps {begin['first_step'] + 1:,} to {last:,}"
        )
        line = f"has {steps} of the process before, which are taken again: it keeps the rows that it has"
        _print(said, {"note": 1, "warning": line})
    for line in sys.stdin:
        try:
            message = json.loads(line)
            step = message["step"]
            if "text" in message:
                adapter.text(max(step, last), message["text"], message["value"])
            elif step > before.get("step", 0):
                _log(adapter, message)
                if step > last:
                    last = step
                    remember(run, name, adapter.id, last)
        except Exception as error:
            _tell(said, error)
    adapter.finish()


def _log(adapter: Adapter, message: dict[str, Any]) -> None:
    if "scalars" in message:
        adapter.scalars(message["step"], message["scalars"])
    else:
        adapter.image(message["step"], message["image"], base64.b64decode(message["png"]))


def _wait_for(lock: IO[str]) -> None:
    end = time.monotonic() + HANDOVER
    while time.monotonic() < end:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return


def _tell(said: IO[str], error: Exception) -> None:
    import traceback

    traceback.print_exc()
    words = " ".join(str(error).split())[:300]
    _print(said, {"warning": f"{type(error).__name__}: {words} (rows are lost; RUN/{FOLDER} has its log)"})


def _print(said: IO[str], message: dict[str, Any]) -> None:
    with suppress(OSError):  # the run is gone
        print(json.dumps(message), file=said, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
