"""A stopwatch for the parts of a step: marks on the device's own clock, around functions wrapped from outside."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class Stopwatch:
    """Splits a stretch of time into parts. All time between two marks belongs to the innermost part that is open, so
    the parts add up to the whole, and a part within another is not counted twice.

    On a GPU the marks are events in its current stream, so the parts are times of the GPU; on a CPU perf_counter.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str | None, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as that of `name`; what lies outside of every part is not counted at all."""
        self._mark(name)
        try:
            yield
        finally:
            self._mark(None)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, each call of which is a part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call, in the order in which they began; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        open_parts: list[str] = []
        before: Any = None
        for name, mark in self._marks:
            if open_parts:
                seconds[open_parts[-1]] += self._between(before, mark)
            if name is None:
                open_parts.pop()
            else:
                open_parts.append(name)
                seconds.setdefault(name, 0.0)
            before = mark
        self._marks.clear()
        return seconds

    def _mark(self, name: str | None) -> None:
        """`name` opens a part, None closes the innermost one."""
        if self._cuda:
            mark: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((name, mark))

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start


@dataclass(frozen=True)
class Spread:
    """Repeats of one number: their median and range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Median, smallest and largest."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, unit: str = "s", scale: float = 1.0) -> str:
        """Such as '1.23 s (1.20 to 1.31)'."""
        median, low, high = (f"{scale * value:.4g}" for value in (self.median, self.low, self.high))
        return f"{median} {unit} ({low} to {high})"
