"""Ranks that die, stop, hang or end in order: who is named, with which code the others end, and how soon."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megapix import config
from megapix.config import Config
from megapix.dist import World
from megapix.errors import InputError
from megapix.resilience import doors, watchdog
from megapix.resilience.heartbeat import Link, Peer, Word, line, period
from megapix.resilience.notes import PATIENCE, SLOW, USUAL
from megapix.resilience.watchdog import EXIT_LOST, Watchdog
from tests.support.launch import ROOT, Launch, free_port
from tests.support.programs import needs
from tests.support.small_run import SMALL, arguments

SECONDS = 3.0
"""The watchdog's, in these tests."""
SLACK = 6.0
"""Seconds of a loaded machine between a limit and the end of the processes."""


@dataclass
class Ended:
    """A rank: its exit code, its outputs, and when it was seen to have ended."""

    code: int
    out: str
    err: str
    at: float


def end(launch: Launch, stopped: int | None = None) -> list[Ended]:
    """Wait for all but a stopped rank, which never ends by itself; then kill what is left."""
    found: dict[int, Ended] = {}
    try:
        for rank in sorted(range(len(launch.processes)), key=lambda rank: rank == stopped):
            process = launch.processes[rank]
            if rank == stopped:
                process.kill()
            out, err = process.communicate(timeout=90)
            found[rank] = Ended(process.returncode, out, err, time.time())
    finally:
        launch.kill()
    return [found[rank] for rank in range(len(launch.processes))]


def watched(fault: str, victim: int) -> tuple[list[Ended], float]:
    """Three ranks of tests.programs.watched, and the seconds from the fault to the end of the last one that ends."""
    launch = Launch(3, "tests.programs.watched", [str(SECONDS), fault, str(victim)])
    ended = end(launch, victim if fault == "stop" else None)
    said = re.search(r"fault (\S+)", ended[victim].out)
    assert said, ended[victim].err
    return ended, max(rank.at for rank in ended) - float(said[1])


def host() -> str:
    return re.escape(os.uname().nodename)


def test_an_ordinary_end_is_no_alarm() -> None:
    ended, _ = watched("none", 1)
    assert [(rank.code, rank.err) for rank in ended] == [(0, "")] * 3


@pytest.mark.long
def test_a_phase_may_be_allowed_more() -> None:
    """One rank says nothing for a second more than the limit, in a phase that may take two more."""
    ended, _ = watched("hold", 1)
    assert [(rank.code, rank.err) for rank in ended] == [(0, "")] * 3


@pytest.mark.long
def test_time_in_which_all_were_stopped_does_not_count() -> None:
    """As by Ctrl-Z, for twice the limit, in the middle of a step that takes two thirds of it."""
    launch = Launch(3, "tests.programs.watched", [str(SECONDS), "slow", "1"])
    launch.wait_for(lambda: launch.processes[1].output_text().startswith("fault"))
    launch.signal(signal.SIGSTOP)
    time.sleep(2 * SECONDS)
    assert [process.poll() for process in launch.processes] == [None] * 3
    launch.signal(signal.SIGCONT)
    assert [(rank.code, rank.err) for rank in end(launch)] == [(0, "")] * 3


EIGHT = """
import os, sys
from tests.programs.watched import main

ranks = []
for rank in range(8):
    if not (process := os.fork()):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        sys.exit(main("6", "none", "0"))
    ranks.append(process)
sys.exit(any(os.waitpid(process, 0)[1] for process in ranks))
"""
"""Ranks of a process that has imported what they need."""


