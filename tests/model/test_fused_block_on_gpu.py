"""Triton's kernels start on the GPU of their tensors, whichever one is current."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from megapix.model import fused_block, pixel_kernels


class Kernel:
    """Takes a kernel's place."""

    def __init__(self, within: list[Tensor]) -> None:
        self._within, self.started = within, list[tuple[Any, ...]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*tensors: Any, **constants: Any) -> None:
            self.started.append((grid, [tensor.data_ptr() for tensor in self._within], tensors[0].data_ptr()))

        return start


def test_a_kernel_starts_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    within: list[Tensor] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        within.append(tensor)
        yield
        within.pop()

    kernel = Kernel(within)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(pixel_kernels, "norm_modulate_forward", kernel)
    x, modulation = torch.ones(3, 5, 16), torch.ones(3, 5, 6 * 16)
    fused_block._norm_modulate(x, torch.ones(16), modulation)
    assert kernel.started == [((1,), [x.data_ptr()], x.data_ptr())]


def test_tensors_of_two_devices_never_reach_a_kernel() -> None:
    x, modulation = torch.ones(3, 5, 16), torch.ones(3, 5, 6 * 16)
    with pytest.raises(ValueError, match=r"torch.float32 on meta beside x of torch.float32 on cpu"):
        fused_block._check(x, modulation, 6, torch.ones(16, device="meta"))
