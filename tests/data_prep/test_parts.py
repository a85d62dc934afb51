"""One output by several machines: any order of its parts, any part killed, the same bytes as of one machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import cli
from data_prep.parts import lease as leases
from data_prep.parts.lease import lease
from data_prep.parts.part import Part, parse_part
from megapix.errors import InputError
from megapix.files import write_new
from tests.data_prep.test_write import hashes
from tests.support.foreign_shards import make

WRITE = ("--size", 16, "--samples-per-shard", 3, "--workers", 1)
INDEX = ("--size", 16, "--workers", 1)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: one line, without a traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and "%|" not in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 images of three shapes in three class folders; one of them is no image, and two are the same."""
    folder, generator = tmp_path_factory.mktemp("drawn"), np.random.default_rng(3)
    for number in range(37):
        height, width = ((24, 24), (20, 30), (34, 18))[number % 3]
        path = folder / f"class {number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (height, width, 3), np.uint8)).save(path)
    (folder / "class 1" / "damaged.png").write_bytes(b"no image")
    shutil.copyfile(folder / "class 0" / "00.png", folder / "class 0" / "00-again.png")
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven tar files, one of them damaged."""
    folder = tmp_path_factory.mktemp("foreign")
    make(folder, 7)
    (folder / "00004.tar").write_bytes(b"<html>not found</html>")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--max-rejected", 0.1),
        ("--max-rejected", 0.1, "--policy", "buckets", "--bucket-step", 8, "--bucket-min", 4, "--dedupe", "exact"),
        ("--max-rejected", 0.1, "--hold-out", 0.3),
    ],
    ids=["plain", "surveys", "held out"],
)
def test_shards_written_in_parts(options: tuple[object, ...], drawn: Path, tmp_path: Path) -> None:
    command = ("write", drawn, "OUT", *WRITE, *options)
    one, parts = tmp_path / "one", tmp_path / "parts"
    assert run(*command[:2], one / "out", *command[3:]) == 0
    for number in (2, 0, 1):
        assert not (parts / "out" / "index.json").exists()
        assert run(*command[:2], parts / "out", *command[3:], "--part", f"{number}/3") == 0
    assert hashes(parts) == hashes(one)
    assert run(*command[:2], parts / "out", *command[3:], "--part", "1/3") == 0, "a part that comes late"
    assert hashes(parts) == hashes(one)


@pytest.mark.parametrize("options", [(), ("--dedupe", "exact", "--hold-out", 0.3)], ids=["plain", "held out"])
def test_an_index_made_in_parts(options: tuple[object, ...], foreign: Path, tmp_path: Path) -> None:
    one, parts = tmp_path / "one", tmp_path / "parts"
    command = ("index", foreign, *INDEX, "--max-rejected-tars", 0.2, *options, "--out")
    assert run(*command, one / "out") == 0
    for number in (2, 0, 1):
        assert run(*command, parts / "out", "--part", f"{number}/3") == 0
    assert hashes(parts) == hashes(one)


def test_a_set_that_has_grown_is_indexed_in_parts(tmp_path: Path) -> None:
    make(tmp_path / "tars", 3)
    for out in ("one", "parts"):
        assert run("index", tmp_path / "tars", *INDEX, "--out", tmp_path / out) == 0
    make(tmp_path / "more", 5)
    for name in ("00003.tar", "00004.tar"):
        shutil.copyfile(tmp_path / "more" / name, tmp_path / "tars" / name)
    assert run("index", tmp_path / "tars", *INDEX, "--out", tmp_path / "one") == 0
    for number in (1, 0):
        assert run("index", tmp_path / "tars", *INDEX, "--out", tmp_path / "parts", "--part", f"{number}/2") == 0
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "one")
    assert list((tmp_path / "parts" / "versions").iterdir())


def test_finish_says_what_is_missing_and_puts_together_what_was_left(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("write", drawn, tmp_path / "out", *WRITE, "--max-rejected", 0.1)
    assert run("finish", tmp_path / "out") == 2
    assert "no parts are at work" in said(capsys)
    assert run(*command, "--part", "1/4") == 0
    assert "not yet 0, 2, 3 of 4" in capsys.readouterr().out
    assert run("finish", tmp_path / "out") == 2
    assert "parts 0, 2, 3 of 4 are missing" in (line := said(capsys))
    assert "--part 0/4" in line
    for number in (0, 2):
        assert run(*command, "--part", f"{number}/4") == 0
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.writing.write.finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*command, "--part", "3/4")
    assert run("finish", tmp_path / "out") == 0
    shutil.move(tmp_path / "out", tmp_path / "parts")
    assert run(*command) == 0
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "out")
    assert run("finish", tmp_path / "out") == 2


def test_budgets_are_of_all_parts(
    drawn: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No part of the index rejects too many alone; together they do."""
    theirs = Path(shutil.copytree(foreign, tmp_path / "theirs"))
    (theirs / "00005.tar").write_bytes(b"")
    command = ("index", theirs, *INDEX, "--out", tmp_path / "index", "--max-rejected-tars", 0.2)
    assert [run(*command, "--part", f"{number}/2") for number in (0, 1)] == [0, 2]
    assert "2 of 7 tar files cannot be used" in capsys.readouterr().err
    assert run("finish", tmp_path / "index") == 2
    assert "2 of 7 tar files cannot be used" in said(capsys)


