"""Activations in host memory: pinned, in the order of the GPU's stream, and back where they came from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megapix.engine.offload import offloaded
from tests.support.fake_cuda import FakeCuda


def gradients(device: str, away: bool) -> list[torch.Tensor]:
    """Of x [3, 5], on a device, and of a block's weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator).to(device).requires_grad_()
    block = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    block.to(device)
    forward = offloaded(block, block.forward) if away else block.forward
    (forward(x * 2).square().sum()).backward()
    return [t.grad for t in (x, *block.parameters()) if t.grad is not None]


def test_on_a_gpu_copies_go_through_pinned_memory_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients("cpu", away=False)
    with FakeCuda(monkeypatch.setattr) as cuda:
        found = gradients("cuda:1", away=True)
    assert len(found) == len(expected) == 5
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    there = [copy for copy in cuda.copies if copy.source == "cuda:1"]
    back = [copy for copy in cuda.copies if copy.target == "cuda:1"]
    assert sorted(copy.shape[0] for copy in there) == [4 * 15, 4 * 21, 4 * 21], "what GELU and the two products take"
    assert {(copy.target, copy.pinned, copy.non_blocking) for copy in there} == {("cpu", True, True)}
    assert {(copy.source, copy.pinned, copy.non_blocking) for copy in back} == {("cpu", True, True)}
    assert len(back) == len(there)
    assert ("synchronize",) not in cuda.calls


def test_views_of_one_storage_share_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """There and back: d/dx of sin(2 x[:2]) + cos(2 x[1:])."""

    def waves(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y[:2].sin() + y[1:].cos()

    with FakeCuda(monkeypatch.setattr) as cuda:
        x = torch.tensor([0.5, 1.0, 1.5], device="cuda:1", requires_grad=True)
        offloaded(nn.Identity(), waves)(x).sum().backward()
        assert isinstance(x.grad, torch.Tensor)
        found = x.grad.tolist()
    sines, cosines = [0.5, 1.0], [1.0, 1.5]
    by_hand = [2 * math.cos(2 * v) for v in sines] + [0.0]
    by_hand = [v - w for v, w in zip(by_hand, [0.0, *(2 * math.sin(2 * v) for v in cosines)], strict=True)]
    assert found == pytest.approx(by_hand, abs=1e-6)
    assert [(copy.source, copy.target) for copy in cuda.copies] == [("cuda:1", "cpu"), ("cpu", "cuda:1")]
