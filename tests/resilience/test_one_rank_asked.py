"""A single rank is asked to stop, and it is not rank 0."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.support.small_run import ENDLESS, arguments, asked_to_stop, counters


def test_rank_1_alone_is_asked_to_stop(shards: Path, tmp_path: Path) -> None:
    """Both end with code 75 at one step, between two steps and not within a grid, and rank 0 says who has heard it."""
    run = tmp_path / "run"
    done = asked_to_stop(arguments(shards, run, *ENDLESS), run, lambda launch: launch.signal(signal.SIGUSR1, [1]))
    assert "stopped by SIGUSR1 at" in done[0].out
    assert counters(run).images_seen == counters(run).position >= 24
