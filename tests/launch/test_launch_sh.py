"""launch.sh on several nodes: what it refuses, what it starts, which signals and codes it hands on.

DeepSpeed's launcher is played by a small script; tests/launch/test_nodes.py starts the real one on real hosts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tests.support.small_run import arguments

LAUNCHER = """#!/bin/sh
case "$*" in
  *deepspeed.launcher*) {played} ;;
  *"megapix train"*--dry-run) if [ "$checked" = false ]; then echo '{{"out": "run"}}'; else exec "{python}" "$@"; fi ;;
  *"megapix train"*) echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, at $MASTER_ADDR:$MASTER_PORT" ;;
  *) exec "{python}" "$@" ;;
esac
"""


def start(
    folder: Path, played: str, *options: str | Path, script: Path = ROOT / "launch.sh", **environment: str
) -> subprocess.Popen[str]:
    """launch.sh, with `played` as DeepSpeed's launcher; `folder`/bin comes first on the PATH."""
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(LAUNCHER.format(played=played, python=sys.executable))
    python.chmod(0o755)
    path = os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        [script, *options],
        env=os.environ | {"PYTHON": str(python), "PATH": path} | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_signals,
    )


def _heed_signals() -> None:
    """A test run in the background, or under nohup, ignores these, and so would its children."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def train(shards: Path, tmp_path: Path) -> list[str]:
    return arguments(shards, tmp_path / "run")[1:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-ssh"], "--node-rank = '': --no-ssh expects this node's number, from 0"),
        (["--no-ssh", "--node-rank", "0"], "--no-ssh expects --master-addr"),
        (["--no-ssh", "--node-rank=0", "--master-addr=a"], "--no-ssh expects --nnodes or --hostfile"),
        (["--no-ssh", "--node-rank=2", "--master-addr=a", "--nnodes=2"], "--node-rank = 2: there are 2 nodes"),
        (["--nnodes", "2"], "--node-rank and --nnodes go with --no-ssh"),
        (["--hostfile", "none"], "--hostfile none: cannot be read"),
        (["--hostfile", "none", "--ranks", "2"], "expected no --nnodes or --ranks"),
        (["--hostfile"], "--hostfile needs a value"),
    ],
)
def test_options_of_nodes_are_checked(options: list[str], words: str, tmp_path: Path) -> None:
    code, _, err = finish(start(tmp_path, "exit 9", "tiny", *options))
    assert code == 2
    assert words in err
    assert err.startswith("launch.sh: error: ")
    assert err.count("\n") == 1


def test_a_line_of_the_hostfile_is_named(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node01 slots=8\n\n# two\nnode02 8\n")
    code, _, err = finish(start(tmp_path, "exit 9", "--hostfile", hostfile, "tiny"))
    assert code == 2
    assert f"--hostfile {hostfile}: line 'node02 8': expected 'HOST slots=RANKS'" in err


def play_pdsh(folder: Path, played: str) -> None:
    """A script as pdsh, for `start`."""
    program = folder / "bin" / "pdsh"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{played}\n")
    program.chmod(0o755)


@pytest.mark.optional_programs  # pdsh, which is played
def test_what_deepspeeds_launcher_is_asked(train: list[str], tmp_path: Path) -> None:
    play_pdsh(tmp_path, "exit 9")  # launch.sh only looks whether it is there
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node01 slots=2\nnode02 slots=2\n")
    ours = {"GLOO_SOCKET_IFNAME": "eth7", "MASTER_PORT": "4242"}
    code, out, err = finish(
        start(
            tmp_path, 'echo "$@"; cat "$DS_ENV_FILE"', "--hostfile", hostfile, "--master-addr=10.0.0.1", *train, **ours
        )
    )
    assert code == 0, err
    assert f"--hostfile {hostfile} --force_multi --master_addr 10.0.0.1 --master_port 4242 " in out
    assert {"GLOO_SOCKET_IFNAME=eth7", "DS_ACCELERATOR=cpu"} <= set(out.splitlines())
    (tmp_path / ".deepspeed_env").write_text("# nothing yet\n")
    odd = ["--data.path", "https://here/x?a=1&b=(2)", "--init", ""]
    command = ["--hostfile", hostfile, "tiny", "--out", tmp_path / "run", *odd]
    code, out, err = finish(start(tmp_path, 'echo "$@"', *command, HOME=str(tmp_path), checked="false"))
    assert code == 0, err
    assert r"--data.path https://here/x\?a=1\&b=\(2\) --init ''" in out, "shells on the nodes read them"
    without_ssh = ["--no-ssh", "--nnodes", "2", "--ranks", "2", "--node-rank", "1", "--master-addr", "10.0.0.1"]
    code, out, err = finish(start(tmp_path, 'echo "$@"; cat "$6"', *without_ssh, *train))
    assert code == 0, err
    assert " --no_ssh --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 " in out
    assert out.endswith("node-0 slots=2\nnode-1 slots=2\n")


def test_doctor_and_evaluate_are_handed_on(tmp_path: Path) -> None:
    for command in (["doctor", "--parity"], ["evaluate", "net.safetensors", "--reference", "stats.npz"]):
        code, out, err = finish(start(tmp_path, 'echo "$@"', "--ranks", "2", *command))
        assert code == 0, err
        assert out.endswith(f" --module megapix {' '.join(command)}\n")


@pytest.mark.parametrize(
    ("nodes", "first"), [("node[03-07,12],x9", "node03"), ("alpha,beta", "alpha"), ("gpu-a[1,4]", "gpu-a1")]
)
def test_under_srun_a_task_is_a_rank(nodes: str, first: str, train: list[str], tmp_path: Path) -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": nodes}
    slurm |= {"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"}
    code, out, _ = finish(start(tmp_path, "exit 9", *train, **slurm))
    assert (code, out) == (0, f"rank 5 of 8, local 1, at {first}:23458\n")


@pytest.mark.parametrize(("played", "code"), [(0, 0), (1, 1), (2, 2), (75, 75), (69, 69), (247, 69), (255, 69)])
def test_the_ranks_code_comes_through(played: int, code: int, train: list[str], tmp_path: Path) -> None:
    """247 is how DeepSpeed's launcher ends when a rank of it was killed, 255 what ssh says of a lost host."""
    assert finish(start(tmp_path, f"exit {played}", *train))[0] == code


