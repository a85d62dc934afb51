"""Asked to stop: every rank stops at the same step, all is saved, and the same command resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megapix.checkpoint.layout import PARTS
from tests.support.launch import ROOT, Forked, FreshLaunch, Launch, succeed
from tests.support.process_groups import alive, command_of, workers_of
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


def test_a_start_beside_a_run_that_is_ending_goes_on_from_its_end(shards: Path, tmp_path: Path) -> None:
    """The second one finds no checkpoint when it starts, and waits for the folder until the first has saved one."""
    run = tmp_path / "run"
    first = Launch(1, "megapix", arguments(shards, run, *ENDLESS))
    second: Launch | None = None
    try:
        first.wait_for(lambda: len(logged(run)) >= 3)
        second = Launch(1, "megapix", arguments(shards, run, *ENDLESS))
        (waiting,) = second.processes
        assert isinstance(waiting, Forked)
        second.wait_for(lambda: "is held by" in waiting.error_text())
        first.signal(signal.SIGTERM)
        (done,) = first.finish(timeout=60)
        assert done.code == 75
        left = saved(run)
        second.wait_for(lambda: len(logged(run)) >= left.state.counters.images_seen // STEP_BATCH + 2)
        second.signal(signal.SIGTERM)
        (done,) = second.finish(timeout=60)
    finally:
        first.kill()
        if second:
            second.kill()
    assert done.code == 75
    assert f"resuming from {left.folder}" in done.out
    assert left.folder.is_dir()
    assert [path.name for path in (run / "checkpoints").iterdir() if ".aside" in path.name] == []
    steps = sorted(scalars(run, "loss/train"))
    assert steps == list(range(1, counters(run).images_seen // STEP_BATCH + 1))


@pytest.mark.parametrize("number", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.long)])
def test_workers_do_not_hear_what_asks_the_run_to_stop(number: str) -> None:
    """In a new process, since the first one that Python starts of this kind has SIGTERM unblocked."""
    code = f"""
import signal
from megapix.data import workers

workers.start_server()
worker = workers.context().Process(target=signal.raise_signal, args=(signal.{number},))
worker.start()
worker.join()
print(worker.exitcode)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", done.stderr


@pytest.mark.long
def test_asked_while_the_compiler_works(shards: Path, tmp_path: Path) -> None:
    """Every process of the ranks gets the signal, g++ too, which ends at it otherwise; the run stops after its step."""
    run = tmp_path / "run"
    command = arguments(shards, run, "--machine.compile", *ENDLESS)
    launch = Launch(1, "megapix", command, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    try:
        groups = [process.pid for process in launch.processes]
        launch.wait_for(lambda: any("cc1plus" in command_of(pid) for group in groups for pid in alive(group)))
        launch.signal(signal.SIGTERM)
        done = launch.finish()
    finally:
        launch.kill()
    assert done[0].code == 75, done[0].err
    assert counters(run).images_seen > 0


@pytest.mark.long
def test_workers_end_with_a_rank_that_is_killed(shards: Path, tmp_path: Path) -> None:
    """The server that they are forked from, too: a launcher waits for the end of every process of its group."""
    run = tmp_path / "run"
    launch = FreshLaunch(1, "megapix", arguments(shards, run, "--data.workers", "2", *ENDLESS))
    try:
        launch.wait_for(lambda: len(logged(run)) >= 1)
        (rank,) = launch.processes
        there = set(Path("/dev/shm").iterdir())
        assert len(alive(rank.pid)) == 5, "the rank, two workers, their server, and Python's resource tracker"
        rank.kill()
        rank.communicate(timeout=60)  # workers and server hold its pipes
        deadline = time.monotonic() + 60
        while alive(rank.pid):
            assert time.monotonic() < deadline, alive(rank.pid)
            time.sleep(0.05)
        assert not {path for path in there if str(rank.pid) in path.name}, "nothing of a worker has a name"
    finally:
        launch.kill()


@pytest.mark.long
def test_a_killed_worker_costs_no_batch(shards: Path, tmp_path: Path) -> None:
    """One of rank 1's two, in mid-run: it is named, and the run ends as one that was left alone."""
    options = ["--data.workers", "2", "--optim.end-at", str(80 * STEP_BATCH), "--optim.lr-step-at", "never"]
    run, still = tmp_path / "run", tmp_path / "still"
    launch = Launch(2, "megapix", arguments(shards, run, *options))
    try:
        launch.wait_for(lambda: len(logged(run)) >= 3)
        victim = max(workers_of(launch.processes[1].pid))
        os.kill(victim, signal.SIGKILL)
        done = launch.finish(timeout=120)
    finally:
        launch.kill()
    assert [rank.code for rank in done] == [0, 0], done[1].err
    assert f"(process {victim}) was killed by SIGKILL, as the kernel does where memory runs out" in done[1].err
    assert "its workers start again (1 of 3 in a row)" in done[1].err
    succeed(2, "megapix", arguments(shards, still, *options[2:]))
    whole, parts = (flat_vectors(saved(folder).folder) for folder in (still, run))
    assert all(torch.equal(whole[part], parts[part]) for part in PARTS)
    assert scalars(run, "loss/train") == scalars(still, "loss/train")


def test_asked_while_sampling(shards: Path, tmp_path: Path) -> None:
    """A grid of one image, so that rank 1 draws none, in so many steps that it would take hours."""
    run = tmp_path / "run"
    options = ["--log.samples-every", "24", "--sampling.steps", "10000000", "--log.grid-columns", "1"]
    command = arguments(shards, run, *options, "--log.grid-classes", "1", *ENDLESS)
    asked_to_stop(command, run, lambda launch: launch.signal(signal.SIGTERM, [1]))
    assert counters(run).images_seen == 24
