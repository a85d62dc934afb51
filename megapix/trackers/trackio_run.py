"""Trackio. Its own variables hold: TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL; TRACKIO_PROJECT is ours."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from megapix.trackers.wandb_run import WandbRun


class TrackioRun(WandbRun):
    """A run of Trackio, in its SQLite file of the project, or in a Space. What is logged is spelled as for wandb."""

    def __init__(self, run: Path, identity: str, config: dict[str, Any]) -> None:
        import trackio

        self._library, self.id = trackio, identity or f"{run.name}-{uuid.uuid4().hex[:8]}"
        project = os.environ.get("TRACKIO_PROJECT", "megapix")
        self._run = trackio.init(
            project, self.id, config=config, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )


start = TrackioRun