@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.long) for s in (signal.SIGUSR1, signal.SIGHUP))]
)
def test_a_signal_becomes_a_stop_file(sent: signal.Signals, train: list[str], tmp_path: Path) -> None:
    stop = tmp_path / "run" / "stop"
    process = start(tmp_path, f"echo up; until [ -e {stop} ]; do sleep 0.1; done; exit 75", *train)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    process.send_signal(sent)
    code, _, err = finish(process)
    assert code == 75
    assert "asking the run to save and end" in err
    assert not stop.exists(), "the next run must not stop at once"


def test_a_hang_up_takes_the_terminal_with_it(train: list[str], tmp_path: Path) -> None:
    """Nothing can be said any more, and the run is asked to save all the same."""
    mute, stop = tmp_path / "mute", tmp_path / "run" / "stop"
    mute.write_text(f'#!/bin/sh\nexec {ROOT}/launch.sh "$@" 2>/dev/full\n')
    mute.chmod(0o755)
    process = start(tmp_path, f"echo up; until [ -e {stop} ]; do sleep 0.1; done; exit 75", *train, script=mute)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGHUP)
    assert finish(process)[0] == 75


@pytest.mark.parametrize("sent", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_int_or_a_second_signal_ends_at_once(sent: list[signal.Signals], train: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, "echo up; exec sleep 100", *train)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "up\n"
    for number, each in enumerate(sent):
        process.send_signal(each)
        if number < len(sent) - 1:
            assert "asking the run" in process.stderr.readline()
    code, _, err = finish(process)
    assert code == 130
    assert "ending the ranks" in err
    assert not (tmp_path / "run" / "stop").exists()


@pytest.mark.optional_programs
def test_lost_nodes_are_given_up(train: list[str], tmp_path: Path) -> None:
    """One node is done, the other never: pdsh says so, and waits. The patience is shortened in a copy of the script."""
    play_pdsh(tmp_path, f'echo "$@" >{tmp_path}/asked')
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node01 slots=1\nnode02 slots=1\n")
    copy = tmp_path / "launch.sh"
    text = (ROOT / "launch.sh").read_text()
    assert "\npatience=40 " in text
    copy.write_text(text.replace("\npatience=40 ", "\npatience=1 "))
    copy.chmod(0o755)
    played = 'echo "pdsh@here: node01: ssh exited with exit code 69" >&2; exec sleep 100'
    process = start(tmp_path, played, "--hostfile", hostfile, *train, script=copy, MASTER_PORT="4242")
    code, _, err = finish(process)
    assert code == 69
    assert "pdsh@here: node01: ssh exited with exit code 69" in err
    assert "ranks of other nodes have not ended: ending them" in err
    asked = (tmp_path / "asked").read_text()
    assert "-w node01,node02" in asked
    assert "--master_port=4242 " in asked
