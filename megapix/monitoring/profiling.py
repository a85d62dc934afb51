"""A trace of a few steps by torch.profiler, for Perfetto, chrome://tracing or TensorBoard's profiler plug-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from megapix.dist import warn

UNTRACED = 3
"""Steps of the process before the trace: compiling, first allocations, and the profiler's own start in the last."""


class Trace:
    """Traces `steps` steps of one rank, once, and writes FOLDER/rank-00000.STEP.pt.trace.json.gz, STEP the first.

    Nothing that is computed changes. The trace holds operators with the shapes of their inputs, and on a GPU kernels
    and copies.

    Args:
        folder: made when the trace is written.
        rank: this rank.
        done: steps taken by the run before this process.
    """

    def __init__(self, steps: int, folder: Path, rank: int, done: int) -> None:
        self._steps, self._path = steps, folder / f"rank-{rank:05d}.{done + UNTRACED + 1}.pt.trace.json.gz"
        self._written = False
        self._profiler: Any = torch.profiler.profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
            schedule=torch.profiler.schedule(wait=UNTRACED, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=True,
        )
        self._profiler.start()

    def begin_step(self) -> None:
        """Another step begins; if the last one that is traced is over, the file is written and the profiler ends."""
        if self._profiler:
            self._profiler.step()
            if self._written:
                self.close()

    def close(self) -> None:
        """Stop; a run that ended within the trace gets what there is of it, one that ended before gets a warning."""
        if self._profiler:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            if not self._written:
                warn(f"profile = {self._steps}: no trace, as the run ended within its first {UNTRACED} steps")

    def _write(self, profiler: Any) -> None:
        """A run does not end because of its trace: what cannot be written is warned about."""
        self._written = True
        part = self._path.with_name(f".{self._path.name}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(part))
            part.replace(self._path)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or error
            warn(f"{self._path}: the trace cannot be written: {why}")
