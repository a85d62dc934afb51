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
from megapix.cli import main as cli
from megapix.errors import InputError
from megapix.monitoring.report import Report
from tests.support import failing_calls
from tests.support.failing_calls import Place, fail

PLACES: dict[str, Place] = failing_calls.PLACES | {
    "compile": (compile_fx, "compile_fx", 1),
    "close": (Report, "close", 1),
    "none": (Report, "close", 2),
}
"""Phase -> where it fails."""
ERRORS: dict[str, BaseException] = {
    "input": InputError("shard-000001.tar: sample 17: its bytes are not those that were indexed"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "storage": OSError(5, "Input/output error", "/shards/shard-000001.tar"),
    "interrupt": KeyboardInterrupt(),
    "bug": KeyError("a bug"),
}


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
        fail(PLACES[phase], ERRORS[kind])
    raise SystemExit(cli.main(arguments))