@needs("ip", "unshare")
@pytest.mark.long
def test_more_ranks_than_the_kernel_lets_wait_at_the_door() -> None:
    """A network namespace in which one connection may wait to be accepted, and eight ranks that call at once."""
    script = 'ip link set lo up; echo 1 >/proc/sys/net/core/somaxconn; exec "$0" -c "$1"'
    there = {"WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("no right to make a network namespace")
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script, sys.executable, EIGHT],
        env=os.environ | there,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "megapix" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "words", "within"),
    [
        ("kill", "rank 1 on {} is lost: its process ended without a goodbye", 0.0),
        pytest.param("stop", r"rank 1 on {} is lost: no heartbeat for \d.\d s", SECONDS, marks=pytest.mark.long),
        ("hang", r"rank 1 on {} hangs: nothing new for \d.\d s", SECONDS),
    ],
)
def test_a_lost_rank_is_named_and_ends_the_others(fault: str, words: str, within: float) -> None:
    ended, seconds = watched(fault, 1)
    survivors = (0, 2) if fault != "hang" else (0, 1, 2)
    assert [ended[rank].code for rank in survivors] == [EXIT_LOST] * len(survivors)
    assert seconds < within + SLACK
    block = ended[0].err
    assert block.count("megapix: error: ") == 1
    assert "Traceback" not in "".join(rank.err for rank in ended), "a broken collective is not the news"
    assert re.search(words.format(host()), block)
    for rank in range(3):
        assert re.search(rf"rank {rank} on {host()}: step \d, \w+, \d\d:\d\d:\d\d, \d+.\d s ago\n", block)
    assert ended[2].err == "", "rank 0 of this host has said it"


@pytest.mark.long
@pytest.mark.parametrize(("fault", "within"), [("kill", 0.0), ("stop", SECONDS)])
def test_the_loss_of_rank_0_is_seen_by_every_other(fault: str, within: float) -> None:
    ended, seconds = watched(fault, 0)
    assert [rank.code for rank in ended] == [-signal.SIGKILL, EXIT_LOST, EXIT_LOST]
    assert seconds < within + SLACK
    for rank in (1, 2):
        assert re.search(rf"megapix: error: rank 0 on {host()} is lost", ended[rank].err)
        assert re.search(rf"rank {rank} on {host()}: step \d", ended[rank].err)


@pytest.mark.long
def test_when_all_hang_no_one_is_blamed() -> None:
    """Every rank is at the same place: all of them wait in the collective that one process will never join."""
    ended, seconds = watched("everywhere", 1)
    assert [rank.code for rank in ended] == [EXIT_LOST] * 3
    assert seconds < SECONDS + SLACK
    assert "megapix: error: all ranks hang, in a collective or at a disk: nothing new for" in ended[0].err


def test_one_ranks_error_ends_the_others_with_its_code() -> None:
    """The others wait in a collective for a rank that has left in order: no loss, and no waiting either."""
    ended, seconds = watched("input", 1)
    assert [rank.code for rank in ended] == [2] * 3
    assert seconds < SECONDS + SLACK
    assert ended[0].err == f"\nmegapix: error: rank 1 on {os.uname().nodename}, step 3, phase 'data': no such sample\n"
    assert [rank.err for rank in ended[1:]] == ["", ""]


@pytest.mark.long
def test_one_ranks_bug_is_shown_and_ends_the_others() -> None:
    ended, _ = watched("bug", 2)
    assert [rank.code for rank in ended] == [1] * 3
    assert "KeyError: 'a bug of this rank'" in ended[2].err
    assert re.search(rf"rank 2 on {host()}, step 3, phase 'data': KeyError: 'a bug of this rank'", ended[0].err)
    assert "Traceback" not in ended[0].err + ended[1].err


@pytest.mark.long
def test_an_error_that_all_share_is_no_alarm() -> None:
    ended, _ = watched("disagree", 1)
    assert [(rank.code, rank.err) for rank in ended] == [(2, "")] * 3, "each says it by itself"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.long
def test_a_rank_of_a_real_run_is_lost(victim: int, sent: signal.Signals, shards: Path, tmp_path: Path) -> None:
    """`megapix train` on two ranks; the signal comes in mid-step, once checkpoints are being written."""
    run = tmp_path / "run"
    seconds = 2 * SECONDS  # building an engine can hold the interpreter for a while
    options = ["--machine.watchdog", str(seconds), "--optim.end-at", "8000000", "--checkpoint.every", "80"]
    launch = Launch(2, "megapix", arguments(shards, run, *options))
    launch.wait_for((run / "checkpoints" / "latest").exists)
    at = time.time()
    launch.signal(sent, [victim])
    ended = end(launch, victim if sent == signal.SIGSTOP else None)
    other = ended[1 - victim]
    assert other.code == EXIT_LOST, other.err
    assert other.at - at < (seconds if sent == signal.SIGSTOP else 0.0) + SLACK
    assert re.search(rf"megapix: error: rank {victim} on {host()} is lost", other.err)
    assert re.search(rf"rank {victim} on {host()}: step \d+, \w+, \d\d:\d\d:\d\d, ", other.err)


