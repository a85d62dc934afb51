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
import torch

from megapix.checkpoint.layout import PARTS
from tests.data_prep.test_write import hashes
from tests.support.launch import Launch, succeed
from tests.support.small_run import STEP_BATCH, arguments, flat_vectors, logged, saved, scalars


def files_in(folder: Path) -> int:
    """Files of a folder and those below it, temporary ones among them."""
    return sum(len(names) for _, _, names in os.walk(folder))


@pytest.mark.long
def test_twenty_kills_end_in_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL to every process once a random number of a whole run's files is there; every third time twice."""
    command = [sys.executable, "-m", "data_prep", "demo", "openmoji", "--size", "256", "--split", "heldout"]
    command += ["--samples-per-shard", "16", "--workers", "2"]
    subprocess.run([*command, str(tmp_path / "reference")], check=True, capture_output=True)
    whole = files_in(tmp_path / "reference")
    reference, generator, interrupted = hashes(tmp_path / "reference"), random.Random(0), 0
    for number in range(20):
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
    assert interrupted >= 20, "nearly all of the 27 kills hit a run at work"


@pytest.mark.long
def test_twenty_kills_of_a_run_end_in_the_same_bits(shards: Path, tmp_path: Path) -> None:
    """SIGKILL to both ranks at 20 random moments of 200 steps, saves in the background among them; started again each
    time, the run ends in the weights, moments, EMA and logged losses of one that was left alone."""
    options = ["--optim.end-at", str(200 * STEP_BATCH), "--checkpoint.every", str(3 * STEP_BATCH)]
    options += ["--optim.lr-step-at", str(150 * STEP_BATCH), "--data.workers", "1"]
    succeed(2, "megapix", arguments(shards, tmp_path / "still", *options))
    run, generator, kills = tmp_path / "run", random.Random(0), 0
    while kills < 20:
        # A kill at each tenth step or so of the way, at a moment between two steps that chance decides.
        target = min(200, 9 * (kills + 1) + generator.randrange(9))
        launch = Launch(2, "megapix", arguments(shards, run, *options))
        try:
            launch.wait_for(lambda target=target: max(logged(run), default=0) >= target)
            time.sleep(generator.uniform(0, 0.1))
            launch.signal(signal.SIGKILL)
            kills += 1
        finally:
            launch.kill()
    succeed(2, "megapix", arguments(shards, run, *options))
    whole, parts = (flat_vectors(saved(tmp_path / name).folder) for name in ("still", "run"))
    assert whole.keys() == set(PARTS)
    assert all(torch.equal(whole[part], parts[part]) for part in PARTS)
    for tag in ("loss/train", "health/grad_norm", "schedule/lr"):
        expected, found = scalars(tmp_path / "still", tag), scalars(run, tag)
        assert list(found) == list(range(1, 201)), "one line, without overlaps"
        assert found == expected
