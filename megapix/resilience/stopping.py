"""Pre-emption: SIGTERM, SIGUSR1 or a file RUN/stop ask a run to stop; it saves and ends with code 75.

A signal sets a flag and nothing else; the ranks compare their flags at each step and at each sampler step, so that all
stop at the same one. Code 75 (EX_TEMPFAIL of sysexits.h) tells a requeue script that the same command resumes.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

from megapix.dist import STOPS, World

EXIT_STOPPED = 75
STOP_NAME = "stop"
LOOK_EVERY = 1.0
"""Seconds between two checks for the file, which may lie on a slow file system."""


class StopRequested(Exception):
    """All ranks have agreed to stop; what they have done is saved."""

    collective = True


class StopRequest:
    """Whether this rank has been asked to stop. Make it before the first step, in the main thread."""

    def __init__(self, run: Path, world: World) -> None:
        self._file, self._world, self._looked = run / STOP_NAME, world, 0.0
        self._reason: str | None = None
        for number in STOPS:
            signal.signal(number, self._on_signal)

    @property
    def reason(self) -> str | None:
        """What asked for it, or None. Rank 0 looks for the file."""
        now = time.monotonic()
        if self._reason is None and self._world.main and now - self._looked >= LOOK_EVERY:
            self._looked = now
            if self._file.exists():
                self._reason = str(self._file)
        return self._reason

    @property
    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.reason is not None

    def done(self) -> None:
        """Remove the file, so that the same command can resume."""
        if self._world.main:
            self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._reason = signal.Signals(number).name
