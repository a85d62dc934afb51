"""launch.sh on several nodes: what it refuses, what it starts, which signals and codes it hands on.

DeepSpeed's launcher is played by a small script; tests/launch/test_nodes.py starts the real one on real hosts.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tests.support.played_launcher import HERE, NODES, finish, play, start


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


def files_in_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("megapix-environment-*"))


@pytest.mark.optional_programs  # pdsh, which is played
def test_what_deepspeeds_launcher_is_asked(train: list[str], tmp_path: Path) -> None:
    play(tmp_path, pdsh="exit 9", ssh=HERE.format(folder=tmp_path))  # of pdsh it only looks whether it is there
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node01 slots=2\nnode02 slots=2\n")
    ours = {"GLOO_SOCKET_IFNAME": "eth7", "MASTER_PORT": "4242", "checked": str(tmp_path / "run")}
    code, out, err = finish(
        start(
            tmp_path,
            'echo "$@"; cat "$DS_ENV_FILE"; env',
            "--hostfile",
            hostfile,
            "--master-addr=10.0.0.1",
            *train,
            **ours,
        )
    )
    assert code == 0, err
    assert " --force_multi --master_addr 10.0.0.1 --master_port 4242 " in out
    assert "DS_ACCELERATOR=cpu" in out.splitlines()
    assert "PDSH_RCMD_TYPE=ssh" in out.splitlines()
    assert "-o ServerAliveInterval=5 -o ServerAliveCountMax=3" in out.partition("PDSH_SSH_ARGS_APPEND=")[2]
    without_ssh = ["--no-ssh", "--nnodes", "2", "--ranks", "2", "--node-rank", "1", "--master-addr", "10.0.0.1"]
    code, out, err = finish(
        start(tmp_path, 'echo "$@ $HF_TOKEN"; cat "$6"', *without_ssh, *train, HF_TOKEN="a token", checked="run")
    )
    assert code == 0, err
    assert " --no_ssh --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 " in out
    assert out.endswith(" a token\nnode-0 slots=2\nnode-1 slots=2\n")


RANKS = """
base=$(sed -n s/^MEGAPIX_ENVIRONMENT=//p "$DS_ENV_FILE")
stat -c "%a %U" $base.0 $base.2 >&2
cp "$DS_ENV_FILE" {folder}/exported
env >{folder}/runner
for RANK in 0 1 2; do
  env -i RANK=$RANK HF_TOKEN=of-the-node MEGAPIX_ENVIRONMENT=$base {python} -c '
import json, os
from megapix.cli.environment import take_over
take_over()
print(json.dumps([dict(os.environ)]))'
  ls $base.* >&2 || :
done
"""
"""DeepSpeed's launcher, starting two ranks on one node and one on another with what its nodes have got."""
ODD = {
    "HF_TOKEN": "hf_ $HOME `id` \\n \\\\ \"double\" 'single' %n end ",
    "AWS_SECRET_ACCESS_KEY": "first line\nsecond line\n",
    "https_proxy": "http://me:pa$$word@proxy:3128",
    "NO_PROXY": "",
    "AWS_PROFILE": "\udcff is no UTF-8",
    "PYTORCH_ALLOC_CONF": "expandable_segments:False",
    "TRITON_CACHE_DIR": "/tmp/a folder",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "TORCH_LOGS": "recompiles",
    "MLFLOW_TRACKING_PASSWORD": "of-mlflow",
    "PYTHON_KEYRING_TOKEN": "of-a-keyring",
    "NCCL_DEBUG": "INFO",
    "CC": "gcc",
}


@pytest.mark.optional_programs  # pdsh and ssh, which are played
def test_every_rank_gets_the_environment_as_it_is(tmp_path: Path) -> None:
    """Through the stdin of ssh, and never in a command line, where DeepSpeed puts what it is told to and some more."""
    play(tmp_path, pdsh="exit 9", ssh=HERE.format(folder=tmp_path))
    (tmp_path / "hostfile").write_text(NODES)
    theirs = "# mine\nexport none\nNCCL_ALGO=Ring\nHF_HOME=$HOME/hf\nWANDB_API_KEY=a$b c\nNCCL_DEBUG=WARN\nODD=a=b"
    (tmp_path / ".deepspeed_env").write_text(theirs)
    others = {"CUDA_VISIBLE_DEVICES": "", "EDITOR": "vi", "TORCHELASTIC_RUN_ID": "1", "PYTHONWARNINGS": "ignore"}
    before = files_in_memory()
    played = RANKS.format(folder=tmp_path, python=sys.executable)
    environment = ODD | others | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "checked": "run"}
    code, out, err = finish(start(tmp_path, played, "--hostfile", tmp_path / "hostfile", "tiny", **environment))
    assert code == 0, err
    ranks = [json.loads(line)[0] for line in out.splitlines() if line.startswith("[")]
    assert len(ranks) == 3
    for rank, found in enumerate(ranks):
        assert found.pop("RANK") == str(rank)
        assert {name: found.get(name) for name in ODD} == ODD | {"NCCL_DEBUG": None}, "the user's file exports that one"
        assert found["WANDB_API_KEY"] == "a$b c"
        assert not found.keys() & {*others, "NCCL_ALGO", "HF_HOME", "MEGAPIX_ENVIRONMENT"}
    me = Path(tmp_path).owner()
    assert err.splitlines()[:2] == [f"600 {me}"] * 2
    exported = (tmp_path / "exported").read_text().splitlines()
    assert {"NCCL_ALGO=Ring", "HF_HOME=$HOME/hf", "NCCL_DEBUG=WARN", "ODD=a=b"} <= set(exported)
    runner = (tmp_path / "runner").read_text(errors="surrogateescape")
    commands = (tmp_path / "ssh.log").read_text()
    assert commands.count("umask 077") == 2
    assert " node01 exec sh -c " in commands
    assert " node02 exec sh -c " in commands
    for secret in ("hf_", "second line", "pa$$word", "of-mlflow", "of-a-keyring", "a$b c"):
        assert secret not in "\n".join([*exported, commands, out.partition("[")[0], err]), secret
    by_itself = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # EXPORT_ENVS of DeepSpeed's runner, and a GPU's
    left = [line for line in runner.splitlines() if line.startswith(by_itself)]
    assert not any(word in line for line in left for word in ("of-mlflow", "of-a-keyring")), left
    gone = re.findall(r"cannot access", err)
    assert len(gone) == 1, "a rank removes its own"
    assert files_in_memory() <= before


