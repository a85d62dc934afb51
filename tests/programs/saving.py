"""Ranks that save, without an engine; something goes wrong on rank 1 alone, or between the ranks.

usage: python -m tests.programs.saving RUN

Prints a line of JSON for each of FAULTS: what this rank was told, whether it knew of it before it asked, and what
`latest` names then.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from megapix.checkpoint import folder as checkpoint
from megapix.checkpoint import vectors
from megapix.checkpoint.layout import PARTS, Layout
from megapix.checkpoint.manifest import Counters, State
from megapix.checkpoint.saver import Saver
from megapix.config import CheckpointConfig
from megapix.dist import barrier, from_environment
from megapix.errors import RunError
from tests.support.small_run import SMALL

FAULTS = ("none", "full", "unforeseen", "gone", "cut")


def with_fault(fault: str, write: Callable[..., Any]) -> Callable[..., Any]:
    """How rank 1 writes its file."""

    def wrong(path: Path, *args: Any) -> Any:
        if fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if fault == "unforeseen":
            raise ZeroDivisionError("by nought")
        record = write(path, *args)
        if fault == "gone":
            path.unlink()
        if fault == "cut":
            os.truncate(path, record.size - 1)
        return record

    return wrong


def main(run: Path) -> None:
    world = from_environment()
    torch.distributed.init_process_group("gloo")
    layout, write = Layout({"a": (11,)}, world.size), vectors.write
    start, stop = layout.range_of(world.rank)
    share = {part: torch.arange(start, stop, dtype=torch.float32) for part in PARTS}
    with closing(Saver(run, CheckpointConfig(max_failed=1), world)) as saver:
        for number, fault in enumerate(FAULTS, 1):
            vectors.write = with_fault(fault, write) if world.rank == 1 else write
            saver.save(State(Counters(number, number), SMALL, "", (), layout, number), share)
            assert saver._thread
            saver._thread.join()
            known, told = saver.failed, ""
            try:
                saver.finish()
            except RunError as trouble:
                told = str(trouble)
            latest = checkpoint.latest(run)
            print(json.dumps([fault, known, told, latest.name if latest else None]), flush=True)
    barrier(world)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
