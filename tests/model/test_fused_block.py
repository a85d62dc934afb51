"""The fused pixel kernels in Triton's interpreter (`tests/programs/fused_kernels.py`), compiled for GPUs, and refused.

The interpreter has to be chosen before Triton is imported, so each part is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megapix import config
from megapix.config import Config, MachineConfig
from megapix.engine.network import build_network
from megapix.errors import InputError
from tests.support.small_run import SMALL


def succeed(*command: str, interpreted: bool = True) -> str:
    env = os.environ | {"TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_both_operations_and_the_network_against_references() -> None:
    succeed("tests.programs.fused_kernels", "operations")


@pytest.mark.long
def test_planted_faults_are_found() -> None:
    succeed("tests.programs.fused_kernels", "faults")


@pytest.mark.long
def test_what_they_keep_is_counted() -> None:
    succeed("tests.programs.fused_kernels", "memory")


@pytest.mark.long
def test_torch_takes_them_for_whole_operations() -> None:
    succeed("tests.programs.fused_kernels", "compiled")


@pytest.mark.long
def test_they_compile_for_gpus() -> None:
    """To machine code, by the compiler in Triton's wheel: what an interpreter does not check, and registers."""
    rows = [line.split() for line in succeed("tests.programs.compiled_kernels", interpreted=False).splitlines()]
    assert len(rows) == 24
    for *name, _, overflow, shared in rows:
        assert int(overflow) <= 32, name
        assert int(shared) <= 48 * 1024, (name, "three programs fit on an A100's multiprocessor")


def asking(pixel_width: int) -> Config:
    c = replace(SMALL, machine=MachineConfig(pixel_kernels="triton"), out="run")
    return config.replace(config.replace(c, "data.path", "shards"), "model.pixel_width", pixel_width)


@pytest.mark.parametrize("width", [8, 24])
def test_a_width_that_no_matrix_product_has_is_bad_input(width: int) -> None:
    config.validate(asking(16))
    with pytest.raises(InputError, match=rf"pixel_kernels = 'triton' with model.pixel_width = {width}: expected"):
        config.validate(asking(width))


def test_kernels_of_all_patches_are_not_for_chunks_of_them() -> None:
    with pytest.raises(InputError, match=r"= 'chunked' with machine.pixel_kernels = 'triton': .*expected"):
        config.validate(config.replace(asking(16), "machine.pixel_checkpointing", "chunked"))


def test_cpus_without_the_interpreter_are_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=r"machine\.pixel_kernels = 'triton': .* expected 'plain' on CPUs"):
        build_network(SMALL.model, 0, MachineConfig(pixel_kernels="triton"))


def test_a_missing_triton_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megapix.model.fused_block", raising=False)
    with pytest.raises(InputError, match=r"triton is not installed; expected 'plain'"):
        build_network(SMALL.model, 0, MachineConfig(pixel_kernels="triton"))
