"""What compiled kernels need is named before the first step, and Triton itself builds or fails where we say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch._inductor import cpp_builder

from megapix.config import MachineConfig
from megapix.engine import compiler
from megapix.engine.network import build_network
from megapix.errors import InputError
from tests.support.small_run import SMALL

driver = pytest.importorskip("triton.backends.nvidia.driver")
build = pytest.importorskip("triton.runtime.build")


@pytest.fixture
def libcuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a driver: a library of its name, in the folder that TRITON_LIBCUDA_PATH names."""
    folder = tmp_path / "driver"
    folder.mkdir()
    subprocess.run(["gcc", "-shared", "-x", "c", os.devnull, "-o", folder / compiler.LIBCUDA], check=True)
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    return folder


def triton_builds(folder: Path) -> bool:
    """Whether Triton's own code builds the module that it loads at the first kernel."""
    driver.libcuda_dirs.cache_clear()
    driver.library_dirs.cache_clear()
    source = Path(driver.dirname) / "driver.c"
    try:
        build._build(
            "trial", str(source), str(folder), driver.library_dirs(), driver.include_dirs, driver.libraries, []
        )
    except (RuntimeError, AssertionError, OSError, subprocess.CalledProcessError):
        return False
    return True


def only(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Leave the PATH these programs, each a real one's path or a script, and what gcc itself calls."""
    folder.mkdir()
    for name, program in (programs | {called: str(shutil.which(called)) for called in ("as", "ld")}).items():
        if program.startswith("#!"):
            (folder / name).write_text(program)
            (folder / name).chmod(0o755)
        else:
            (folder / name).symlink_to(program)
    monkeypatch.setenv("PATH", str(folder))


BROKEN = '#!/bin/sh\necho "cc1: fatal error: no cc1 here" >&2\nexit 1\n'


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("all there", None),
        ("a compiler of another name in CC", None),
        pytest.param("clang alone", None, marks=pytest.mark.long),
        ("no compiler", "Triton finds no C compiler; expected gcc (Debian: apt install gcc libc6-dev)"),
        ("CC is not there", "Triton finds no C compiler CC = 'no-such-cc'; expected gcc"),
        ("CC with options", "Triton finds no C compiler CC = 'gcc -O2'; expected gcc"),
        pytest.param("CC is empty", "Triton finds no C compiler CC = ''; expected gcc", marks=pytest.mark.long),
        ("a broken compiler", "builds nothing (cc1: fatal error: no cc1 here); expected a working gcc or CC"),
        (
            "no libcuda",
            "Triton finds no libcuda.so.1, the driver's library; expected it in the list of /sbin/ldconfig -p",
        ),
        ("a library that is none", "builds nothing ("),
    ],
)
@pytest.mark.usefixtures("libcuda")
def test_as_triton_finds_it(
    case: str, words: str | None, libcuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcc, programs = str(shutil.which("gcc")), tmp_path / "programs"
    match case:
        case "a compiler of another name in CC":
            only(programs, monkeypatch, mine=gcc)
            monkeypatch.setenv("CC", "mine")
        case "clang alone":
            only(programs, monkeypatch, clang=gcc)
        case "no compiler":
            only(programs, monkeypatch)
        case "CC is not there":
            monkeypatch.setenv("CC", "no-such-cc")
        case "CC with options":
            monkeypatch.setenv("CC", "gcc -O2")
        case "CC is empty":
            monkeypatch.setenv("CC", "")
        case "a broken compiler":
            only(programs, monkeypatch, gcc=BROKEN, clang=gcc)
        case "no libcuda":
            (libcuda / compiler.LIBCUDA).unlink()
        case "a library that is none":
            (libcuda / compiler.LIBCUDA).write_text("no library")
    said = compiler.missing(cuda=True)
    assert triton_builds(tmp_path) == (words is None), said
    if words is None:
        assert said is None
    else:
        assert said
        assert words in said
        assert "\n" not in said


def test_libcuda_in_the_linkers_list_or_its_path(libcuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TRITON_LIBCUDA_PATH Triton asks ldconfig, and after it LD_LIBRARY_PATH."""
    if "libcuda.so.1" in subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout:
        pytest.skip("a driver is installed here")
    monkeypatch.delenv("TRITON_LIBCUDA_PATH")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    said = compiler.missing(cuda=True)
    assert said
    assert "finds no libcuda.so.1" in said
    assert not triton_builds(libcuda)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/no-such-folder:{libcuda}")
    assert compiler.missing(cuda=True) is None
    assert triton_builds(libcuda)


@pytest.mark.usefixtures("libcuda")
@pytest.mark.parametrize("cuda", [True, False])
def test_pythons_headers(cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *scheme: str(tmp_path / "include"))
    said = compiler.missing(cuda)
    assert said
    assert (
        f"{'Triton' if cuda else 'torch.compile'} needs {tmp_path}/include/Python.h; expected Python's headers" in said
    )


def refused(machine: MachineConfig) -> str:
    try:
        build_network(SMALL.model, 0, machine)
    except InputError as error:
        return str(error)
    return ""


def test_a_run_on_gpus_is_refused_before_it_builds_its_network(
    libcuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_accelerator, "ds_accelerator", CUDA_Accelerator())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    compiled = MachineConfig(compile=True, pixel_checkpointing="none")
    kernels = MachineConfig(compile=False, pixel_checkpointing="none", pixel_kernels="triton")
    plain = MachineConfig(compile=False, pixel_checkpointing="none")
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: pytest.fail("GPUs need no C++ compiler"))
    assert [refused(machine) for machine in (compiled, kernels, plain)] == ["", "", ""]
    only(tmp_path / "programs", monkeypatch)
    lacking = (
        "Triton finds no C compiler; expected gcc (Debian: apt install gcc libc6-dev), or another one's path in CC"
    )
    assert [refused(machine) for machine in (compiled, kernels, plain)] == [
        f"machine.compile = True: {lacking}; or do without (--machine.no-compile)",
        f"machine.pixel_kernels = 'triton': {lacking}; or do without (--machine.pixel-kernels plain)",
        "",
    ]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refused(kernels) == "", "the interpreter compiles nothing"
