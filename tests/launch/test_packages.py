"""What is shipped: a wheel is enough to start ranks, and the image's steps are those of the Makefile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.launch import ROOT, free_port
from tests.support.small_run import arguments, counters

CONTAINERFILE = ROOT / "Containerfile"


def steps(word: str) -> list[str]:
    """The arguments of each such instruction."""
    text = CONTAINERFILE.read_text().replace("\\\n", " ")
    return [re.sub(r"\s+", " ", line[len(word) + 1 :]) for line in text.splitlines() if line.startswith(f"{word} ")]


def build_context() -> set[str]:
    """What .dockerignore lets through: it begins with everything, and takes names out."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    return {line[1:] for line in lines if line.startswith("!")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what the image copies and nothing else, by pip, without a network."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for step in steps("COPY"):
        *sources, target = step.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tree / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tree / target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", out, tree], check=True, capture_output=True)
    (built,) = out.glob("megapix-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed the wheel in, with its programs in bin/."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return target


def launch(installed: Path, cwd: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """`megapix launch` of the wheel, from a folder without a checkout."""
    path = os.pathsep.join([str(installed / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(installed), "PATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHON", None)
    return subprocess.run(
        ["megapix", "launch", *options], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_wheel_has_the_launcher(wheel: Path, installed: Path, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "megapix").rglob("*.py")}
    assert ours <= names
    done = launch(installed, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: megapix launch [options] PRESET --data.path SHARDS --out RUN")
    done = launch(installed, tmp_path, "tiny", "--ranks", "many")
    assert (done.returncode, done.stderr) == (2, "megapix launch: error: --ranks = 'many': expected a number above 0\n")


@pytest.mark.long
def test_a_wheel_is_enough_for_several_ranks(installed: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(installed, tmp_path, "--ranks", "2", *arguments(shards, run, "--optim.end-at", "16")[1:])
    assert done.returncode == 0, done.stderr
    assert "x ranks 2" in done.stdout
    assert counters(run).images_seen == 16


@pytest.mark.long
def test_and_for_several_nodes(installed: Path, shards: Path, tmp_path: Path) -> None:
    """Two of them on this machine, each started by hand."""
    run, port = tmp_path / "run", str(free_port())
    path = os.pathsep.join([str(installed / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(installed), "PATH": path, "OMP_NUM_THREADS": "1", "MASTER_PORT": port}
    options = ["--no-ssh", "--nnodes", "2", "--ranks", "1", "--master-addr", "127.0.0.1"]
    train = arguments(shards, run, "--optim.end-at", "16")[1:]
    nodes = [
        subprocess.Popen(
            ["megapix", "launch", *options, "--node-rank", str(node), *train],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    ended = [(node.communicate(timeout=300), node.returncode) for node in nodes]
    assert [code for _, code in ended] == [0, 0], ended
    assert "x ranks 2" in ended[0][0][0]
    assert counters(run).images_seen == 16


def test_the_image_installs_as_the_makefile_does() -> None:
    """No builder runs here: every file is there, gets to the builder, and the command is that of `make`."""
    copied = {source for step in steps("COPY") for source in step.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    assert copied == build_context()
    assert "make .venv/.installed && rm -rf /root/.cache" in steps("RUN")
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.search(r"^\$\(VENV\)/\.installed: (.*)$", makefile, re.MULTILINE)[1].split()) <= copied  # type: ignore[index]
    (packages,) = [step for step in steps("RUN") if "apt-get install" in step]
    assert {"g++", "make", "pdsh", "openssh-client", "python3-dev", "python3-venv"} <= set(packages.split())
    assert steps("ENV") == ["PATH=/megapix/.venv/bin:$PATH"]
    assert steps("WORKDIR") == ["/megapix"]


@pytest.mark.parametrize("there", [["podman", "docker"], ["docker"], []])
def test_make_image_takes_the_builder_that_there_is(there: list[str], tmp_path: Path) -> None:
    for name in ("make", "sh", "dirname", "wildcard"):
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    for name in there:
        (tmp_path / name).write_text(
            '#!/bin/sh\necho "$(basename "$0") $*"\n'.replace("$(basename", "$(/usr/bin/basename")
        )
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["make", "-s", "image", "IMAGE=here/megapix:1"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    if there:
        assert (done.returncode, done.stdout) == (0, f"{there[0]} build --file Containerfile --tag here/megapix:1 .\n")
    else:
        assert done.returncode == 2
        assert "make image: error: neither podman nor docker" in done.stderr
