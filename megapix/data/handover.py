"""How a worker hands a micro batch over: arrays in shared memory of no name, which no killed process leaves behind.

worker     Sender      pickle, its arrays copied into a memfd  ──▶  the pickle, and the descriptor of a new memfd
trainer    Receiver    maps each memfd once; the arrays lie in it, and with the last of them it is free again
worker     Sender      ◀──  which are free: the next batch is copied into one of these

Memory that is used again costs a copy and nothing else; the kernel takes longer than that to make new pages.
"""

from __future__ import annotations

import mmap
import os
import pickle
import weakref
from collections import deque
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np

ALIGNED = 64
"""Arrays begin at multiples of it."""


class Sender:
    """A worker's end of a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._memory: dict[int, mmap.mmap] = {}
        self._free: list[int] = []
        self._made = 0

    def send(self, value: Any) -> None:
        """Hand a value over, its arrays without a copy through the socket.

        Raises:
            OSError: no memory; or nobody is there any more.
        """
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(value, 5, buffer_callback=buffers.append)
        places, end = list[tuple[int, int]](), 0
        for buffer in buffers:
            start = -(-end // ALIGNED) * ALIGNED
            end = start + buffer.raw().nbytes
            places.append((start, end))
        number, outgrown = self._room(end) if end else (-1, ())
        new = end > 0 and number not in self._memory
        with ExitStack() as stack:
            if new:
                descriptor = os.memfd_create("megapix-batch")
                stack.callback(os.close, descriptor)
                os.ftruncate(descriptor, end)
                self._memory[number] = mmap.mmap(descriptor, end, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            for buffer, (start, stop) in zip(buffers, places, strict=True):
                if start < stop:
                    self._memory[number][start:stop] = buffer.raw()
            self._connection.send_bytes(pickle.dumps((data, places, number, new, outgrown)))
            if new:
                send_handle(self._connection, descriptor, None)

    def wait(self) -> None:
        """Until a value has been taken."""
        self._free += pickle.loads(self._connection.recv_bytes())

    def _room(self, size: int) -> tuple[int, tuple[int, ...]]:
        """(number of the memory to use, those that are dropped for it): the smallest that is free and large enough, or
        a new one in place of all that are free, which are smaller."""
        fitting = [number for number in self._free if len(self._memory[number]) >= size]
        if fitting:
            number = min(fitting, key=lambda found: len(self._memory[found]))
            self._free.remove(number)
            return number, ()
        outgrown, self._free = tuple(self._free), []
        for number in outgrown:
            del self._memory[number]
        self._made += 1
        return self._made, outgrown


class Receiver:
    """The trainer's end of a connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._memory: dict[int, mmap.mmap] = {}
        self._free = deque[int]()
        """Appended to by whatever thread drops the last array of a batch."""

    def receive(self) -> Any:
        """What was sent; the sender learns that it has been taken, and which memory is free.

        Raises:
            EOFError, OSError: the sender has ended.
        """
        data, places, number, new, outgrown = pickle.loads(self.connection.recv_bytes())
        for dropped in outgrown:
            del self._memory[dropped]
        if new:
            descriptor = recv_handle(self.connection)
            try:
                self._memory[number] = mmap.mmap(descriptor, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            finally:
                os.close(descriptor)
        value = pickle.loads(data, buffers=self._arrays(number, places))
        free = [self._free.popleft() for _ in range(len(self._free))]
        with suppress(OSError):  # the sender may just have ended: what it has sent came before
            self.connection.send_bytes(pickle.dumps(free))
        return value

    def _arrays(self, number: int, places: list[tuple[int, int]]) -> list[Any]:
        """What the arrays are made of; the memory is free when nothing of them is left."""
        if number not in self._memory:
            return [bytearray() for _ in places]
        whole = np.frombuffer(self._memory[number], np.uint8)
        weakref.finalize(whole, self._free.append, number).atexit = False
        view = whole.data
        return [view[start:stop] for start, stop in places]
