"""Checks between nodes: do all ranks connect, do names resolve, do clocks agree, how fast is an all-reduce."""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch leaves them out of __all__

from megapix.dist import World, barrier, gather
from megapix.doctor.verdict import Findings, Verdict, table
from megapix.errors import InputError

MEET_SECONDS = 60
"""How long a rank waits for the others to appear."""
TALK_SECONDS = 900
"""How long a collective may take: others may still be compiling DeepSpeed's op."""
SKEW_SECONDS = 1.0
"""Clocks that differ by more get a warning: event files and log lines are ordered by them."""
ROUNDS = 5


def meet(world: World, seconds: float = MEET_SECONDS) -> Verdict:
    """Form the process group of all ranks, and say which are missing. A single rank needs none.

    Raises:
        InputError: the launcher's address is not in the environment.
    """
    if world.size == 1:
        return Verdict("hosts", "ok", "one rank, no other to reach")
    address, port = (_environment(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    start, host = time.monotonic(), socket.gethostname()
    try:
        socket.getaddrinfo(address, int(port))
    except OSError as error:
        return Verdict("hosts", "fail", f"MASTER_ADDR = {address!r} does not resolve: {error.strerror}")
    limit = timedelta(seconds=seconds)
    serves = world.main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent does
    try:
        store = TCPStore(address, int(port), world.size, serves, limit, wait_for_workers=False)
    except RuntimeError as error:
        return Verdict(
            "hosts", "fail", f"rank 0 at {address}:{port} was not reached within {seconds:g} s: {_line(error)}"
        )
    here = PrefixStore("doctor/here", store)
    keys = [str(rank) for rank in range(world.size)]
    try:
        here.set(keys[world.rank], host)
        here.wait(keys, limit)
    except RuntimeError as error:
        try:
            missing = [key for key in keys if not here.check([key])]
        except RuntimeError:  # rank 0 has given up first, and its store is gone
            return Verdict("hosts", "fail", f"rank 0 at {address}:{port} is gone: {_line(error)}")
        return Verdict("hosts", "fail", f"{_ranks(missing)} did not appear within {seconds:g} s (at {address}:{port})")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        with _ends_after(seconds, world, host):
            torch.distributed.init_process_group(
                backend,
                store=PrefixStore("doctor/group", store),
                rank=world.rank,
                world_size=world.size,
                timeout=timedelta(seconds=TALK_SECONDS),
            )
    except RuntimeError as error:
        return Verdict(
            "hosts", "fail", f"all ranks appeared, but cannot reach each other (GLOO_SOCKET_IFNAME?): {_line(error)}"
        )
    return Verdict("hosts", "ok", f"{world.size} ranks met at {address}:{port} in {time.monotonic() - start:.1f} s")


@contextmanager
def _ends_after(seconds: float, world: World, host: str) -> Iterator[None]:
    """End this rank with its verdict if the block takes longer: where packets are dropped, gloo waits long."""

    def end() -> None:
        detail = f"all ranks appeared, but met no other within {seconds:g} s (firewall? GLOO_SOCKET_IFNAME?)"
        print(table([Findings(world.rank, host, [Verdict("hosts", "fail", detail)])]), flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def names(hosts: list[str]) -> Verdict:
    """Each host should resolve every other's name, which a hostfile and ssh need."""
    unknown = []
    for host in dict.fromkeys(hosts):
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            unknown.append(host)
    if unknown:
        return Verdict(
            "names", "warn", f"not resolved here: {', '.join(unknown)} (a launcher with a hostfile needs them)"
        )
    return Verdict("names", "ok", f"{len(set(hosts))} host{'s'[: len(set(hosts)) > 1]} resolved")


def clock(world: World) -> Verdict:
    """How far this clock is from rank 0's. Every rank calls it.

    Between two barriers every rank reads its clock: rank 0 was certainly between them at that moment, so its
    times before and after bound the difference. The shortest of some rounds is taken.
    """
    rounds = []
    for _ in range(ROUNDS):
        entered = time.time()
        barrier(world)
        mine = time.time()
        barrier(world)
        rounds.append(gather(world, (entered, mine, time.time())))
    entered, left = min(((r[0][0], r[0][2]) for r in rounds), key=lambda pair: pair[1] - pair[0])
    mine = next(r[world.rank][1] for r in rounds if r[0][0] == entered)
    low, high = mine - left, mine - entered
    apart = max(low, -high, 0.0)
    if apart > SKEW_SECONDS:
        return Verdict("clock", "warn", f"{'ahead of' if low > 0 else 'behind'} rank 0's by {apart:.1f} s; run NTP")
    return Verdict("clock", "ok", f"within {SKEW_SECONDS:g} s of rank 0's, measured to {high - low:.3f} s")


def bandwidth(world: World, device: torch.device, gradient: int) -> tuple[Verdict, str]:
    """All-reduces of growing size: the verdict, and a table for rank 0. Every rank calls it.

    Args:
        gradient: bytes that are reduced in each step; how long that takes is estimated from the largest size.
    """
    if world.size == 1:
        return Verdict("all-reduce", "ok", "one rank, nothing to reduce"), ""
    sizes = [2**n for n in ((12, 16, 20, 24, 28) if device.type == "cuda" else (12, 16, 20, 24))]
    lines = ["all-reduce         ms      MiB/s"]
    rate, wrong = 0.0, False
    for size in sizes:
        tensor = torch.empty(size // 4, device=device)
        times = []
        for _ in range(ROUNDS + 1):  # the first one opens connections
            tensor.fill_(world.rank + 1)
            barrier(world)
            start = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            wrong |= bool((tensor != world.size * (world.size + 1) / 2).any())  # waits for the device, too
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[1:])
        rate = size / seconds
        name = f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
        lines.append(f"{name:>10}  {seconds * 1e3:9.2f}  {rate / 2**20:9.1f}")
    if wrong:
        return Verdict("all-reduce", "fail", "a sum over all ranks came out wrong"), "\n".join(lines)
    detail = f"{rate / 2**20:,.0f} MiB/s; a gradient of {gradient / 2**20:,.0f} MiB takes about {gradient / rate:.2f} s"
    return Verdict("all-reduce", "ok", detail), "\n".join(lines)


def _environment(name: str) -> str:
    if name not in os.environ:
        raise InputError(
            f"environment variable {name} is missing: start the ranks with a launcher (launch.sh, torchrun)"
        )
    return os.environ[name]


def _ranks(keys: list[str]) -> str:
    return f"rank{'s'[: len(keys) > 1]} {', '.join(keys)}"


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
