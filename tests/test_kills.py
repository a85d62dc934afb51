"""Preparation killed at random moments, again and again: the next run ends in the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_data_prep import hashes


@pytest.mark.long
def test_twenty_kills_end_in_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL to every process after a random share of the time that a whole run takes; every third time twice."""
    command = [sys.executable, "-m", "data_prep", "demo", "openmoji", "--size", "256", "--split", "heldout"]
    command += ["--samples-per-shard", "16", "--workers", "2"]
    start = time.perf_counter()
    subprocess.run([*command, str(tmp_path / "reference")], check=True, capture_output=True)
    whole = time.perf_counter() - start
    reference, generator, interrupted = hashes(tmp_path / "reference"), random.Random(0), 0
    for number in range(20):
        out = tmp_path / "out"
        for _ in range(2 if number % 3 == 0 else 1):
            process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL, start_new_session=True)
            try:
                process.wait(timeout=generator.uniform(0.02, 1.0) * whole)
            except subprocess.TimeoutExpired:
                interrupted += 1
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run([*command, str(out)], check=True, capture_output=True)
        assert hashes(out) == reference, f"kill {number}"
        shutil.rmtree(out)
    assert interrupted >= 20, "nearly all of the 27 kills hit a run at work"