@pytest.mark.optional_programs
@pytest.mark.parametrize("value", ['a "b"', "a$b", "a`b`", "a\\b", "a\nb", "/%h/b", " a", "a "])
def test_what_ssh_would_change_is_refused(value: str, tmp_path: Path) -> None:
    """What a process needs before its Python starts stands in the command line."""
    play(tmp_path, pdsh="exit 9", ssh="exit 9")
    (tmp_path / "hostfile").write_text(NODES)
    code, _, err = finish(
        start(tmp_path, "exit 9", "--hostfile", tmp_path / "hostfile", "tiny", LD_LIBRARY_PATH=value, checked="run")
    )
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(
        "launch.sh: error: environment variable LD_LIBRARY_PATH does not survive ssh: expected no quote"
    )


@pytest.mark.optional_programs
@pytest.mark.parametrize(
    ("ssh", "code", "words"),
    [
        ("cat >/dev/null; exit 255", 69, "node01 is not reached by ssh"),
        ("cat >/dev/null; exit 1", 2, "node01 does not take the environment of this node: expected a /dev/shm that"),
    ],
)
def test_nodes_that_take_no_environment(ssh: str, code: int, words: str, tmp_path: Path) -> None:
    play(tmp_path, pdsh="exit 9", ssh=ssh)
    (tmp_path / "hostfile").write_text(NODES)
    found, _, err = finish(
        start(tmp_path, "exit 9", "--hostfile", tmp_path / "hostfile", "tiny", HF_TOKEN="hf_", checked="run")
    )
    assert found == code
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.optional_programs
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
@pytest.mark.parametrize("when", ["ranks", "ssh"])
def test_files_are_gone_after_a_signal(when: str, sent: signal.Signals, tmp_path: Path) -> None:
    """While ranks run that have not read them, and before ssh has written them."""
    stop, before, gate = tmp_path / "run" / "stop", files_in_memory(), tmp_path / "gate"
    here = HERE.format(folder=tmp_path)
    if when == "ssh":
        here = f"case $* in *umask*) echo up; until [ -e {gate} ]; do sleep 0.1; done ;; esac; {here}"
    play(tmp_path, pdsh=f"touch {stop}", ssh=here)
    (tmp_path / "hostfile").write_text(NODES)
    played = f"echo up; until [ -e {stop} ]; do sleep 0.1; done; exit 75"
    process = start(
        tmp_path, played, "--hostfile", tmp_path / "hostfile", "tiny", HF_TOKEN="hf_", checked=str(stop.parent)
    )
    assert process.stdout
    for _ in range(2 if when == "ssh" else 1):
        assert process.stdout.readline() == "up\n"
    assert len(files_in_memory() - before) == (0 if when == "ssh" else 3)
    process.send_signal(sent)
    if when == "ssh":
        gate.touch()
    code, _, err = finish(process)
    assert code == (-sent if when == "ssh" else 130 if sent == signal.SIGINT else 75), err
    assert files_in_memory() <= before


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
    code, out, _ = finish(start(tmp_path, "exit 9", *train, **slurm, HF_TOKEN="its token"))
    assert (code, out) == (0, f"rank 5 of 8, local 1, at {first}:23458, its token\n")


