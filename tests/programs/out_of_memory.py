"""`megapix ARGUMENTS`, but on some ranks an allocation fails in one phase, with the words of torch's own allocator.

usage: python -m tests.programs.out_of_memory PHASE RANKS ARGUMENTS…

RANKS is 0, 1 or 01. PHASE is one of the watchdog's; at the third step where there are steps. 'worker' asks the host
for more than there is, in a process of the loader.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megapix.checkpoint.buffers import HostCopy
from megapix.cli import main as cli
from megapix.data import loader
from megapix.data.loader import MicroBatches
from megapix.diffusion import flow
from megapix.engine.zero2 import Zero2Engine
from megapix.evaluation import run as evaluation
from megapix.train import run, sample_grid, small_evaluation
from megapix.train.validation_loss import ValidationLoss

GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is "
    "free. Process 77 has 78.08 GiB memory in use. Of the allocated memory 70.31 GiB is allocated by PyTorch, and "
    "6.50 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  "
    "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
"""CUDACachingAllocator.cpp of torch 2.9 and later."""
PLACES: dict[str, tuple[Any, str, int]] = {
    "start": (run, "build_network", 1),
    "data": (MicroBatches, "_batch", 3),
    "backward": (flow, "training_loss", 3),
    "step": (Zero2Engine, "step", 3),
    "save": (HostCopy, "take", 1),
    "sample": (sample_grid, "generate_as", 1),
    "validate": (ValidationLoss, "_sums", 2),
    "evaluate": (small_evaluation, "generate_images", 1),
    "megapix evaluate": (evaluation, "generate_images", 1),
}
"""Phase -> where it fails, and in which call."""


class Greedy(MicroBatches):
    """Micro batches that no host has room for."""

    def _batch(self, positions: Any) -> Any:
        return np.empty(2**58, np.uint8)


def failing(function: Callable[..., Any], at: int, error: Exception) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    phase, ranks, *arguments = sys.argv[1:]
    if os.environ["RANK"] in ranks and phase == "worker":
        from tests.programs import out_of_memory as importable

        loader.MicroBatches = importable.Greedy  # type: ignore[misc]
    elif os.environ["RANK"] in ranks:
        owner, name, at = PLACES[phase]
        setattr(owner, name, failing(getattr(owner, name), at, torch.OutOfMemoryError(GPU)))
    raise SystemExit(cli.main(arguments))
