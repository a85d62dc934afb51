"""Asked to stop: every rank stops at the same step, all is saved, and the same command resumes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megapix.checkpoint.layout import PARTS
from tests.support.launch import ROOT, FreshLaunch, Launch, succeed
from tests.support.small_run import (
    ENDLESS,
    STEP_BATCH,
    arguments,
    asked_to_stop,
    counters,
    flat_vectors,
    logged,
    saved,
    scalars,
)


def by_signal(number: signal.Signals, ranks: list[int] | None) -> Callable[[Launch, Path], None]:
    return lambda launch, run: launch.signal(number, ranks)


def by_file(launch: Launch, run: Path) -> None:
    (run / "stop").touch()


ASKS = {
    "SIGTERM to every process": (by_signal(signal.SIGTERM, None), "SIGTERM"),
    "SIGUSR1 to one rank": (by_signal(signal.SIGUSR1, [1]), "SIGUSR1"),
    "a file": (by_file, "run/stop"),
}


@pytest.mark.parametrize(
    "how", ["SIGTERM to every process", *(pytest.param(how, marks=pytest.mark.long) for how in list(ASKS)[1:])]
)
def test_asked_to_stop(how: str, shards: Path, tmp_path: Path) -> None:
    """With a worker on each rank, which gets the signal too; once, 3 more steps, against a run of the same length."""
    ask, name = ASKS[how]
    run = tmp_path / "run"
    options = ["--data.workers", "1", "--optim.lr-step-at", "never"]
    done = asked_to_stop(arguments(shards, run, *options, *ENDLESS), run, lambda launch: ask(launch, run))
    assert all("Traceback" not in rank.err for rank in done)
    stopped = counters(run)
    assert stopped.images_seen == stopped.position >= 3 * STEP_BATCH
    (line,) = [line for line in done[0].out.splitlines() if "stopped by" in line]
    assert name in line
    assert f"{saved(run).folder}; the same command resumes" in line
    assert not (run / "stop").exists()
    if how != "SIGTERM to every process":
        return
    end = ["--optim.end-at", str(stopped.images_seen + 3 * STEP_BATCH)]
    succeed(2, "megapix", arguments(shards, run, *options, *end))
    succeed(2, "megapix", arguments(shards, tmp_path / "still", *options, *end))
    whole, parts = (flat_vectors(saved(tmp_path / name).folder) for name in ("still", "run"))
    assert all(torch.equal(whole[part], parts[part]) for part in PARTS)
    assert scalars(run, "loss/train") == scalars(tmp_path / "still", "loss/train")


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_workers_do_not_hear_what_asks_the_run_to_stop(number: str) -> None:
    """In a new process, since the first one that Python starts of this kind has SIGTERM unblocked."""
    code = f"""
import signal
from megapix.resilience import stopping
from megapix.data import workers

workers.start_server(stopping.SIGNALS)
worker = workers.context().Process(target=signal.raise_signal, args=(signal.{number},))
worker.start()
worker.join()
print(worker.exitcode)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr


def test_workers_end_with_a_rank_that_is_killed(shards: Path, tmp_path: Path) -> None:
    """The server that they are forked from, too: a launcher waits for the end of every process of its group."""
    run = tmp_path / "run"
    launch = FreshLaunch(1, "megapix", arguments(shards, run, "--data.workers", "2", *ENDLESS))
    try:
        launch.wait_for(lambda: len(logged(run)) >= 1)
        (rank,) = launch.processes
        assert len(alive(rank.pid)) == 5, "the rank, two workers, their server, and Python's resource tracker"
        rank.kill()
        rank.communicate(timeout=60)  # workers and server hold its pipes
        deadline = time.monotonic() + 60
        while alive(rank.pid):
            assert time.monotonic() < deadline, alive(rank.pid)
            time.sleep(0.05)
    finally:
        launch.kill()


def alive(group: int) -> list[int]:
    """The processes of a group, but for those that nobody has waited for yet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_asked_while_sampling(shards: Path, tmp_path: Path) -> None:
    """A grid of one image, so that rank 1 draws none, in so many steps that it would take hours."""
    run = tmp_path / "run"
    options = ["--log.samples-every", "24", "--sampling.steps", "10000000", "--log.grid-columns", "1"]
    command = arguments(shards, run, *options, "--log.grid-classes", "1", *ENDLESS)
    asked_to_stop(command, run, lambda launch: launch.signal(signal.SIGTERM, [1]))
    assert counters(run).images_seen == 24
