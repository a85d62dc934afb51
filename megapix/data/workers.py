"""Processes of the loader: how they start, which signals they do not see, and that none is left behind."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Collection
from multiprocessing import forkserver, resource_tracker
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import psutil

from megapix import outage
from megapix.dist import STOPS, stops_held_back

LOADED = "megapix.data.loader"
"""What the server has loaded when it forks a worker."""
DEATH = 2.0
"""Seconds that a worker's end may take to be known after the error that it causes."""
WAITED = RawValue("d", 0.0)
"""When this rank or a worker of it last waited for storage (`outage.note_waits`)."""
SEMAPHORES = "megapix"
"""What the names of a rank's semaphores begin with; its process id follows."""
QUIET = "ignore:resource_tracker:UserWarning"


def start_server() -> None:
    """Start the process that workers are forked from, so that it loads the loader while the network is built.

    They end with their rank, however it ends. Server and workers never see the signals that ask a run to stop: the
    batches are needed until the ranks have agreed on a step to stop at.
    """
    context()
    _name_semaphores()
    with stops_held_back():
        sys.warnoptions.append(QUIET)  # it would end a lost rank's last words with what it has cleaned up after it
        resource_tracker.ensure_running()  # unblocks SIGTERM once it has started its own process
        sys.warnoptions.remove(QUIET)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        forkserver.ensure_running()


def _name_semaphores() -> None:
    """Name this process's semaphores after it, and remove those of processes that were killed: nobody else knows them.

    They lie in /dev/shm until their process ends, or for ever.
    """
    multiprocessing.current_process()._config["semprefix"] = f"/{SEMAPHORES}-{os.getpid()}"  # type: ignore[attr-defined]
    for path in Path("/dev/shm").glob(f"sem.{SEMAPHORES}-*"):
        pid = path.name.split("-")[1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)


def context() -> Any:
    """Workers are forked from a clean server process, which has loaded the loader once: a fork of the trainer itself
    would copy its threads' locks."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([LOADED])
    return found


def begin(clock: Any, _: int) -> None:
    """In a worker: note its waits in the rank's `clock`, and end when the rank has ended, however it did. torch would
    look for the parent process, which is the server, and workers and server hold each other's pipe open."""
    outage.note_waits(clock)
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