@pytest.mark.parametrize(("played", "code"), [(0, 0), (1, 1), (2, 2), (75, 75), (69, 69), (247, 69), (255, 69)])
def test_the_ranks_code_comes_through(played: int, code: int, train: list[str], tmp_path: Path) -> None:
    """247 is how DeepSpeed's launcher ends when a rank of it was killed, 255 what ssh says of a lost host."""
    assert finish(start(tmp_path, f"exit {played}", *train, checked="run"))[0] == code


@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.long) for s in (signal.SIGUSR1, signal.SIGHUP))]
)
def test_a_signal_becomes_a_stop_file(sent: signal.Signals, train: list[str], tmp_path: Path) -> None:
    stop = tmp_path / "run" / "stop"
    process = start(
        tmp_path, f"echo up; until [ -e {stop} ]; do sleep 0.1; done; exit 75", *train, checked=str(stop.parent)
    )
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
    process = start(
        tmp_path,
        f"echo up; until [ -e {stop} ]; do sleep 0.1; done; exit 75",
        *train,
        script=mute,
        checked=str(stop.parent),
    )
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGHUP)
    assert finish(process)[0] == 75


@pytest.mark.parametrize("sent", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_int_or_a_second_signal_ends_at_once(sent: list[signal.Signals], train: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, "echo up; exec sleep 100", *train, checked=str(tmp_path / "run"))
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


IMPATIENT = """
import sys
from megapix.launch import command, supervise
supervise.PATIENCE = 1.0
sys.exit(command.launch(sys.argv[1:]))
"""


@pytest.mark.optional_programs
def test_lost_nodes_are_given_up(train: list[str], tmp_path: Path) -> None:
    """One node is done, the other never: pdsh says so, and waits. The patience is shortened."""
    play(tmp_path, pdsh=f'echo "$@" >{tmp_path}/asked', ssh=HERE.format(folder=tmp_path))
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node01 slots=1\nnode02 slots=1\n")
    impatient = tmp_path / "launch"
    impatient.write_text(f"#!{sys.executable}\n{IMPATIENT}")
    impatient.chmod(0o755)
    played = 'echo "pdsh@here: node01: ssh exited with exit code 69" >&2; exec sleep 100'
    process = start(tmp_path, played, "--hostfile", hostfile, *train, script=impatient, MASTER_PORT="4242")
    code, _, err = finish(process)
    assert code == 69
    assert "pdsh@here: node01: ssh exited with exit code 69" in err
    assert "ranks of other nodes have not ended: ending them" in err
    asked = (tmp_path / "asked").read_text()
    assert "-w node01,node02" in asked
    assert "--master_port=4242 " in asked
