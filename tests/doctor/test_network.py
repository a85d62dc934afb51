"""How the doctor's ranks meet and talk where they have GPUs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from megapix.dist import World
from megapix.doctor import network
from tests.support.fake_cuda import FakeCuda
from tests.support.launch import free_port


@pytest.mark.parametrize(("there", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_tensors_of_gpus_go_through_nccl(there: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks meet, here in threads."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    asked, met = [], []

    def joined(backend: str, **how: Any) -> None:
        asked.append((how["rank"], backend))

    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    ranks = [threading.Thread(target=lambda n=n: met.append(network.meet(World(n, 2, n)).status)) for n in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert met == ["ok", "ok"]
    assert sorted(asked) == [(0, backend), (1, backend)]


@pytest.mark.parametrize(("device", "largest"), [("cuda:1", 28), ("cpu", 24)])
def test_what_is_reduced_lies_on_the_gpu(device: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 KiB to 256 MiB; a CPU, to 16 MiB. Here each tensor holds one number, and the other rank adds its own."""
    asked: list[tuple[int, str]] = []
    with FakeCuda(monkeypatch.setattr) as cuda:

        def one(numbers: int, device: torch.device) -> torch.Tensor:
            asked.append((4 * numbers, str(device)))
            return torch.zeros(1, device=device)

        def reduced(tensor: torch.Tensor) -> None:
            assert cuda.place(tensor) == torch.device(device)
            tensor += 1

        monkeypatch.setattr(torch, "empty", one)
        monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
        monkeypatch.setattr(network, "barrier", lambda world: None)
        verdict, table = network.bandwidth(World(1, 2, 1), torch.device(device), 2**20)
    assert verdict.status == "ok"
    assert asked == [(2**n, device) for n in (12, 16, 20, 24, 28) if n <= largest]
    assert len(table.splitlines()) == 1 + len(asked)