def test_the_option_is_checked(shards: Path, tmp_path: Path) -> None:
    asked = config.replace(config.replace(SMALL, "data.path", str(shards)), "out", str(tmp_path / "run"))
    for value in (0.0, 2.0, 60.0):
        config.validate(config.replace(asked, "machine.watchdog", value))
    for value in (1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"machine\.watchdog = "):
            config.validate(config.replace(asked, "machine.watchdog", value))
    assert Config().machine.watchdog == 60.0


def test_a_rank_that_cannot_reach_rank_0_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed port instead of rank 0's; the gathering is played, the connection is real."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(watchdog, "gather", lambda world, value: [("first", free_port(), "token", SECONDS), value])
    monkeypatch.setattr(watchdog, "on_all_ranks", lambda world, work: work())
    with pytest.raises(InputError) as error, Watchdog(World(1, 2), SECONDS):
        pass
    assert "machine.watchdog = 3: rank 0 cannot be reached at 127.0.0.1:" in str(error.value)


def test_rank_0_is_reached_through_files_above_number_1023() -> None:
    """Which select() does not know: the process has opened as many before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("no right to open so many files")
    files = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        with doors.listen(2) as server, ThreadPoolExecutor() as pool:
            called = pool.submit(doors.reach, server.getsockname()[1], {"rank": 1}, SECONDS)
            caller = Link(server.accept()[0])
            caller.send(line({"welcome": 1}))
            link, answer = called.result()
            assert link.socket.fileno() > 1023
            assert answer == [{"welcome": 1}]
            link.socket.close()
            caller.socket.close()
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_open_files_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(
        InputError, match=r"the limit of open files is 1024: with 1024 ranks, rank 0 needs 1\d\d\d; expe"
    ):
        doors.listen(1024)


def test_many_ranks_beat_less_often_and_often_enough() -> None:
    assert [period(ranks, 60.0) for ranks in (2, 256, 512, 1024)] == [1.0, 1.0, 2.0, 4.0]
    assert period(100_000, 60.0) == 15.0
    assert period(2, 2.0) == 0.5


@pytest.mark.parametrize("moves", [True, False])
def test_a_word_older_than_the_others_moves_is_no_hang(moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a long wait of all for one, rank 0 is steps ahead before rank 1's next heartbeat says the same."""
    now, ended = time.monotonic(), []
    watch = Watchdog(World(0, 2), SECONDS)
    monkeypatch.setattr(watch, "_end", lambda reasons: ended.append(reasons[0]))
    watch._peers[1] = peer = Peer("nodeb", Word(3, "backward", 1, SECONDS, at=now - 100), now)
    watch.note(20, "data")
    for beat in range(4):
        watch._judge(now + beat * SECONDS / 4, beats=True)
        peer.heard += SECONDS / 4
        if moves:
            peer.word = Word(20 + beat, "data", 0, SECONDS, at=peer.heard)
    assert bool(ended) != moves
    assert all(reason.startswith("rank 1 on nodeb hangs: nothing new for 10") for reason in ended)


def test_words_say_how_far_a_rank_is() -> None:
    """Turns count phases within a step; the same phase again is no progress in order. The first step is long, and so is
    a phase the first time that it is seen after that."""
    watch = Watchdog(World(), SECONDS, {"data": 7.0})
    seen = []
    for step, phase in [
        *((4, "data"), (4, "step"), (4, "data"), (4, "sample"), (4, "sample")),
        *((5, "data"), (6, "data"), (6, "save"), (7, "step"), (8, "save"), (8, "step")),
    ]:
        watch.note(step, phase)
        seen.append((watch.notes.word.step, watch.notes.word.turn, watch.notes.word.patience))
    long, disk = SECONDS * PATIENCE, SLOW["save"]
    assert seen == [
        *((4, 0, long + 7.0), (4, 1, long), (4, 2, long + 7.0), (4, 3, long), (4, 3, long)),
        *((5, 0, long + 7.0), (6, 0, SECONDS + 7.0), (6, 1, disk), (7, 0, long), (8, 0, disk), (8, 1, SECONDS)),
    ]


