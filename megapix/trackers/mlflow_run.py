"""MLflow. Its own variables hold: MLFLOW_TRACKING_URI, and MLFLOW_EXPERIMENT_NAME for the experiment."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BRIEF = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""Unless they are set: its own values have a row wait for minutes while a server is away."""
AT_ONCE = 100
"""Parameters in a request; MLflow takes no more."""


class MlflowRun:
    """A run of MLflow."""

    def __init__(self, run: Path, identity: str, config: dict[str, Any]) -> None:
        for name, value in BRIEF.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if identity:
            self._client.update_run(identity, status="RUNNING")
            self.id = identity
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megapix")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=_beside())
        self.id = self._client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:6000]) for key, value in _flat(config)]
        for first in range(0, len(params), AT_ONCE):
            self._client.log_batch(self.id, params=params[first : first + AT_ONCE])

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Log a row."""
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[self._metric(tag, value, now, step) for tag, value in row.items()])

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Log a picture, as the artifact TAG/STEP.png."""
        from PIL import Image

        self._client.log_image(self.id, Image.open(io.BytesIO(png)), artifact_file=f"{tag}/{step:09d}.png")

    def text(self, step: int, tag: str, text: str) -> None:
        """Log a text, as the artifact TAG/STEP-TIME.md."""
        self._client.log_text(self.id, text, f"{tag}/{step:09d}-{time.time_ns()}.md")

    def finish(self) -> None:
        """End the run."""
        self._client.set_terminated(self.id)


def _beside() -> str | None:
    """Where artifacts of a local database go: beside it, and not, as MLflow has it, into the working directory."""
    kind, _, path = os.environ.get("MLFLOW_TRACKING_URI", "").partition(":///")
    return (Path(path).resolve().parent / "mlruns").as_uri() if kind == "sqlite" and path else None


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


start = MlflowRun
