"""How a worker hands a micro batch over: arrays in memory of no name, which no killed process leaves behind.

worker     send       pickle, its arrays written into a memfd  ──▶  the pickle and the descriptor, through a socket
trainer    receive    maps the memory; the arrays lie in it, and it is freed with the last of them
"""

from __future__ import annotations

import mmap
import os
import pickle
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

ALIGNED = 64
"""Arrays begin at multiples of it."""


def send(connection: Connection, value: Any) -> None:
    """Hand a value over, its arrays without a copy through the socket.

    Raises:
        OSError: no memory; or nobody is there any more.
    """
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, 5, buffer_callback=buffers.append)
    memory = os.memfd_create("megapix-batch")
    try:
        places, end = list[tuple[int, int]](), 0
        for buffer in buffers:
            raw, start = buffer.raw(), -(-end // ALIGNED) * ALIGNED
            end = start + _write(memory, raw, start)
            places.append((start, end))
        os.ftruncate(memory, end)  # an empty array at the end has a place, too
        connection.send_bytes(pickle.dumps((data, places)))
        send_handle(connection, memory, None)
    finally:
        os.close(memory)


def _write(file: int, data: memoryview, start: int) -> int:
    """Bytes written, all of them; the system takes 2 GiB at most at a time."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], start + done)
    return done


def receive(connection: Connection) -> Any:
    """What was sent.

    Raises:
        EOFError, OSError: the sender has ended.
    """
    data, places = pickle.loads(connection.recv_bytes())
    memory = recv_handle(connection)
    try:
        size = max((end for _, end in places), default=0)
        if not size:
            return pickle.loads(data, buffers=[bytearray() for _ in places])
        whole = memoryview(mmap.mmap(memory, size, mmap.MAP_SHARED | mmap.MAP_POPULATE))
        return pickle.loads(data, buffers=[whole[start:end] for start, end in places])
    finally:
        os.close(memory)
