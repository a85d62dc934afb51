"""`megapix ARGUMENTS`, but on one rank an error is raised in one phase; when it was is printed.

usage: python -m tests.programs.failing PHASE ERROR RANK SLOW ARGUMENTS…

PHASE is one of PLACES, ERROR one of ERRORS. SLOW is how many seconds longer each rank's file of a checkpoint takes: a
disk that says nothing meanwhile.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import compile_fx

from megapix.checkpoint import vectors
from megapix.checkpoint.buffers import HostCopy
from megapix.cli import main as cli
from megapix.data.loader import MicroBatches
from megapix.diffusion import flow
from megapix.engine.zero2 import Zero2Engine
from megapix.errors import InputError
from megapix.monitoring.report import Report
from megapix.train import run, sample_grid
from megapix.train.validation_loss import ValidationLoss

PLACES: dict[str, tuple[Any, str, int]] = {
    "start": (run, "build_network", 1),
    "compile": (compile_fx, "compile_fx", 1),
    "data": (MicroBatches, "_batch", 3),
    "backward": (flow, "training_loss", 3),
    "step": (Zero2Engine, "step", 3),
    "save": (HostCopy, "take", 1),
    "sample": (sample_grid, "generate_as", 1),
    "validate": (ValidationLoss, "_sums", 2),
    "close": (Report, "close", 1),
    "none": (Report, "close", 2),
}
"""Phase -> where it fails, and in which call."""
ERRORS: dict[str, BaseException] = {
    "input": InputError("shard-000001.tar: sample 17: its bytes are not those that were indexed"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "storage": OSError(5, "Input/output error", "/shards/shard-000001.tar"),
    "interrupt": KeyboardInterrupt(),
    "bug": KeyError("a bug"),
}


def failing(function: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            print(f"fault {time.time()}", flush=True)
            raise error
        return function(*args, **kwargs)

    return call


def slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    phase, kind, rank, seconds, *arguments = sys.argv[1:]
    if float(seconds):
        vectors.write = slow(vectors.write, float(seconds))
    if os.environ["RANK"] == rank:
        owner, name, at = PLACES[phase]
        setattr(owner, name, failing(getattr(owner, name), at, ERRORS[kind]))
    raise SystemExit(cli.main(arguments))
