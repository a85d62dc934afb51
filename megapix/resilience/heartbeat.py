"""What heartbeats consist of: the last word of a rank, and the TCP link that carries it.

A word is what the training loop noted last: step, phase, time. All ranks note the same phases in the same order, so
their words can be compared; noting the same phase again only renews the time.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

BEAT = 1.0
"""Seconds between heartbeats of few ranks."""
BEATS = 256.0
"""Heartbeats a second that rank 0 takes of many ranks: each of them beats less often, so that it costs rank 0 the same
(docs/scale.md)."""


def period(ranks: int, seconds: float) -> float:
    """Seconds between heartbeats, at least four in the `seconds` after which silence is a death."""
    return min(max(BEAT, ranks / BEATS), seconds / 4)


@dataclass(frozen=True)
class Word:
    """The last word of a rank."""

    step: int = 0
    phase: str = "start"
    turn: int = 0
    """Phases noted in this step before this one: (step, turn) says how far the rank is."""
    patience: float = 0.0
    """Seconds that may pass until the next word."""
    when: float = field(default_factory=time.time)
    """Wall clock of its host, in seconds since 1970."""
    at: float = field(default_factory=time.monotonic)
    """The same moment on the monotonic clock of the process that holds this object."""


def line(message: Mapping[str, Any]) -> bytes:
    """A message as a link sends it."""
    return json.dumps(message).encode() + b"\n"


class Link:
    """A TCP connection that carries one JSON message a line and never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.closed = False
        self._half = b""

    def send(self, line: bytes) -> None:
        """Hand a line to the kernel; one for which there is no room is for a rank that stopped reading long ago."""
        with suppress(OSError):  # a broken connection is found by reading, behind what the other end said last
            self.socket.send(line)

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def read(self) -> list[dict[str, Any]]:
        """Every whole message that has come; afterwards `closed` says whether the other end is gone.

        Raises:
            ValueError: a line that is not JSON.
        """
        data = self._half
        try:
            while more := self.socket.recv(1 << 16):
                data += more
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._half = data.split(b"\n")
        return [json.loads(line) for line in lines]


@dataclass
class Peer:
    """What this rank knows of another."""

    host: str
    word: Word
    heard: float
    """When its last message came (monotonic)."""
    link: Link | None = None
    attempt: int = 0
    """Which of its calls the link came from."""
    left: bool = False
    """Whether it has said goodbye."""
