"""Processes of the loader: how they start, which signals they do not see, what becomes of one that is killed, and that
none is left behind."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import forkserver, resource_tracker
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.sharedctypes import RawValue
from typing import Any

import psutil

from megapix import outage
from megapix.allocator import keep_small_freed_memory
from megapix.data.assemble import Asked, Assembler
from megapix.data.handover import Receiver, Sender
from megapix.dist import STOPS, stops_held_back, warn
from megapix.errors import RankLost

LOADED = "megapix.data.workers"
"""What the server has loaded when it forks a worker: no torch, which takes seconds and 0.2 GiB of each."""
REMOTE = ("aiohttp", "fsspec.implementations.http")
"""And for data that lie on a server: half a second of each worker's first batch."""
PREFETCH = 4
"""Micro batches that each worker keeps ready."""
RESTARTS = 3
"""How often in a row killed workers are started again."""
DEATH = 2.0
"""Seconds that a worker's end may take to be known after the error that it causes."""
WAITED = RawValue("d", 0.0)
"""When this rank or a worker of it last waited for storage (`outage.note_waits`)."""
QUIET = "ignore:resource_tracker:UserWarning"


def start_server(remote: bool = False) -> None:
    """Start the process that workers are forked from, so that it loads the loader while the network is built.

    They end with their rank, however it ends. Server and workers never see the signals that ask a run to stop: the
    batches are needed until the ranks have agreed on a step to stop at.
    """
    context(remote)
    with stops_held_back():
        sys.warnoptions.append(QUIET)  # it would end a lost rank's last words with what it has cleaned up after it
        resource_tracker.ensure_running()  # unblocks SIGTERM once it has started its own process
        sys.warnoptions.remove(QUIET)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        forkserver.ensure_running()


def context(remote: bool = False) -> Any:
    """Workers are forked from a clean server process, which has loaded the loader once, and for remote data what speaks
    with servers: a fork of the trainer itself would copy its threads' locks."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([LOADED, *(REMOTE if remote else ())])
    return found


@dataclass
class _Worker:
    """One process, and what has come from it."""

    process: Any
    receiver: Receiver
    received: int


class Workers:
    """Processes that make a rank's micro batches: of n of them each makes every n-th, and keeps PREFETCH ready.

    One that is killed is started again for the batches that have not come: what it makes is a function of positions.

    Args:
        assembler: makes the batches.
        asked: the positions of each.
        number: of the processes.
        rank: for messages.
    """

    def __init__(self, assembler: Assembler, asked: Asked, number: int, rank: int) -> None:
        self._assembler, self._asked, self._number, self._rank = assembler, asked, number, rank
        self._restarts, self._closed, self._lock = 0, False, threading.Lock()
        self._workers = [self._started(place, 0) for place in range(number)]
        end_at_exit()

    def each(self) -> Iterator[Any]:
        """What they make, in the order in which it was asked for.

        Raises:
            RankLost: without a batch in between they have been killed more than RESTARTS times.
            Exception: one of a worker, which no value stands for (`Assembler.each`).
        """
        for turn in count():
            made, error = self._next(turn % self._number)
            if error is not None:
                raise error
            yield made

    def close(self) -> None:
        """End them."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.process.kill()  # they do not see the signal that would ask them
        for worker in self._workers:
            worker.process.join()

    def _next(self, place: int) -> Any:
        while True:
            worker = self._workers[place]
            try:
                made = worker.receiver.receive()
            except (EOFError, OSError) as error:
                self._start_again(error)
                continue
            worker.received += 1
            self._restarts = 0
            return made

    def _start_again(self, error: Exception) -> None:
        """Start those that have been killed once more."""
        processes = [worker.process for worker in self._workers]
        with self._lock:
            if self._closed or not (ends := killed(processes)):
                raise error
            self._restarts += 1
            if self._restarts > RESTARTS:
                raise RankLost(
                    f"the data workers of rank {self._rank} are lost, {self._restarts} times in a row: {ends}"
                ) from error
            again = f"its workers start again ({self._restarts} of {RESTARTS} in a row)"
            warn(f"rank {self._rank}: data {ends}; {again}")
            for place, worker in enumerate(self._workers):
                if not worker.process.is_alive():
                    worker.receiver.connection.close()
                    self._workers[place] = self._started(place, worker.received)
        end_at_exit()

    def _started(self, place: int, received: int) -> _Worker:
        here, there = multiprocessing.Pipe()
        work = (self._assembler, self._asked, place + received * self._number, self._number, there, WAITED)
        process = context(self._assembler.located.remote).Process(
            target=_work, args=work, name=f"data worker {place}", daemon=True
        )
        process.start()
        there.close()
        return _Worker(process, Receiver(here), received)


def _work(assembler: Assembler, asked: Asked, first: int, step: int, connection: Any, clock: Any) -> None:
    """In a worker: make every `step`-th of the batches that are asked for, from number `first` on."""
    begin(clock)
    made, sender = assembler.each(asked.some(first, step)), Sender(connection)
    try:
        for number in count():
            if number >= PREFETCH:
                sender.wait()  # one of them has been taken
            sender.send((next(made), None))
    except Exception as error:
        with suppress(OSError):  # the rank has ended
            sender.send((None, _portable(error)))


def _portable(error: Exception) -> Any:
    """An error as another process can have it, with the traceback of here."""
    try:
        found = ExceptionWithTraceback(error, error.__traceback__)
        pickle.loads(pickle.dumps(found))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return found


def begin(clock: Any) -> None:
    """In a worker: note its waits in the rank's `clock`, keep what it frees, and end when the rank has ended, however
    it did. Workers and server hold each other's pipe open, and the parent process is the server."""
    outage.note_waits(clock)
    keep_small_freed_memory()
    rank = multiprocessing.parent_process()
    assert rank

    def wait() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with rank", daemon=True).start()


def killed(found: Collection[Any]) -> str:
    """The workers among `found` that have been killed, in words, with the memory that is left; '' if none has.

    An error of a loader that lost one comes before its end is known everywhere, so this waits a moment.
    """
    if not found:
        return ""
    multiprocessing.connection.wait([worker.sentinel for worker in found], timeout=DEATH)
    dead = [(number, worker) for number, worker in enumerate(found) if not worker.is_alive()]
    if not dead:
        return ""
    memory = psutil.virtual_memory()
    ends = ", ".join(f"worker {number} (process {worker.pid}) {_end_of(worker.exitcode)}" for number, worker in dead)
    return f"{ends}; {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of this host's memory are free"


def _end_of(code: int) -> str:
    if code < 0:
        by = signal.Signals(-code).name
        return f"was killed by {by}" + (", as the kernel does where memory runs out" if by == "SIGKILL" else "")
    return f"ended with code {code}"


def end_at_exit() -> None:
    """At the end of this process, end the workers that it has now, before torch and Python look after them."""
    atexit.unregister(_end)
    atexit.register(_end)  # again for these workers: what is registered last comes first


def _end() -> None:
    """End workers that an error has left: torch and Python would ask with the signal that they do not see, and wait."""
    for worker in multiprocessing.active_children():
        worker.kill()
