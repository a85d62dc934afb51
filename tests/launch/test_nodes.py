"""Runs on two hosts in network namespaces: all ways to start them, a cut link, a killed rank, and going on after it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megapix.checkpoint.folder import latest
from megapix.checkpoint.manifest import read_state
from megapix.resilience.stopping import EXIT_STOPPED
from megapix.resilience.watchdog import EXIT_LOST
from tests.support.hosts import MARKS, Host, hosts
from tests.support.launch import ROOT
from tests.support.small_run import arguments, scalars

pytestmark = [pytest.mark.long, *MARKS]

SECONDS = 10.0
"""The watchdog's, in these tests."""
SLACK = 20.0
"""Seconds of a loaded machine between a limit and the end of the ranks."""
SSH_GIVES_UP = 20.0
"""Seconds after which launch.sh's ssh has given a dead host up."""
LEFT = 1
"""Ranks on the one host that is left; the checkpoint is of two."""
LONG = ["--optim.end-at", "8000000", "--checkpoint.every", "80"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with hosts(["nodea", "nodeb"], tmp_path_factory.mktemp("hosts")) as found:
        yield found


def command(shards: Path, run: Path, *overrides: str) -> list[str]:
    """The small run's arguments for launch.sh."""
    return arguments(shards, run, "--machine.watchdog", str(SECONDS), *overrides)[1:]


def by_ssh(tmp_path: Path) -> list[str | Path]:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# two hosts, a rank on each\nnodea slots=1\nnodeb slots=1\n")
    return [ROOT / "launch.sh", "--hostfile", hostfile]


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        found.append((process.returncode, out, err))
    return found


def images_seen(run: Path) -> int:
    folder = latest(run)
    assert folder
    return read_state(folder).counters.images_seen


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    while not (run / "checkpoints" / "latest").exists():
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
            pytest.fail(process.communicate()[1])


def rank_process(run: Path, rank: int) -> psutil.Process:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = process.cmdline()
            if (
                str(run) in line
                and "deepspeed.launcher.launch" not in line
                and process.environ().get("RANK") == str(rank)
            ):
                return process
    raise AssertionError(f"no process of rank {rank}")


SECRETS = {
    "HF_TOKEN": 'hf_of a "test" with $HOME',
    "AWS_SECRET_ACCESS_KEY": "aws/of+a\\test",
    "https_proxy": "http://me:password-of-a-test@proxy:3128",
}
HANDED = SECRETS | {"TRITON_CACHE_DIR": "/tmp/triton of a test", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}
TOLD = """
import atexit, json, os, pathlib, sys
if "RANK" in os.environ:
    def tell():
        found = {name: os.environ.get(name) for name in NAMES}
        pathlib.Path(FOLDER, os.environ["RANK"] + os.environ["LOCAL_RANK"]).write_text(json.dumps(found))
    atexit.register(tell)
"""


def command_lines() -> str:
    """Of every process that there is now, on all hosts."""
    lines = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines += path.read_bytes() + b"\n"
    return lines.decode(errors="replace")


def test_a_hostfile_trains_saves_and_resumes_and_secrets_are_on_no_command_line(
    pair: list[Host], shards: Path, tmp_path: Path
) -> None:
    """Two ranks on the first host and one on the second, ended by SIGTERM and started again; every process is looked at
    as long as launch.sh lives."""
    told, run = tmp_path / "told", tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(
        TOLD.replace("NAMES", repr([*HANDED])).replace("FOLDER", repr(str(told)))
    )
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("nodea slots=2\nnodeb slots=1\n")
    before = set(Path("/dev/shm").glob("megapix-environment-*"))
    steps = ["--optim.global-batch", "9", "--machine.micro-batch", "3", "--log.every", "9"]

    def launched(code: int, *options: str) -> str:
        """Wait for this end of launch.sh, which gets SIGTERM if that is to be 75; returns what it has printed."""
        shutil.rmtree(told, ignore_errors=True)
        told.mkdir()
        train = [ROOT / "launch.sh", "--hostfile", hostfile, *command(shards, run, *steps, *options)]
        process = pair[0].popen(train, **HANDED, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
        seen, asked = "", code != EXIT_STOPPED
        while process.poll() is None:
            seen += command_lines()
            if not asked and (run / "checkpoints" / "latest").exists():
                launcher = next(
                    p for p in psutil.Process(process.pid).children(True) if "megapix launch" in " ".join(p.cmdline())
                )
                launcher.send_signal(signal.SIGTERM)
                asked = True
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        ((ended, out, err),) = finish(process)
        assert ended == code, err
        assert "x ranks 3" in out
        assert "deepspeed.launcher.launch" in seen
        assert "MEGAPIX_ENVIRONMENT=/dev/shm/megapix-environment-" in seen, "the way to the file is no secret"
        logs = "".join(path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())
        for secret in ("hf_of a", "aws/of+a", "password-of-a-test"):
            assert secret not in seen
            assert secret not in out + err + logs
        assert set(Path("/dev/shm").glob("megapix-environment-*")) <= before
        return out

    launched(EXIT_STOPPED, "--optim.end-at", "9000000", "--checkpoint.every", "80")
    stopped = images_seen(run)
    out = launched(0, "--optim.end-at", str(stopped + 36))
    assert [json.loads(path.read_text()) for path in sorted(told.iterdir())] == [HANDED] * 3
    assert f"resuming from {run}/checkpoints/images-{stopped:012d}" in out
    assert images_seen(run) == stopped + 36
    assert list(scalars(run, "loss/train")) == list(range(1, stopped // 9 + 5))


def test_the_doctor_examines_both_hosts(pair: list[Host], shards: Path, tmp_path: Path) -> None:
    hostfile = by_ssh(tmp_path)
    ((code, out, err),) = finish(pair[0].popen([*hostfile, "doctor", *command(shards, tmp_path / "run")]))
    assert code == 0, out + err
    assert "2 ranks met at" in out
    assert "nothing found that would stop this run" in out or "look at the warnings" in out
    assert not (tmp_path / "run").exists()


def test_bad_input_comes_through_with_its_code(pair: list[Host], shards: Path, tmp_path: Path) -> None:
    """Found on the nodes only: they hold other data than the first one has checked."""
    bad = command(shards, tmp_path / "run", "--optim.global-batch", "9")
    ((code, _, err),) = finish(pair[0].popen([*by_ssh(tmp_path), *bad]))
    assert code == 2
    assert err.count("\n") == 1
    assert "optim.global_batch = 9" in err


def test_a_cut_link_then_a_killed_rank_then_one_host(pair: list[Host], shards: Path, tmp_path: Path) -> None:
    first, second = pair
    run = tmp_path / "run"

    process = first.popen([*by_ssh(tmp_path), *command(shards, run, *LONG)])
    wait_for_checkpoint(run, process)
    far = rank_process(run, 1)
    second.link("down")
    cut = time.monotonic()
    try:
        far.wait(timeout=SECONDS + SLACK)  # the far side ends by itself, though nobody can reach it
        ((code, _, err),) = finish(process)
        assert code == EXIT_LOST, err
        assert time.monotonic() - cut < max(SECONDS, SSH_GIVES_UP) + SLACK
        assert re.search(r"megapix: error: rank 1 on nodeb is lost: no heartbeat for \d+\.\d s", err)
        assert re.search(r"rank 0 on nodea: step \d+, \w+, \d\d:\d\d:\d\d, \d+\.\d s ago", err)
        assert re.search(r"rank 1 on nodeb: step \d+, \w+, \d\d:\d\d:\d\d, \d+\.\d s ago", err)
    finally:
        second.link("up")

    saved = images_seen(run)
    process = first.popen([*by_ssh(tmp_path), *command(shards, run, *LONG)])
    latest = run / "checkpoints" / "latest"
    before = latest.read_text()
    while latest.read_text() == before:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
            pytest.fail(process.communicate()[1])
    rank_process(run, 1).kill()
    killed = time.monotonic()
    ((code, out, err),) = finish(process)
    assert code == EXIT_LOST, err
    assert time.monotonic() - killed < SLACK
    assert re.search(r"resuming from \S+ at [\d,]+ images seen", out)
    assert "megapix: error: rank 1 on nodeb is lost: its process ended without a goodbye" in err

    assert images_seen(run) > saved
    end = images_seen(run) + 80
    alone = first.popen(
        [ROOT / "launch.sh", "--ranks", str(LEFT), *command(shards, run, *LONG, "--optim.end-at", str(end))]
    )
    ((code, out, err),) = finish(alone)
    assert code == 0, err
    assert f"x ranks {LEFT}" in out
    assert images_seen(run) == end


def test_a_stopped_rank_of_another_host_is_ended_too(pair: list[Host], shards: Path, tmp_path: Path) -> None:
    """Its launcher waits for it and ssh for the launcher: launch.sh has to end them on that host."""
    run = tmp_path / "run"
    process = pair[0].popen([*by_ssh(tmp_path), *command(shards, run, *LONG)])
    wait_for_checkpoint(run, process)
    stopped = rank_process(run, 1)
    stopped.suspend()
    ((code, _, err),) = finish(process)
    assert code == EXIT_LOST, err
    assert re.search(r"megapix: error: rank 1 on nodeb is lost: no heartbeat for \d+\.\d s", err)
    assert "launch.sh: error: ranks of other nodes have not ended: ending them" in err
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE


def test_without_ssh(pair: list[Host], shards: Path, tmp_path: Path) -> None:
    """The same command on each host, but for its number."""
    run = tmp_path / "run"
    start = [ROOT / "launch.sh", "--no-ssh", "--nnodes", "2", "--ranks", "1", "--master-addr", pair[0].address]
    ended = finish(
        *(host.popen([*start, "--node-rank", str(n), *command(shards, run, "--optim.end-at", "16")])
          for n, host in enumerate(pair))
    )  # fmt: skip
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "x ranks 2" in ended[0][1]
    assert images_seen(run) == 16


def test_torchrun(pair: list[Host], shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    start += ["--master-addr", pair[0].address, "--master-port", "29511"]
    train = ["-m", "megapix", "train", *command(shards, run, "--optim.end-at", "16")]
    ended = finish(*(host.popen([*start, "--node-rank", str(n), *train]) for n, host in enumerate(pair)))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "x ranks 2" in ended[0][1]
    assert images_seen(run) == 16


@pytest.mark.parametrize("lost", [False, True])
def test_under_srun(lost: bool, pair: list[Host], shards: Path, tmp_path: Path) -> None:
    """A stand-in for srun: tasks on each host, with the environment that SLURM gives a step's tasks."""
    run, tasks, here = tmp_path / "run", [], 2 if lost else 1
    options = LONG if lost else ["--optim.end-at", "16"]
    for task in range(2 * here):
        slurm = {
            "SLURM_JOB_ID": "4711",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(2 * here),
            "SLURM_STEP_NODELIST": "nodea,nodeb",
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task % here),
            "SLURM_CPUS_PER_TASK": "1",
        }
        tasks.append(pair[task // here].popen([ROOT / "launch.sh", *command(shards, run, *options)], **slurm))
    if lost:
        wait_for_checkpoint(run, tasks[0])
        rank_process(run, 3).kill()
        ended = finish(*tasks)
        assert [code for code, _, _ in ended[:3]] == [EXIT_LOST] * 3
        assert "rank 3 on nodeb is lost" in ended[0][2]
        assert "is lost" not in ended[1][2], "rank 0 of this host has said it"
        assert "rank 3 on nodeb is lost: its process ended without a goodbye (rank 0 is on nodea)" in ended[2][2]
    else:
        ended = finish(*tasks)
        assert [code for code, _, _ in ended] == [0] * 2, ended
        assert "x ranks 2" in ended[0][1]
        assert images_seen(run) == 16
