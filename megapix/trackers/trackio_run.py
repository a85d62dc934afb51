"""Trackio. Its own variables hold: TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL; TRACKIO_PROJECT is ours."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path
from typing import Any


class TrackioRun:
    """A run of Trackio, in its SQLite file of the project, or in a Space."""

    def __init__(self, run: Path, identity: str, config: dict[str, Any]) -> None:
        import trackio

        self._trackio, self.id = trackio, identity or f"{run.name}-{uuid.uuid4().hex[:8]}"
        project = os.environ.get("TRACKIO_PROJECT", "megapix")
        self._run = trackio.init(
            project, self.id, config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Log a row."""
        self._run.log(row, step=step)

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Log a picture."""
        from PIL import Image

        self._run.log({tag: self._trackio.Image(Image.open(io.BytesIO(png)))}, step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        """Log a text."""
        self._run.log({tag: text}, step=step)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


start = TrackioRun
