"""Meters on a GPU: sums stay there until they are read."""

from __future__ import annotations

import math

import pytest
import torch

from megapix.monitoring import meters
from tests.support.fake_cuda import FakeCuda, WrongPlace

GPU = torch.device("cuda", 2)


def test_sums_stay_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(monkeypatch.setattr) as cuda:
        losses, apart = meters.LossMeter(GPU), meters.DeviceMean(GPU)
        loss = torch.tensor([1.0, 2.0, math.nan, 6.0], device=GPU)
        losses.add(loss, torch.tensor([0.1, 0.2, 0.3, 0.9], device=GPU))
        apart.add(loss)
        assert cuda.calls == []
        assert losses.read(1) == {"loss/train": 3.0, "loss/t_1_of_4": 1.5, "loss/t_4_of_4": 6.0}
        assert apart.read(1) == 3.0
        with pytest.raises(WrongPlace, match="same device"):
            losses.add(loss.cpu(), loss.cpu())


def test_the_peak_is_that_of_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch.setattr)
    cuda.peak = 5 * 2**30
    assert list(meters.memory(torch.device("cpu"))) == ["memory/host_peak_GiB"]
    assert cuda.calls == []
    row = list(meters.memory(GPU).items())
    assert row[0][0] == "memory/host_peak_GiB"
    assert row[1:] == [("memory/gpu_peak_GiB", 5 + 2)]
