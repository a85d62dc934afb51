"""Ranks on GPUs: each takes its own, they talk through NCCL, and nothing of what CPU ranks need is done."""

from __future__ import annotations

import ctypes
import inspect
import os
import runpy
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch._inductor import cpp_builder, exc

from megapix import engine
from megapix.config import MachineConfig
from megapix.dist import World
from megapix.engine import processes
from megapix.engine.network import build_network, pit_block
from megapix.errors import InputError
from megapix.model.layers import PiTBlock
from tests.support.fake_cuda import FakeCuda
from tests.support.small_run import SMALL


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """DeepSpeed's own accelerator of GPUs, on GPUs that are not there."""
    fake = FakeCuda(monkeypatch.setattr)
    monkeypatch.setattr(real_accelerator, "ds_accelerator", CUDA_Accelerator())
    return fake


@pytest.mark.parametrize("local_rank", [0, 3])
def test_a_rank_takes_the_gpu_of_its_number_on_its_node(
    local_rank: int, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(backend: str, **_: Any) -> None:
        cuda.calls.append(("joined through", backend))

    def for_cpus(*_: Any) -> None:
        raise AssertionError("what CPU ranks need")

    monkeypatch.setattr(deepspeed, "init_distributed", join)
    monkeypatch.setattr(real_accelerator.ds_accelerator, "create_op_builder", for_cpus)
    monkeypatch.setattr(ctypes, "CDLL", for_cpus)
    assert processes.start(World(4 + local_rank, 8, local_rank)) == torch.device("cuda", local_rank)
    assert cuda.calls == [("set_device", local_rank), ("joined through", "nccl")]


def test_more_ranks_than_gpus(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before it joins, and before it takes another rank's."""
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *_, **__: None)
    assert refused(lambda: processes.start(World(4, 8, 4))) == "no GPU is left for local rank 4: 4 are visible"
    assert cuda.calls == []


@pytest.mark.parametrize(("there", "accelerator"), [(True, None), (False, "cpu")])
def test_deepspeed_is_told_of_cpus_where_there_is_no_gpu(
    there: bool, accelerator: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the environment, before it is imported for the first time."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    runpy.run_path(str(inspect.getsourcefile(engine)))
    assert os.environ.get("DS_ACCELERATOR") == accelerator


def refused(build: Callable[[], object]) -> str:
    """What is said against it."""
    try:
        build()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("gpus", [True, False])
def test_tritons_kernels_are_for_gpus(
    gpus: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise exc.InvalidCxxCompiler("none")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if gpus:
        request.getfixturevalue("cuda")
        assert pit_block("triton") is not PiTBlock
    else:
        assert "machine.pixel_kernels = 'triton': Triton compiles for GPUs only" in refused(lambda: pit_block("triton"))
        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
        compiled = MachineConfig(compile=True, pixel_checkpointing="none")
        said = refused(lambda: build_network(SMALL.model, 0, compiled))
        assert "machine.compile = True: torch.compile finds no C++ compiler" in said
