"""What the recorder lists, against counts by hand. Ends with an error if one is wrong.

usage: python -m tests.programs.fake_cuda_kernels
"""

# ruff: noqa: E402

from __future__ import annotations

from benchmarks.fake_cuda import guard

guard.load()

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from benchmarks.fake_cuda import attention
from benchmarks.fake_cuda.recorder import Recorder

ON = torch.device("cuda", 0)


def bf16(*shape: int) -> Any:
    return torch.empty(shape, dtype=torch.bfloat16, device=ON)


def recorded(work: Callable[[], Any]) -> Recorder:
    with Recorder() as recorder:
        work()
    return recorder


def kernels(work: Callable[[], Any]) -> list[tuple[str, int, int]]:
    """Name, bytes and FLOPs of each."""
    return [(k.name.split(".")[1], k.bytes, k.flops) for k in recorded(work).kernels]


def waits(work: Callable[[], Any], *pinned: Tensor) -> list[str]:
    """What the host waits for."""
    with Recorder(pinned) as recorder:
        work()
    return [copy.name for copy in recorder.waits]


def bytes_and_flops() -> None:
    x, row = bf16(4, 6, 8), bf16(1, 1, 8)
    assert kernels(lambda: x + row) == [("add", 2 * (192 + 8 + 192), 0)]
    assert kernels(lambda: x + row.expand(4, 6, 8)) == [("add", 2 * (192 + 8 + 192), 0)], (
        "expanded numbers are read once"
    )
    assert kernels(lambda: x.mul_(row)) == [("mul_", 2 * (192 + 8 + 192), 0)], "read and written in place"
    assert kernels(lambda: x.copy_(row)) == [("copy_", 2 * (192 + 8), 0)], "only written"
    assert kernels(lambda: x[:, :3] * 2) == [("mul", 2 * (96 + 96), 0)]
    assert kernels(lambda: x.float()) == [("_to_copy", 192 * (2 + 4), 0)]
    assert kernels(lambda: x.view(24, 8).t().flatten(0, 0)) == [], "views launch nothing"
    assert kernels(lambda: torch.empty_like(x)) == []
    assert kernels(lambda: bf16(5, 8) @ bf16(8, 3)) == [("mm", 2 * (40 + 24 + 15), 2 * 5 * 8 * 3)]
    (linear,) = kernels(lambda: F.linear(bf16(5, 8), bf16(3, 8), bf16(3)))
    assert linear == ("addmm", 2 * (3 + 40 + 24 + 15), 2 * 5 * 8 * 3)
    q, k = (bf16(2, 3, length, 16).requires_grad_() for length in (10, 14))
    with Recorder() as recorder:
        F.scaled_dot_product_attention(q, k, k).backward(bf16(2, 3, 10, 16))
    forward, backward = (one for one in recorder.kernels if one.flops)
    assert "flash" in forward.name
    assert forward.flops == 2 * 2 * (2 * 3) * 10 * 14 * 16
    assert backward.flops == 5 * 2 * (2 * 3) * 10 * 14 * 16
    mask = torch.ones(2, 1, 1, 14, dtype=torch.bool, device=ON)
    (masked,) = (one for one in recorded(lambda: F.scaled_dot_product_attention(q, k, k, mask)).kernels if one.flops)
    assert "cudnn" in masked.name


def copies() -> None:
    with unset_fake_temporarily():
        host = torch.zeros(3, dtype=torch.long)
    device = bf16(3)
    assert waits(lambda: host.to(ON)) == ["to device"]
    assert waits(lambda: host.to(ON, non_blocking=True)) == ["to device"], "for it is not page-locked"
    assert waits(lambda: host.to(ON, non_blocking=True), host) == []
    assert waits(lambda: host[1:].to(ON, non_blocking=True), host) == []
    assert waits(lambda: host.to(ON), host) == ["to device"]
    assert waits(lambda: torch.tensor([1.0, 2.0], device=ON)) == ["to device"]
    assert waits(lambda: torch.full((2,), 1.0, device=ON)) == []
    assert waits(lambda: device.cpu()) == ["to host"]
    assert waits(lambda: device[0].item()) == ["item"]
    assert waits(lambda: float(device.sum())) == ["item"]
    assert waits(lambda: device.tolist()) == ["tolist"]
    assert waits(lambda: bool(device.isfinite().all())) == ["item"]
    assert waits(lambda: torch.zeros(3).sum().item()) == [], "the host's own numbers"
    with Recorder():
        assert (torch.arange(4) * 2).tolist() == [0, 2, 4, 6], "which it has"


def devices() -> None:
    with pytest.raises(RuntimeError, match=r"same device|two different devices"):
        recorded(lambda: bf16(3) + torch.zeros(3))


def main() -> None:
    attention.choose()
    with FakeTensorMode(allow_non_fake_inputs=True):
        bytes_and_flops()
        copies()
        devices()
    print("as counted by hand")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
