"""What the tests of the launcher share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.small_run import arguments


@pytest.fixture
def train(shards: Path, tmp_path: Path) -> list[str]:
    """The small run's arguments for launch.sh."""
    return arguments(shards, tmp_path / "run")[1:]
