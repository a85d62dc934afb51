"""`megapix ARGUMENTS`, but on some ranks an allocation fails in one phase, with the words of torch's own allocator.

usage: python -m tests.programs.out_of_memory PHASE RANKS ARGUMENTS…

RANKS is 0, 1 or 01. PHASE is one of the watchdog's; at the third step where there are steps. 'worker' asks the host
for more than there is, in a process of the loader.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch

from megapix.cli import main as cli
from megapix.data import loader
from megapix.data.assemble import Assembler
from megapix.evaluation import run as evaluation
from megapix.train import small_evaluation
from tests.support import failing_calls
from tests.support.failing_calls import Place, fail

GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is "
    "free. Process 77 has 78.08 GiB memory in use. Of the allocated memory 70.31 GiB is allocated by PyTorch, and "
    "6.50 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory Management  "
    "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
"""CUDACachingAllocator.cpp of torch 2.9 and later."""
PLACES: dict[str, Place] = failing_calls.PLACES | {
    "evaluate": (small_evaluation, "generate_images", 1),
    "megapix evaluate": (evaluation, "generate_images", 1),
}
"""Phase -> where it fails."""


class Greedy(Assembler):
    """Micro batches that no host has room for."""

    def _arrays(self, positions: Any, samples: Any) -> Any:
        return np.empty(2**58, np.uint8)


if __name__ == "__main__":
    phase, ranks, *arguments = sys.argv[1:]
    if os.environ["RANK"] in ranks and phase == "worker":
        from tests.programs import out_of_memory as importable

        loader.Assembler = importable.Greedy  # type: ignore[misc]
    elif os.environ["RANK"] in ranks:
        fail(PLACES[phase], torch.OutOfMemoryError(GPU))
    raise SystemExit(cli.main(arguments))
