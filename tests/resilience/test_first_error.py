"""An error of one rank of two, in each phase: the log has it once, with rank, host and phase, and all end with its code
within seconds."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megapix.shards.index import read_index, write_index
from tests.support.launch import Launch
from tests.support.small_run import ENDLESS, arguments, logged, saved

HOST = os.uname().nodename
SECONDS = 60.0
"""The watchdog's: a hang would be found after that."""
WITHIN = 15.0
"""Seconds of a loaded machine from the error to the end of both ranks."""

STEPS = {
    "start": 0,
    "compile": 1,
    "data": 3,
    "backward": 3,
    "step": 3,
    "save": 2,
    "sample": 2,
    "validate": 1,
    "close": 5,
}
"""Phase -> step at which it fails."""
CODES = {"input": 2, "memory": 1, "storage": 74, "interrupt": 130}
CAUSES = {
    "input": "shard-000001.tar: sample 17: its bytes are not those that were indexed",
    "memory": "2.00 GiB asked",
    "storage": "/shards/shard-000001.tar: Input/output error",
    "interrupt": "interrupted; the same command resumes from the last checkpoint",
}


def by_default(phase: str, kind: str, rank: int) -> bool:
    """Every phase with two errors, and every error on both ranks; the others are long."""
    p, k = list(STEPS).index(phase), list(CODES).index(kind)
    return (p - k) % 2 == 0 and rank == (p // 2 + k // 2) % 2


TABLE = [
    pytest.param(*case, id="-".join(map(str, case)), marks=() if by_default(*case) else pytest.mark.long)
    for case in product(STEPS, CODES, (0, 1))
]


@pytest.fixture(scope="module")
def held_out(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images under another name, which a run may validate with."""
    folder = Path(shutil.copytree(shards, tmp_path_factory.mktemp("held-out") / "shards"))
    index = read_index(shards)
    write_index(folder, replace(index, source=index.source | {"kind": "another"}))
    return folder


def start(phase: str, kind: str, rank: int, slow: float, command: list[str]) -> Launch:
    return Launch(2, "tests.programs.failing", [phase, kind, str(rank), str(slow), *command])


@pytest.mark.parametrize(("phase", "kind", "rank"), TABLE)
def test_phase_by_phase(phase: str, kind: str, rank: int, shards: Path, held_out: Path, tmp_path: Path) -> None:
    options = ["--optim.end-at", "32", "--machine.watchdog", str(SECONDS), "--checkpoint.every", "1000"]
    options += {
        "compile": ["--machine.compile"],
        "save": ["--checkpoint.every", "9"],
        "sample": ["--log.samples-every", "16", "--log.grid-columns", "2"],
        "validate": ["--validation.path", str(held_out), "--validation.samples", "40", "--validation.every", "8"],
    }.get(phase, [])
    done = start(phase, kind, rank, 0.0, arguments(shards, tmp_path / "run", *options)).finish(timeout=90)
    ended, said = time.time(), "".join(each.out + each.err for each in done)
    assert [each.code for each in done] == [CODES[kind]] * 2, said
    fault = re.search(r"fault (\S+)", done[rank].out)
    assert fault
    assert ended - float(fault[1]) < WITHIN
    step = f"step {STEPS[phase]}, " if STEPS[phase] else ""
    place = f"rank {rank} on {HOST}, {step}phase '{phase}': "
    if kind == "memory":
        place = f"out of GPU memory on rank {rank} ({HOST}), {step}phase '{phase}': "
    assert said.count(place) == said.count("megapix: error: ") == 1, said
    assert CAUSES[kind] in said[said.index(place) :]
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", ["input", pytest.param("bug", marks=pytest.mark.long)])
def test_a_save_at_work_is_written_after_the_error_is_said(kind: str, shards: Path, tmp_path: Path) -> None:
    """It takes longer than the watchdog's seconds: the error is in the log meanwhile, and decides the code."""
    command = arguments(shards, tmp_path / "run", "--checkpoint.every", "16", "--machine.watchdog", "2")
    launch = start("step", kind, 1, 6.0, command)
    log = launch.processes[0]._outputs[1]  # type: ignore[union-attr]
    launch.wait_for(lambda: "megapix: error: " in log.read_text())
    assert not list((tmp_path / "run" / "checkpoints").glob("images-*[0-9]")), "it is still at work"
    done = launch.finish(timeout=60)
    said = "".join(each.err for each in done)
    assert [each.code for each in done] == [{"input": 2, "bug": 1}[kind]] * 2, said
    assert said.count("megapix: error: ") == 1, said
    assert f"megapix: error: rank 1 on {HOST}, step 3, phase 'step': " in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("images-*")] == ["images-000000000016"]
    assert saved(tmp_path / "run").state.counters.images_seen == 16


@pytest.mark.long
def test_a_save_longer_than_ten_times_the_watchdogs_seconds_is_made_at_the_end(shards: Path, tmp_path: Path) -> None:
    options = ["--checkpoint.every", "1000", "--optim.end-at", "16", "--machine.watchdog", "2"]
    done = start("none", "bug", 1, 24.0, arguments(shards, tmp_path / "run", *options)).finish(timeout=90)
    assert [each.code for each in done] == [0, 0], done[0].err
    assert saved(tmp_path / "run").state.counters.images_seen == 16


@pytest.mark.parametrize("seconds", ["60", pytest.param("0", marks=pytest.mark.long)])
def test_an_interrupt_of_both_ranks(seconds: str, shards: Path, tmp_path: Path) -> None:
    """As from the keyboard, in the midst of steps."""
    command = arguments(shards, tmp_path / "run", *ENDLESS, "--machine.watchdog", seconds)
    launch = Launch(2, "megapix", command)
    launch.wait_for(lambda: len(logged(tmp_path / "run")) >= 3)
    launch.signal(signal.SIGINT)
    done = launch.finish(timeout=60)
    said = "".join(each.err for each in done)
    assert [each.code for each in done] == [130, 130], said
    lines = said.count("interrupted; the same command resumes from the last checkpoint")
    assert lines == 1 or (seconds == "0" and lines == 2), (
        said
    )  # without it, rank 0's store may be gone before rank 1 asks
    assert "Traceback" not in said


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_watchdog_the_rank_that_fails_says_it(rank: int, shards: Path, tmp_path: Path) -> None:
    """The others are the launcher's to end; here their broken collective does."""
    command = arguments(shards, tmp_path / "run", "--machine.watchdog", "0")
    done = start("step", "input", rank, 0.0, command).finish(timeout=60)
    assert done[rank].code == 2
    assert [each.err.count("megapix: error: ") for each in done] == [int(number == rank) for number in (0, 1)]
    assert f"megapix: error: rank {rank} on {HOST}, step 3, phase 'step': {CAUSES['input']}" in done[rank].err