@pytest.mark.parametrize(
    ("first", "second", "line"),
    [
        (("--part", "1/3"), ("--part", "2/4"), "is being made in 3 parts, this is part 2/4; expected --part I/3"),
        (("--part", "1/3"), (), "is being made in 3 parts; give one of them"),
        (("--part", "1/3"), ("--part", "2/3", "--seed", 5), "was begun with seed = 0, this command has 5"),
        (
            ("--part", "1/3"),
            ("--part", "0/3", "--max-rejected", 0.2),
            "have --max-rejected 0.1, part 0/3 has 0.2",
        ),
        ((), ("--part", "3/3"), "--part = '3/3': expected I/N with I from 0 to N - 1"),
        ((), ("--part", "-1/3"), "--part = '-1/3': expected I/N"),
        ((), ("--part", "one/3"), "--part = 'one/3': expected I/N"),
        ((), ("--part", "0/0"), "--part = '0/0': expected I/N"),
        ((), ("--part", "auto"), "neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set"),
        ((), ("--part", "1/3", "--retry-rejected"), "--part 1/3: expected without --retry-rejected"),
        ((), ("--part", "1/3", "--dry-run"), "--part 1/3: expected without --dry-run"),
    ],
)
def test_bad_parts_are_one_line(
    first: tuple[object, ...],
    second: tuple[object, ...],
    line: str,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    command = ("write", drawn, tmp_path / "out", *WRITE, "--max-rejected", 0.1)
    if first:
        assert run(*command, *first) == 0
        capsys.readouterr()
    assert run(*command, *second) == 2
    assert line in said(capsys)


def test_machines_that_see_other_files(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = Path(shutil.copytree(foreign, tmp_path / "theirs"))
    command = ("index", theirs, *INDEX, "--out", tmp_path / "index", "--max-rejected-tars", 0.2, "--part")
    assert run(*command, "0/2") == 0
    (theirs / "00006.tar").unlink()
    capsys.readouterr()
    assert run(*command, "1/2") == 2
    assert "the parts do not see the same files: names = '00006.tar' elsewhere, None for part 1/2" in said(capsys)


@pytest.mark.parametrize(
    ("option", "environment", "part"),
    [
        ("", {}, Part(0, 1)),
        ("2/7", {"SLURM_ARRAY_TASK_ID": "5"}, Part(2, 7)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, Part(2, 4)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "9",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_STEP": "4",
            },
            Part(2, 3),
        ),
        (
            "auto/7",
            {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "6", "SLURM_ARRAY_TASK_COUNT": "1"},
            Part(6, 7),
        ),
        ("auto/7", {"JOB_COMPLETION_INDEX": "0"}, Part(0, 7)),
    ],
)
def test_the_part_is_the_schedulers(option: str, environment: dict[str, str], part: Part) -> None:
    assert parse_part(option, environment) == part


@pytest.mark.parametrize(
    ("option", "environment", "line"),
    [
        (
            "auto",
            {"JOB_COMPLETION_INDEX": "2"},
            "JOB_COMPLETION_INDEX = 2 does not say of how many; give --part",
        ),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}, "--part = 'auto/2' (2/2): expected I/N"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "5"}, "is no range of tasks; give --part auto/N"),
        (
            "auto",  # --array=1,3,7
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"},
            "is no range of tasks; give --part auto/N",
        ),
    ],
)
def test_a_scheduler_that_does_not_say(option: str, environment: dict[str, str], line: str) -> None:
    with pytest.raises(InputError, match=line.replace("(", r"\(").replace(")", r"\)")):
        parse_part(option, environment)


def test_jobs_are_shared_out() -> None:
    jobs = list(range(23))
    shares = [list(Part(number, 5).mine(jobs)) for number in range(5)]
    assert sorted(job for share in shares for job in share) == jobs
    for number, share in enumerate(shares):
        order = Part(number, 5).mine_first(23)
        assert order[: len(share)] == share
        assert sorted(order) == jobs


# ---------------------------------------------------------------------------------------------------------------------
# What parts agree by
# ---------------------------------------------------------------------------------------------------------------------


def test_one_of_many_creates_a_file(tmp_path: Path) -> None:
    """Whole at once, whoever looks; also where there are no hard links."""
    for round_ in range(20):
        path, made, ready = tmp_path / f"{round_}.json", list[int](), threading.Barrier(8)

        def create(number: int, path: Path = path, made: list[int] = made, ready: threading.Barrier = ready) -> None:
            ready.wait()
            if write_new(path, b"%d" % number * 999):
                made.append(number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert path.read_bytes() == b"%d" % made[0] * 999
    assert not list(tmp_path.glob(".*"))


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert [write_new(tmp_path / "file", data) for data in (b"first", b"second")] == [True, False]
    assert (tmp_path / "file").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    with lease(tmp_path / "lock") as holder, lease(tmp_path / "lock") as other:
        assert not holder
        assert other == f"process {os.getpid()} of {socket.gethostname()}"
    with lease(tmp_path / "lock") as holder:
        assert not holder


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine at once; of another one when it renews nothing."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    for pid in (ended.pid, os.getpid()):  # also a container that was started again
        (tmp_path / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid, "token": "it"}))
        with lease(tmp_path / "lock") as holder:
            assert not holder
    monkeypatch.setattr(leases, "STALE", 0.5)
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "it"}))
    with lease(tmp_path / "lock") as holder:
        assert holder == "process 7 of elsewhere"
    with lease(tmp_path / "lock", patience=9) as holder:
        assert not holder
    assert not (tmp_path / "lock").exists()


def test_a_live_lock_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who watches it for longer than a dead one has, does not take it."""
    monkeypatch.setattr(leases, "RENEWED", 0.05)
    monkeypatch.setattr(leases, "STALE", 0.6)
    with lease(tmp_path / "lock") as holder, lease(tmp_path / "lock", patience=1.5) as other:
        assert (holder, bool(other)) == ("", True)
