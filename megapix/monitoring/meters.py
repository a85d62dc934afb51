"""Meters: losses kept on the device until they are read, throughput and waiting time, memory."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor

QUARTERS = 4


class LossMeter:
    """Sums of the loss over a window, total and by quarter of t, on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, QUARTERS, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, t: Tensor) -> None:
        """Add a micro batch: loss [B] and t [B] float32. Does not wait for the device.

        Losses that are not finite are left out: they belong to skipped steps, which are counted separately.
        """
        quarter = (t * QUARTERS).long().clamp(max=QUARTERS - 1)
        loss = loss.detach().double()
        finite = loss.isfinite()
        self._sums.index_add_(1, quarter, torch.stack([loss.where(finite, 0.0), finite.double()]))

    @property
    def sums(self) -> Tensor:
        """This rank's since the last `read`: float64 [2, QUARTERS], losses and how many; writing to it counts."""
        return self._sums

    def read(self, ranks: int, keep: bool = False) -> dict[str, float]:
        """Means over all ranks since the last call that did not `keep` the sums. A quarter without samples is left
        out."""
        sums, counts = _over_ranks(self._sums, ranks, keep)
        means = {f"loss/t_{i}_of_{QUARTERS}": s / n for i, (s, n) in enumerate(zip(sums, counts, strict=True), 1) if n}
        return {"loss/train": sum(sums) / sum(counts)} | means if means else {}


class DeviceMean:
    """Mean of per-sample values over a window, on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """Add a micro batch [B]; values that are not finite are left out. Does not wait for the device."""
        values = values.detach().double()
        finite = values.isfinite()
        self._sums += torch.stack([values.where(finite, 0.0).sum(), finite.double().sum()])

    @property
    def sums(self) -> Tensor:
        """This rank's since the last `read`: float64 [2], values and how many; writing to it counts."""
        return self._sums

    def read(self, ranks: int, keep: bool = False) -> float | None:
        """Mean over all ranks since the last call that did not `keep` the sums, None without a value."""
        total, count = _over_ranks(self._sums, ranks, keep)
        return total / count if count else None


def _over_ranks(sums: Tensor, ranks: int, keep: bool) -> Any:
    """The numbers' sums over all ranks; zeroed here, unless they are to be kept."""
    whole = sums.clone()
    if not keep:
        sums.zero_()
    if ranks > 1:
        torch.distributed.all_reduce(whole)
    return whole.tolist()


class Mean:
    """A running mean of plain numbers."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    @property
    def value(self) -> float | None:
        """The mean, or None without a number."""
        return self._sum / self._count if self._count else None

    def add(self, value: float) -> None:
        """Take a number; one that is not finite is left out."""
        if math.isfinite(value):
            self._sum += value
            self._count += 1

    def __add__(self, other: Mean) -> Mean:
        """The mean of the numbers of both."""
        both = Mean()
        both._sum, both._count = self._sum + other._sum, self._count + other._count
        return both


class Clock:
    """Wall time of a window, and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def read(self, images: int) -> dict[str, float]:
        """images/s and the share of time waited for data since the last call, and reset."""
        elapsed = time.perf_counter() - self._start
        row = {"speed/images_per_s": images / elapsed, "speed/data_wait_share": self._waited / elapsed}
        self._start, self._waited = time.perf_counter(), 0.0
        return row


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB: resident on the host, allocated on a GPU."""
    row = {"memory/host_peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        row["memory/gpu_peak_GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row
