"""How the ranks' watchdogs meet: rank 0 listens, and the others call."""

from __future__ import annotations

import os
import resource
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any

from megapix.errors import InputError
from megapix.resilience.heartbeat import Link, line

CALL_AGAIN = 0.1
"""Seconds between two calls to rank 0."""


def listen(ranks: int) -> socket.socket:
    """A listening socket on a free port of every interface, with room for all ranks to call at once.

    Raises:
        InputError: this process may not open so many files.
    """
    _check_files(ranks)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=ranks, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=ranks)


def reach(port: int, hello: Mapping[str, Any], seconds: float) -> tuple[Link, list[dict[str, Any]]]:
    """A link to rank 0 at MASTER_ADDR, and its answer to `hello`.

    Rank 0 is called until it answers: a kernel whose queue of callers is full breaks what seems to be connected.

    Raises:
        InputError: it does not answer in `seconds`.
    """
    address, attempt, until = os.environ["MASTER_ADDR"], 0, time.monotonic() + seconds
    while True:
        attempt += 1
        try:
            return _call(address, port, {**hello, "attempt": attempt}, seconds)
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"machine.watchdog = {seconds:g}: rank 0 cannot be reached at {address}:{port} "
                    f"({error}); expected TCP between the nodes, or 0 (off)"
                ) from error
            time.sleep(CALL_AGAIN)


def _call(address: str, port: int, hello: Mapping[str, Any], seconds: float) -> tuple[Link, list[dict[str, Any]]]:
    connection = socket.create_connection((address, port), timeout=seconds)
    link = Link(connection)
    link.send(line(hello))
    with selectors.DefaultSelector() as answered:  # select() itself knows no file above number 1,023
        answered.register(connection, selectors.EVENT_READ)
        answered.select(seconds / 4)
    answer = link.read()
    if not answer:
        connection.close()
        raise ConnectionError("no answer")
    return link, answer


def _check_files(ranks: int) -> None:
    needed, (limit, _) = len(os.listdir("/proc/self/fd")) + ranks, resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:  # `dist.allow_files` has raised it
        raise InputError(
            f"the limit of open files is {limit}: with {ranks} ranks, rank 0 needs {needed}; expected more "
            "(`ulimit -Hn`), or --machine.watchdog 0"
        )
