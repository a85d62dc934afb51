"""The GPUs of one machine share a work: a process for each, which loads the network for itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, TypeVar

from megapix.errors import InputError, StorageError

R = TypeVar("R")
Work = Callable[[str, Sequence[int], Callable[[int], object]], R]
"""(device, jobs, what is called with the number of samples that are done) -> result."""


def devices() -> list[str]:
    """Names of this machine's GPUs, or the CPU's."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{number}" for number in range(count)] if count > 1 else ["cuda" if count else "cpu"]


def on_each(work: Work[R], jobs: Sequence[int], devices: Sequence[str], update: Callable[[int], object]) -> list[R]:
    """Have each device do its share of the jobs, in processes; returns what `work` returned on each.

    Raises:
        InputError: what a process raised, or one was killed.
    """
    context = get_context("forkserver")
    running: dict[Connection, Any] = {}
    results: list[R] = []
    try:
        for number, device in enumerate(devices):
            ours, theirs = context.Pipe()
            share = jobs[number :: len(devices)]
            process = context.Process(target=_run, args=(work, device, share, theirs))
            process.start()
            theirs.close()
            running[ours] = process
        while running:
            for ready in connection.wait(list(running)):
                assert isinstance(ready, Connection)
                try:
                    kind, value = ready.recv()
                except EOFError as error:
                    running[ready].join()
                    raise InputError(
                        f"the process of a GPU ended with code {running[ready].exitcode}, perhaps killed for want of "
                        "memory; the same command resumes from here"
                    ) from error
                if kind == "done":
                    update(value)
                    continue
                if kind == "error":
                    raise value
                results.append(value)
                running.pop(ready).join()
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    return results


def _run(work: Work[R], device: str, jobs: Sequence[int], told: Connection) -> None:
    """In a process of its own, which ends with the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        told.send(("result", work(device, jobs, partial(_tell, told))))
    except KeyboardInterrupt:
        pass
    except (InputError, StorageError) as error:
        told.send(("error", error))
    except OSError as error:
        told.send(("error", OSError(error.errno, error.strerror, error.filename)))


def _tell(told: Connection, samples: int) -> None:
    told.send(("done", samples))


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