def test_waiting_for_storage_is_news_where_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch = Watchdog(World(), SECONDS, {"data": 7.0})
    watch.notes.waiting = lambda: 1090.0
    for phase, expected in (("data", 10.0), ("step", 100.0)):
        now = 1000.0
        watch.note(4, phase)
        now = 1100.0
        assert now - watch.notes.spoken(now).at == expected


def test_news_of_a_phase_and_time_of_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that a background save writes are no news of a step. Compilation has seconds of its own, and takes none of
    those of the phase that it comes in, at any step; one that fails is where the error is of."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch = Watchdog(World(), SECONDS)

    def idle() -> float:
        return now - watch.notes.spoken(now).at

    watch.note(4, "save")
    now += 100.0
    assert idle() == 100.0
    watch.notes.news("save")
    now += 1.0
    assert idle() == 1.0
    watch.note(5, "backward")
    before = watch.notes.word
    now += 2.0
    watch.notes.news("save")
    assert idle() == 2.0
    watch.notes.compiling()
    assert watch.where() == (5, "compile")
    assert (watch.notes.word.turn, watch.notes.word.patience) == (before.turn, SLOW["compile"])
    now += 500.0
    assert idle() == 500.0
    watch.notes.compiled(failed=False)
    assert watch.where() == (5, "backward")
    assert (idle(), watch.notes.word.patience) == (2.0, before.patience)
    now += 3.0
    watch.notes.compiling()
    now += 50.0
    watch.note(5, "step")
    assert watch.notes._took["backward"] == 5.0
    watch.notes.compiling()
    watch.notes.compiled(failed=True)
    assert watch.where() == (5, "compile")
    watch.note(6, "data")
    assert watch.where() == (6, "data")


@pytest.mark.parametrize("compiles", [True, False])
def test_a_rank_that_waits_for_a_compiling_one_is_not_hung(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are in the same phase, whose patience is long over; one of them compiles there."""
    now, ended = time.monotonic(), []
    watch = Watchdog(World(0, 2), SECONDS)
    monkeypatch.setattr(watch, "_end", lambda reasons: ended.append(reasons[0]))
    watch.note(20, "backward")
    own = watch.notes.word
    watch.notes.word = replace(own, at=now - 1000)
    patience = SLOW["compile"] if compiles else own.patience
    watch._peers[1] = Peer("nodeb", replace(own, patience=patience, at=now - 900), now)
    for beat in range(4):
        watch._peers[1].heard = now + beat * SECONDS / 4
        watch._judge(now + beat * SECONDS / 4, beats=True)
    assert bool(ended) != compiles


def test_a_phase_may_take_three_times_what_it_took_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's, which compiles, do not count, nor later ones, nor time in which the process was stopped."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch = Watchdog(World(), SECONDS)
    for step, stopped, took in ((1, 0.0, 50.0), (2, 80.0, 5.0), (2, 0.0, 9.0), (3, 0.0, 0.0)):
        watch.note(step, "backward")
        watch.notes.resumed = now = now + stopped
        now += took
        watch.note(step, "step")
    watch.note(4, "backward")
    assert watch.notes.word.patience == USUAL * 5.0
    watch.note(4, "step")
    assert watch.notes.word.patience == SECONDS
    watch.note(4, "sample", begins=True)
    assert watch.notes.word.patience == SECONDS * PATIENCE
    now += 1.0
    watch.note(4, "sample")
    assert watch.notes.word.patience == SECONDS * PATIENCE, "the first step of the sampler may compile"
    now += 7.0
    watch.note(4, "sample")
    assert watch.notes.word.patience == USUAL * 7.0
