"""Processes killed at random moments, again and again: the next run ends in the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.campaign import DISTURBED, campaign
from tests.data_prep.test_write import hashes
from tests.support.programs import needs


def files_in(folder: Path) -> int:
    """Files of a folder and those below it, temporary ones among them."""
    return sum(len(names) for _, _, names in os.walk(folder))


@pytest.mark.long
def test_kills_at_random_moments_end_in_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL to every process once a random number of a whole run's files is there; every third time twice."""
    command = [sys.executable, "-m", "data_prep", "demo", "openmoji", "--size", "256", "--split", "heldout"]
    command += ["--samples-per-shard", "16", "--workers", "2"]
    subprocess.run([*command, str(tmp_path / "reference")], check=True, capture_output=True)
    whole = files_in(tmp_path / "reference")
    reference, generator, interrupted = hashes(tmp_path / "reference"), random.Random(0), 0
    for number in range(7):
        out = tmp_path / "out"
        for _ in range(2 if number % 3 == 0 else 1):
            target = generator.randrange(files_in(out), whole)
            process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL, start_new_session=True)
            while process.poll() is None and files_in(out) < target:
                time.sleep(0.002)
            with suppress(subprocess.TimeoutExpired):  # a moment within a shard
                process.wait(timeout=generator.uniform(0, 0.1))
            interrupted += process.poll() is None
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run([*command, str(out)], check=True, capture_output=True)
        assert hashes(out) == reference, f"kill {number}"
        shutil.rmtree(out)
    assert interrupted >= 7, "nearly all of the 10 kills hit a run at work"


@pytest.mark.long
@needs("nginx")
def test_a_tenth_of_the_campaign_ends_in_the_same_bits(shards: Path, tmp_path: Path) -> None:
    """`python -m tests.campaign` is the whole of it."""
    pytest.importorskip("aiohttp")
    done = campaign(tmp_path, shards, share=0.1)
    assert len([line for line in done if line.startswith("step ")]) == len(DISTURBED)
