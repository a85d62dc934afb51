"""Processes of the loader: how they start, which signals they do not see, and that none is left behind."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Collection
from multiprocessing import forkserver, resource_tracker
from typing import Any

LOADED = "megapix.data.loader"
"""What the server has loaded when it forks a worker."""
QUIET = "ignore:resource_tracker:UserWarning"


def start_server(stops: Collection[signal.Signals]) -> None:
    """Start the process that workers are forked from, so that it loads the loader while the network is built.

    They end with their rank, however it ends.

    Args:
        stops: what asks the run to stop. Server and workers never see these signals: a launcher sends them to all
            processes, and the batches are needed until the ranks have agreed on a step to stop at.
    """
    context()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    sys.warnoptions.append(QUIET)  # it would end a lost rank's last words with what it has cleaned up after it
    resource_tracker.ensure_running()  # unblocks SIGTERM once it has started its own process
    sys.warnoptions.remove(QUIET)
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def context() -> Any:
    """Workers are forked from a clean server process, which has loaded the loader once: a fork of the trainer itself
    would copy its threads' locks."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([LOADED])
    return found


def end_with_rank(_: int) -> None:
    """In a worker: end when the rank has ended, however it did. torch would look for the parent process, which is the
    server, and workers and server hold each other's pipe open."""
    rank = multiprocessing.parent_process()
    assert rank

    def wait() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with rank", daemon=True).start()


def end_at_exit() -> None:
    """At the end of this process, end the workers that it has now, before torch and Python look after them."""
    atexit.unregister(_end)
    atexit.register(_end)  # again for these workers: what is registered last comes first


def _end() -> None:
    """End workers that an error has left: torch and Python would ask with the signal that they do not see, and wait."""
    for worker in multiprocessing.active_children():
        worker.kill()
