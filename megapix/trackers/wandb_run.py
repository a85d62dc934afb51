"""Weights & Biases. Its own variables hold: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY."""

from __future__ import annotations

import io
import os
import uuid
from pathlib import Path
from typing import Any


class WandbRun:
    """A run of wandb; files of it lie in RUN/wandb."""

    _library: Any
    _run: Any

    def __init__(self, run: Path, identity: str, config: dict[str, Any]) -> None:
        import wandb

        self._library, self.id = wandb, identity or uuid.uuid4().hex[:12]
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megapix"),
            id=self.id,
            name=run.name,
            dir=str(run),
            config=config,
            resume="allow",
            settings=settings,
        )

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Log a row; rows of one step are one."""
        self._run.log(row, step=step)

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Log a picture."""
        from PIL import Image

        self._run.log({tag: self._library.Image(Image.open(io.BytesIO(png)))}, step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        """Log a text."""
        self._run.log({tag: text}, step=step)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


start = WandbRun
