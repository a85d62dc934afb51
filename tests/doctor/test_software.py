"""What the doctor says of GPUs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch._inductor import cpp_builder

from megapix import config
from megapix.config import Config
from megapix.costs.automatic import Cards
from megapix.dist import World
from megapix.doctor import software
from megapix.doctor.verdict import tried
from tests.support.fake_cuda import NAMES, FakeCuda
from tests.support.small_run import SMALL

GIB = 2**30
H100, A100 = NAMES[:2]
RANK_0 = World(0, 8, 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch.setattr)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """What rank 0 has found; the rank itself if nothing is said."""

    def say(rank_0: object) -> None:
        monkeypatch.setattr(software, "gather", lambda world, value, group=None: [rank_0 or value])

    say(None)
    return say


def said(world: World, parameters: int = 7, c: Config = SMALL) -> tuple[str, str]:
    verdict = software.gpus(c, parameters, world)
    return verdict.status, verdict.detail


@pytest.mark.usefixtures("beside")
def test_a_rank_looks_at_its_own_gpu(cuda: FakeCuda) -> None:
    cuda.free = [80 * GIB, 77 * GIB, 40 * GIB, 80 * GIB]
    assert said(World(4, 8, 0)) == ("ok", f"4 x {H100}, 80 GiB, 80 GiB free")
    assert said(World(5, 8, 1)) == ("ok", f"4 x {A100}, 80 GiB, 77 GiB free")
    assert said(World(6, 8, 2)) == ("warn", f"4 x {H100}, 80 GiB, 40 GiB free: another process holds the rest")
    assert said(World(7, 8, 4)) == ("fail", "4 GPUs are visible, none is left for local rank 4")
    assert cuda.calls == [(what, n) for n in range(3) for what in ("get_device_name", "mem_get_info")]


@pytest.mark.usefixtures("cuda")
def test_all_ranks_should_have_the_same(beside: Callable[[object], None], monkeypatch: pytest.MonkeyPatch) -> None:
    beside((True, H100))
    assert said(World(1, 8, 1)) == (
        "warn", f"4 x {A100}, 80 GiB, 79 GiB free, but rank 0 has {H100}: every step waits for the slowest",
    )  # fmt: skip
    beside((False, ""))
    assert said(World(1, 8, 1)) == ("fail", "a GPU here, but rank 0 has none")
    FakeCuda(monkeypatch.setattr, names=())
    assert said(RANK_0) == ("ok", "none: CPU ranks with gloo")
    beside((True, A100))
    assert said(World(1, 8, 1)) == ("fail", f"no GPU here, but rank 0 has {A100}")


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize(
    ("precision", "knobs", "bytes_each"),
    [("fp32", "zero2", 4 + 20 / 8), ("bf16", "zero2", 2 + 20 / 8), ("bf16", "zero2_offload", 2 + 4 / 8)],
)
def test_weights_and_optimizer_must_fit(precision: str, knobs: str, bytes_each: float, cuda: FakeCuda) -> None:
    """8 ranks share masters, moments, EMA and gradient; the weights are on each."""
    c = config.replace(config.replace(SMALL, "precision", precision), "machine.ds_config", knobs)
    most = int(cuda.total / bytes_each)
    assert said(World(3, 8, 3), most - 8, c)[0] == "ok"
    status, detail = said(World(3, 8, 3), most + 8, c)
    assert (status, detail.partition("; ")[2]) == ("fail", "weights and optimizer alone need 80.0 GiB")


def test_a_slice_of_a_gpu_is_what_it_says(beside: Callable[[object], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own size, and not the same as the GPU that it is named after."""
    cuda = FakeCuda(monkeypatch.setattr, names=(f"{H100} MIG 1g.10gb",))
    cuda.total, cuda.free = 10 * GIB, [10 * GIB - 1]
    assert said(RANK_0) == ("ok", f"1 x {H100} MIG 1g.10gb, 10 GiB, 10 GiB free")
    assert said(World(1, 2, 0), 10 * GIB)[0] == "fail"
    beside((True, H100))
    assert said(World(1, 2, 0))[0] == "warn"


@pytest.mark.usefixtures("cuda")
def test_gpus_need_neither_the_op_nor_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.communication_op(World()).detail == "GPUs need no op of DeepSpeed's"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert software.shared_memory(5).status == "ok"


@pytest.mark.parametrize("gpus", [True, False])
@pytest.mark.parametrize(
    "option", [{"compile": True}, {"compile": "auto"}, {"compile": False}, {"pixel_kernels": "triton"}]
)
def test_a_missing_compiler_stops_who_asks_for_it(
    option: dict[str, Any], gpus: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is on the PATH. 'auto' does without."""
    if gpus:
        request.getfixturevalue("cuda")
    for name in ("CC", "CXX", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/no-such-folder")
    cpp_builder.cpp_compiler_search.cache_clear()
    (name, value), c = *option.items(), SMALL
    c = config.replace(config.replace(c, "machine.compile", False), f"machine.{name}", value)
    verdict = software.compilation(c)
    which = "Triton finds no C compiler" if gpus else "torch.compile finds no C++ compiler"
    compiled = value is True or (gpus and value in ("auto", "triton"))
    assert verdict.status == (("warn" if value == "auto" else "fail") if compiled else "ok")
    assert (which in verdict.detail) == compiled
    if verdict.status == "fail":
        assert verdict.detail.startswith(f"machine.{name} = {value!r}: ")
    if verdict.status == "warn":
        assert verdict.detail.endswith("without, machine.compile = 'auto' compiles no block: slower")
    if not compiled and name == "compile":
        assert verdict.detail.startswith("not needed: machine.compile = ")
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.parametrize(
    ("gigabytes", "micro", "status", "said"),
    [
        (80, 0, "ok", "compiled, pixel checkpointing none, micro batch 32 x accumulation 1: "),
        (20, 32, "warn", "GiB predicted of 18.6 GiB (8 x H100)"),
        (8, 32, "fail", "machine.micro_batch = 32 with machine.pixel_checkpointing = 'none': weights and optimizer"),
    ],
)
def test_what_the_run_would_take_of_its_gpus(gigabytes: int, micro: int, status: str, said: str) -> None:
    c = config.replace(config.preset("xl-256"), "machine.micro_batch", micro)
    c = config.replace(c, "machine.pixel_checkpointing", "none" if micro else "auto")
    cards = Cards("NVIDIA H100 80GB HBM3", gigabytes * 10**9, 8, 1, "8 x H100")
    verdict = tried("memory", lambda: software.memory(c, cards, True))
    assert (verdict.check, verdict.status) == ("memory", status)
    assert said in verdict.detail
