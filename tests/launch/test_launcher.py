"""launch.sh on one machine: what it refuses, what it starts, and the whole way from shards to samples."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megapix.cli import main as cli
from megapix.engine import comm_op
from tests.support.launch import ROOT, free_port
from tests.support.small_run import STEP_BATCH, arguments, counters, logged


def launch(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run launch.sh in `folder` with this interpreter."""
    return subprocess.run(
        [str(ROOT / "launch.sh"), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment,
        cwd=folder,
        timeout=300,
    )


def test_launcher_help_and_errors(own_shards: Path, tmp_path: Path) -> None:
    done = launch(tmp_path, "--help")
    assert done.returncode == 0
    assert "usage: ./launch.sh" in done.stdout
    assert launch(tmp_path).returncode == 2
    done = launch(tmp_path, "--ranks", "many", "tiny")
    assert (done.returncode, done.stderr) == (2, "launch.sh: error: --ranks = 'many': expected a number above 0\n")
    done = launch(tmp_path, *arguments(tmp_path / "none", tmp_path / "run")[1:])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "does not exist" in done.stderr


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("g++", "no g++: DeepSpeed compiles its CPU communication op"),
        pytest.param("room", "/dev/shm has 64 MiB free, 2 CPU ranks need 132", marks=pytest.mark.long),
        pytest.param("ninja", "no ninja beside", marks=pytest.mark.long),
        ("pdsh", "no pdsh: --hostfile starts the nodes with it (Debian: apt install pdsh); or --no-ssh"),
    ],
)
def test_launcher_says_what_the_machine_lacks(tool: str, words: str, own_shards: Path, tmp_path: Path) -> None:
    """The PATH holds the real tools but one, or /dev/shm is that of a smaller machine."""
    tools, python = tmp_path / "tools", tmp_path / "python"
    tools.mkdir()
    python.mkdir()
    for name in ("bash", "dirname", "g++", "ninja", "env"):
        found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert found, name
        if name != tool:
            (tools / name).symlink_to(found)
    small = tmp_path / "small"
    small.mkdir()
    if tool == "room":
        usage = (
            "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 2**26, 2**26)\n"
        )
        (small / "sitecustomize.py").write_text(usage)
    wrapper = python / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "hostfile").write_text("node01 slots=2\nnode02 slots=2\n")
    options = ["--hostfile", "hostfile"] if tool == "pdsh" else []
    command = [*options, *arguments(own_shards, tmp_path / "run")[1:]]
    done = launch(tmp_path, *command, PATH=str(tools), PYTHON=str(wrapper), PYTHONPATH=f"{small}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert done.stderr.startswith("launch.sh: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "visible", "expected"),
    [
        pytest.param([], "", "--include localhost:0,1,2,3", marks=pytest.mark.long),
        pytest.param(["--ranks", "2"], "", "--include localhost:0,1", marks=pytest.mark.long),
        pytest.param([], "2,3", "--include localhost:2,3", marks=pytest.mark.long),
        (["--ranks=2"], "1,2,3", "--include localhost:1,2"),
        (["--ranks", "5"], "", "launch.sh: error: --ranks = 5: there are 4 GPUs (0,1,2,3)"),
        ([], "GPU-1f2e", "launch.sh: error: CUDA_VISIBLE_DEVICES = 'GPU-1f2e': expected numbers"),
        (
            ["--no-ssh", "--nnodes=1", "--node-rank=0", "--master-addr=a"],
            "2,3",
            "launch.sh: error: CUDA_VISIBLE_DEVICES = '2,3': on several nodes DeepSpeed takes the first GPUs of each",
        ),
    ],
)
def test_launcher_on_a_machine_with_gpus(
    options: list[str], visible: str, expected: str, own_shards: Path, tmp_path: Path
) -> None:
    """What launch.sh asks of DeepSpeed's launcher where nvidia-smi lists four GPUs (nothing is started on them)."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: a card"; echo "  MIG 1g.5gb Device 0: a slice"; done\n'
    )
    (tools / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *deepspeed.launcher*) echo "$@"; echo "visible=$CUDA_VISIBLE_DEVICES";; '
        f'*) exec "{sys.executable}" "$@";; esac\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    if visible:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = [*options, *arguments(own_shards, tmp_path / "run")[1:], "--optim.global-batch", "16"]
    done = launch(tmp_path, *command, **environment)
    assert expected in done.stdout + done.stderr
    if "error" in expected:
        assert done.returncode == 2
    else:
        assert done.returncode == 0, done.stderr
        assert "--module megapix train tiny" in done.stdout
        assert "visible=\n" in done.stdout, "the launcher sets it for each rank"


@pytest.mark.parametrize("broken", [True, pytest.param(False, marks=pytest.mark.long)])
def test_launcher_without_a_gpu_that_works(broken: bool, own_shards: Path, tmp_path: Path) -> None:
    """An nvidia-smi that finds no driver, and a user who wants none of the GPUs, give CPU ranks."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\n" + ("exit 9\n" if broken else 'echo "GPU 0: a card"\n'))
    (tools / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *deepspeed.launcher*) echo "$@ $DS_ACCELERATOR";; '
        f'*) exec "{sys.executable}" "$@";; esac\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "PYTHON": "python"} | ({} if broken else {"CUDA_VISIBLE_DEVICES": ""})
    done = launch(tmp_path, *arguments(own_shards, tmp_path / "run")[1:], **environment)
    assert done.returncode == 0, done.stderr
    assert "--num_gpus 2 " in done.stdout
    assert done.stdout.endswith(" cpu\n")
    done = launch(tmp_path, "tiny", PYTHON="no-such-python")
    assert done.returncode == 2
    assert done.stderr.startswith("launch.sh: error: PYTHON = 'no-such-python': expected an interpreter")


