"""The peak that a run's speed is measured by."""

from __future__ import annotations

import pytest
import torch

from megapix import config
from megapix.costs import flops
from tests.support.fake_cuda import FakeCuda

RUN = config.preset("xl-256")


@pytest.mark.parametrize(("index", "peak"), [(0, 756.0), (1, 312.0), (2, None), (3, None)])
def test_a_gpus_own_peak_in_bf16(index: int, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the rank's own GPU; none is better than a wrong one."""
    names = "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 3090", "NVIDIA H100 PCIe MIG 1g.10gb"
    FakeCuda(monkeypatch.setattr, names)
    device = torch.device("cuda", index)
    assert RUN.precision == "bf16"
    assert flops.peak_of(RUN, device) == peak
    assert flops.peak_of(config.replace(RUN, "precision", "fp32"), device) is None, "the table is bf16's"
    assert flops.peak_of(config.replace(RUN, "machine.peak_tflops", 7.5), device) == 7.5
