"""The doctor's own rank on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megapix import config
from megapix.dist import World
from megapix.doctor import network
from megapix.doctor.command import examine
from megapix.doctor.verdict import Verdict
from tests.support.fake_cuda import FakeCuda
from tests.support.small_run import SMALL


def test_the_gradients_time_is_measured_on_the_ranks_own_gpu(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[torch.device] = []

    def bandwidth(world: World, device: torch.device, gradient: int) -> tuple[Verdict, str]:
        measured.append(device)
        return Verdict("all-reduce", "ok", ""), ""

    monkeypatch.setattr(network, "bandwidth", bandwidth)
    asked: Any = config.replace(config.replace(SMALL, "data.path", str(shards)), "out", str(tmp_path / "run"))
    FakeCuda(monkeypatch.setattr)
    assert examine(asked, World(0, 1, 2)) == 0
    assert measured == [torch.device("cuda", 2)]
