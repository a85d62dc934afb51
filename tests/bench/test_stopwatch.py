"""Times of a GPU: events in its stream, read when it has got there."""

from __future__ import annotations

import pytest
import torch

from megapix.bench import peak
from megapix.bench.peak import Matmul
from megapix.bench.report import device_name
from megapix.bench.stopwatch import Stopwatch
from megapix.config import tiny
from tests.support.fake_cuda import NAMES, FakeCuda

GPU = torch.device("cuda", 1)


def test_parts_are_measured_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event is a second after the one before it: 1 step 2 [forward 3] 4 [backward 5] 6 step."""
    cuda = FakeCuda(monkeypatch.setattr)
    watch = Stopwatch(GPU)
    with watch.part("step"):
        with watch.part("forward"):
            pass
        with watch.part("backward"):
            pass
    assert cuda.calls == [("record",)] * 6
    assert watch.read() == {"step": 3.0, "forward": 1.0, "backward": 1.0}
    assert cuda.calls == [*[("record",)] * 6, ("synchronize",)]


def test_products_are_measured_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product between two events takes a second."""
    product = Matmul(4, 8, 2)
    with FakeCuda(monkeypatch.setattr) as cuda:
        assert peak.measure([product], "bf16", GPU) == {product: product.flops / 1e12}
    assert cuda.calls == [("record",), ("record",), ("synchronize",)] * 9
    assert cuda.copies == []


def test_squares_of_a_gpu() -> None:
    assert [matmul.rows for matmul in peak.matmuls(tiny(), 4, "cuda")[:3]] == [2048, 4096, 8192]
    assert [matmul.rows for matmul in peak.matmuls(tiny(), 4, "cpu")[:3]] == [512, 1024, 2048]


def test_a_gpu_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch.setattr)
    assert device_name(GPU) == NAMES[1]
    assert device_name(torch.device("cpu")) not in NAMES
