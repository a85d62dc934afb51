"""The proof of ZeRO-2 on GPUs: as many ranks as there are, and both sides on the same device."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megapix.dist import World
from megapix.model import layers
from megapix.parity import compare, zero2
from megapix.parity.cases import Case, configuration
from megapix.parity.command import main
from megapix.parity.compare import reference
from tests.support.fake_cuda import FakeCuda

GPU = torch.device("cuda", 1)


@pytest.mark.parametrize(("gpus", "ranks"), [(0, "2 4 1 3 6"), (1, "1"), (3, "2 1 3"), (4, "2 4 1 3")])
def test_no_more_ranks_than_gpus(gpus: int, ranks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        started.append(command[command.index("--nproc-per-node") + 1])
        Path(command[command.index("--results") + 1]).write_text("[]")
        return SimpleNamespace(returncode=0)

    FakeCuda(monkeypatch.setattr, names=["NVIDIA H200"] * gpus)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    assert main([], World()) == 0
    assert started == ranks.split()


@pytest.mark.parametrize("text", [False, True])
def test_the_plain_process_computes_on_the_device(text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    c = configuration(Case(1, 2, text=text))
    monkeypatch.setattr(compare, "STEPS", 1)
    expected = reference(c, 4, torch.device("cpu"))
    monkeypatch.setattr(layers, "aligned", lambda x: False)  # to the bit
    with FakeCuda(monkeypatch.setattr) as cuda:
        found = reference(c, 4, GPU)
        shown, cond = zero2.samples(c.model, GPU, np.arange(3))
        assert {cuda.place(t) for t in (shown, *cond.cond, *cond.null)} == {GPU}
        assert {cuda.place(t) for t in found.weights.values()} == {torch.device("cpu")}
    reference.cache_clear()
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], expected.weights[name]) for name in expected.weights)
