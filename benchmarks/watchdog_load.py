"""What the watchdog costs rank 0 of a large world, and how soon it finds a rank that is gone or hangs.

usage: python -m benchmarks.watchdog_load [--ranks 1024] [--watchdog 60] [--seconds 20] [--faults]

Rank 0 is a real one in a process of its own, with nothing to do but its watchdog. All others are played by one other
process, each with a TCP connection of its own, over which it speaks the watchdog's protocol. The share of a core is CPU
time of the whole of rank 0's process. With --faults three more worlds follow, in which a peer's connection closes, a
peer says nothing more, and a peer says the same word for ever; the time is that from then to the end of rank 0's
process.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from megapix.dist import World, allow_files
from megapix.resilience import watchdog
from megapix.resilience.heartbeat import Link, line, period

STEP = 1.0
"""Seconds of a step of the world that is played."""
FAULTS = ("gone", "silent", "hangs")
SPAWN = multiprocessing.get_context("spawn")
Pipe = multiprocessing.connection.Connection


def rank_0(ranks: int, limit: float, seconds: float, pipe: Pipe) -> None:
    """Watch for some seconds (for ever if a rank is to be lost), and send the share of a core."""

    def met(_: World, mine: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        pipe.send(mine)
        return [mine, *((f"node{rank // 8}", 0, "", limit) for rank in range(1, ranks))]

    def once_all_have_called(_: World, work: Callable[[], Any]) -> Any:
        value = work()
        if value is None:
            pipe.recv()
        return value

    # What is played are the collectives by which the ranks learn of each other.
    watchdog.gather, watchdog.on_all_ranks = met, once_all_have_called  # type: ignore[assignment]
    allow_files()  # as a run has before
    begun = time.perf_counter()
    with watchdog.Watchdog(World(0, ranks), limit) as watch:
        pipe.send(time.perf_counter() - begun)
        watch.note(1, "data")
        end, busy = time.monotonic() + seconds, time.process_time()
        step, tick = 1, threading.Event()
        while time.monotonic() < end:
            step += 1
            watch.note(step, "data")
            watch.note(step, "step")
            tick.wait(STEP)
        share = (time.process_time() - busy) / seconds
        pipe.send((share, len(os.listdir("/proc/self/fd"))))
        pipe.recv()


def peers(ranks: int, limit: float, port: int, token: str, fault: str, pipe: Pipe) -> None:
    """All other ranks. After two beats the last one has its fault."""
    allow_files()
    every, selector, links = period(ranks, limit), selectors.DefaultSelector(), {}
    for rank in range(1, ranks):
        links[rank] = link = Link(socket.create_connection(("127.0.0.1", port)))
        link.send(line({"token": token, "rank": rank, "attempt": 1}))
        selector.register(link.socket, selectors.EVENT_READ, link)
    welcomed, heard, sent = 0, 0, 0
    while welcomed < ranks - 1:
        for key, _ in selector.select():
            welcomed += sum("welcome" in message for message in key.data.read())
    pipe.send(None)
    begun, dice = time.monotonic(), random.Random(0)
    due = [(begun + every * dice.random(), rank) for rank in links]
    heapq.heapify(due)
    last, at = ranks - 1, begun + 2 * every
    while True:
        for key, _ in selector.select(max(0.0, due[0][0] - time.monotonic())):
            heard += len(key.data.read())
            if key.data.closed:
                pipe.send((sent, heard, time.monotonic() - begun))
                return
        now = time.monotonic()
        if fault == "gone" and now > at and last in links:
            selector.unregister(links[last].socket)
            links.pop(last).socket.close()
            pipe.send(time.time())
        while due[0][0] <= now:
            when, rank = heapq.heappop(due)
            if rank in links and not (fault == "silent" and rank == last and now > at):
                step, idle = 2 + int((now - begun) / STEP), 0.0
                if fault == "hangs" and rank == last and now > at:
                    step, idle = 2 + int((at - begun) / STEP), now - at
                word = {"step": step, "phase": "step", "turn": 1, "patience": limit, "when": time.time()}
                links[rank].send(line({"word": word, "idle": idle}))
                sent += 1
            heapq.heappush(due, (when + every, rank))


def play(ranks: int, limit: float, seconds: float, fault: str = "") -> dict[str, float]:
    """A world of so many ranks, for some seconds or until rank 0 has found the fault."""
    (here, there), (here_too, there_too) = SPAWN.Pipe(), SPAWN.Pipe()
    first = SPAWN.Process(target=rank_0, args=(ranks, limit, 1e9 if fault else seconds, there))
    first.start()
    _, port, token, _ = here.recv()
    others = SPAWN.Process(target=peers, args=(ranks, limit, port, token, fault, there_too))
    others.start()
    here_too.recv()
    here.send(None)
    met = here.recv()
    if fault:
        at = here_too.recv() if fault == "gone" else time.time() + 2 * period(ranks, limit)
        first.join()
        found = time.time() - at
        others.kill()
        assert first.exitcode == watchdog.EXIT_LOST, first.exitcode
        return {"seconds to find": found}
    share, files = here.recv()
    here.send(None)
    sent, heard, played = here_too.recv()
    first.join()
    others.join()
    assert first.exitcode == 0, first.exitcode
    return {
        "seconds between beats": period(ranks, limit),
        "% of a core": 100 * share,
        "beats to rank 0 a second": sent / played,
        "beats from rank 0 a second": heard / played,
        "open files of rank 0": files,
        "seconds to meet": met,
    }


def main(argv: list[str]) -> None:
    """Print the figures as lines of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--watchdog", type=float, default=60.0, help="machine.watchdog, in seconds")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the cost is measured")
    parser.add_argument("--faults", action="store_true", help="find a rank that is gone, silent, or hangs")
    asked = parser.parse_args(argv)
    for fault in ("", *FAULTS) if asked.faults else ("",):
        figures = play(asked.ranks, asked.watchdog, asked.seconds, fault)
        row = {"ranks": asked.ranks, "watchdog": asked.watchdog, **({"fault": fault} if fault else {})}
        print(json.dumps(row | {name: round(value, 2) for name, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