@pytest.mark.long
def test_torchrun_starts_it_too(own_shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megapix"]
    command += [*arguments(own_shards, tmp_path / "run"), "--optim.end-at", "16"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "x ranks 2" in done.stdout
    assert counters(tmp_path / "run").images_seen == 16


@pytest.mark.long
def test_launch_sh_trains_and_samples(own_shards: Path, tmp_path: Path) -> None:
    """The whole way as a user goes it: launcher, two ranks, a worker each, then `megapix sample` and `export`."""
    run = tmp_path / "run"
    port = str(free_port())
    # A process that was killed while it loaded DeepSpeed's op leaves this file, and torch would wait for it for ever.
    leftover = comm_op.extensions() / "deepspeed_shm_comm" / "lock"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.touch()
    options = [*arguments(own_shards, run)[1:], "--optim.end-at", "24", "--data.workers", "1"]
    done = launch(tmp_path, *options, MASTER_PORT=port)
    assert done.returncode == 0, done.stderr
    assert "x ranks 2" in done.stdout
    assert "finished: 24 images seen" in done.stdout
    assert not leftover.exists()
    assert not list(Path("/dev/shm").glob(f"*_{port}_*")), "the run's shared-memory segments are gone"
    picture = tmp_path / "grid.png"
    singles = tmp_path / "singles"
    options = ["--per-class", "2", "--steps", "2", "--classes", "2", "0", "--singles", str(singles), "--zoom", "2"]
    assert cli.main(["sample", str(run), "--out", str(picture), *options]) == 0
    with Image.open(picture) as image:
        assert image.size == (2 * (2 + 2 * 18), 2 * (2 + 2 * 18))
        sheet = np.asarray(image)[::2, ::2]
    assert sorted(path.name for path in singles.iterdir()) == [
        "0000-000002.png", "0000-000003.png", "0002-000000.png", "0002-000001.png",
    ]  # fmt: skip
    with Image.open(singles / "0002-000001.png") as image:
        assert np.array_equal(np.asarray(image), sheet[2:18, 20:36])
    exported, again = tmp_path / "exported.safetensors", tmp_path / "again.png"
    assert cli.main(["export", str(run), "--out", str(exported)]) == 0
    assert cli.main(["sample", str(exported), "--out", str(again), *options[:4], "--classes", "2", "0"]) == 0
    with Image.open(again) as image:
        assert np.array_equal(np.asarray(image), sheet)


@pytest.mark.long
def test_launch_sh_asks_a_run_to_stop(own_shards: Path, tmp_path: Path) -> None:
    """SIGTERM to the script, which DeepSpeed's launcher would not pass on: the run saves, and code 75 comes out."""
    run = tmp_path / "run"
    command = [*arguments(own_shards, run)[1:], "--optim.end-at", "1000000000", "--checkpoint.every", "1000000000"]
    process = subprocess.Popen(
        [str(ROOT / "launch.sh"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
        cwd=tmp_path,
    )
    try:
        deadline = time.monotonic() + 200
        while len(logged(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "asking the run to save and end" in err
    assert f"stopped by {run / 'stop'}" in out
    assert counters(run).images_seen >= 3 * STEP_BATCH
    assert not (run / "stop").exists()


@pytest.mark.long
def test_launch_sh_starts_the_doctor(own_shards: Path, tmp_path: Path) -> None:
    done = launch(tmp_path, "doctor", *arguments(own_shards, tmp_path / "run")[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks met at" in done.stdout
    assert "nothing found that would stop this run" in done.stdout
    assert not (tmp_path / "run").exists()
    assert launch(tmp_path, "doctor", *arguments(own_shards / "none", tmp_path / "run")[1:]).returncode == 1
