"""A command's environment is complete before torch is loaded: launch.sh's file, and how torch allocates on GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapix.cli import environment, main
from megapix.errors import InputError
from tests.support.launch import ROOT

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
REPORT = """
import atexit, os, sys
atexit.register(lambda: print({name: os.environ.get(name) for name in %r}, "torch" in sys.modules))
"""


@pytest.mark.parametrize("started", ["python -m megapix", "megapix"])
@pytest.mark.parametrize(
    "users", [{}, {"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}]
)
def test_segments_grow_unless_the_user_configures_the_allocator(
    started: str, users: dict[str, str], tmp_path: Path
) -> None:
    """In fresh processes, as `python -m megapix` and as the console script; `plan` loads no torch."""
    (tmp_path / "sitecustomize.py").write_text(REPORT % (NAMES,))
    entry = ["-m", "megapix"] if started != "megapix" else ["-c", "from megapix.cli.main import main; main()"]
    clean = {name: value for name, value in os.environ.items() if name not in environment.ALLOCATOR}
    done = subprocess.run(
        [sys.executable, *entry, "plan", "xl-256", "--gpus", "8"],
        env=clean | users | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = users or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert done.stdout.splitlines()[-1] == f"{ {name: expected.get(name) for name in NAMES} } False"


def test_importing_the_library_changes_nothing() -> None:
    code = "import os; before = dict(os.environ); import megapix, megapix.cli.main; assert os.environ == before"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_torch_that_is_loaded_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    environment.expand_segments()
    assert not os.environ.keys() & {*environment.ALLOCATOR}


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.6.0+cu124", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.8.0", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.1+cu128", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.10.0a0+b558c986e8.nv25.11", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.10.0", "PYTORCH_ALLOC_CONF"),
        ("2.13.0+cpu", "PYTORCH_ALLOC_CONF"),
        ("2.14.0.dev20260901+cu130", "PYTORCH_ALLOC_CONF"),
        ("3.0.0", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_name_that_a_release_reads(version: str, name: str) -> None:
    """By c10/cuda/CUDAAllocatorConfig.h of the wheels of 2.8.0, 2.9.1 and 2.10.0."""
    assert environment.allocator_variable(version) == name


def test_the_installed_torch_reads_that_name() -> None:
    header = Path(torch.__file__).parent / "include" / "c10" / "cuda" / "CUDAAllocatorConfig.h"
    name = environment.allocator_variable(importlib.metadata.version("torch"))
    assert f'get_env("{name}")' in header.read_text()


def written(folder: Path, entries: bytes, mode: int = 0o600) -> Path:
    path = folder / "environment.3"
    path.write_bytes(entries)
    path.chmod(mode)
    return path


@pytest.fixture
def _rank_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MEGAPIX_ENVIRONMENT", str(tmp_path / "environment"))
    for name in ("HF_TOKEN", "AWS_PROFILE"):
        monkeypatch.setenv(name, "of the node")


@pytest.mark.usefixtures("_rank_3")
def test_a_rank_takes_its_file_over_and_removes_it(tmp_path: Path) -> None:
    path = written(tmp_path, b"HF_TOKEN=a=b \xff\n$x\0AWS_PROFILE=\0")
    environment.take_over()
    assert os.environb[b"HF_TOKEN"] == b"a=b \xff\n$x"
    assert os.environ["AWS_PROFILE"] == ""
    assert "MEGAPIX_ENVIRONMENT" not in os.environ, "processes of this one look for no file"
    assert not path.exists()
    environment.take_over()


@pytest.mark.usefixtures("_rank_3")
@pytest.mark.parametrize("wrong", ["missing", "for others", "a link", "not ours"])
def test_a_file_that_others_may_have_written_is_refused(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if wrong == "a link":
        (tmp_path / "environment.3").symlink_to(written(tmp_path, b"HF_TOKEN=theirs\0").rename(tmp_path / "other"))
    elif wrong != "missing":
        written(tmp_path, b"HF_TOKEN=theirs\0", 0o640 if wrong == "for others" else 0o600)
    if wrong == "not ours":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with monkeypatch.context() as patch:
        patch.setenv("MEGAPIX_ENVIRONMENT", os.environ["MEGAPIX_ENVIRONMENT"])
        with pytest.raises(InputError, match=r"\.3' (cannot be read|is not this)"):
            environment.take_over()
    assert os.environ["HF_TOKEN"] == "of the node"
    assert main.main(["plan", "xl-256", "--gpus", "8"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
