"""Starting real ranks: the environment that `deepspeed` and `torchrun` set, one process a rank, gloo between them."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.nursery import Nursery

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300
"""Seconds after which a launch counts as hung."""


@dataclass
class Rank:
    """What one finished rank left."""

    code: int
    out: str
    err: str


def environment(port: int) -> dict[str, str]:
    """What a launcher sets for every rank of one machine, and what the tests' ranks have in common."""
    return os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        # DeepSpeed's op builder calls ninja, which is installed beside the interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def of_ranks(shared: dict[str, str], ranks: int) -> list[dict[str, str]]:
    """Each rank's environment."""
    world = shared | {"WORLD_SIZE": str(ranks)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


class Launch:
    """Ranks at work, each in a process group of its own, as under a launcher."""

    def __init__(self, ranks: int, module: str, arguments: Sequence[str | Path], **more: str) -> None:
        self.port = free_port()
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for environment in of_ranks(environment(self.port) | more, ranks)
        ]

    def signal(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all processes of the ranks (of every rank if none is named), workers included."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            os.killpg(self.processes[rank].pid, number)

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Wait until `what` holds; fail when it does not in time, or a rank has ended before."""
        deadline = time.monotonic() + TIMEOUT
        while not what():
            ended = [process for process in self.processes if process.poll() is not None]
            assert not ended, f"ended with {ended[0].returncode}: {ended[0].communicate()}"
            assert time.monotonic() < deadline, "not in time"
            time.sleep(0.05)

    def finish(self, timeout: float = TIMEOUT) -> list[Rank]:
        """Wait for every rank; a hang fails the test."""
        try:
            texts = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            self.kill()
        return [Rank(process.returncode, *text) for process, text in zip(self.processes, texts, strict=True)]

    def kill(self) -> None:
        """SIGKILL to everything that is left, and remove the shared-memory segments of DeepSpeed's op."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()
        remove_segments(self.port)


def remove_segments(port: int) -> None:
    """Remove the shared-memory segments that ranks of that port have left, DeepSpeed's op's."""
    for segment in Path("/dev/shm").glob(f"deepspeed_*_127.0.0.1_{port}_*"):
        segment.unlink(missing_ok=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.cache
def nursery() -> Nursery:
    """The one of this test run."""
    return Nursery(environment(0))


def start(ranks: int, module: str, arguments: Sequence[str | Path], **more: str) -> list[Rank]:
    """Run `python -m module arguments` on `ranks` ranks and return them all; a hang fails the test."""
    port = free_port()
    environments = of_ranks(environment(port) | more, ranks)
    try:
        return [Rank(*ended) for ended in nursery().run(module, [*map(str, arguments)], environments, TIMEOUT)]
    except BaseException:  # an interrupt among them: its ranks end, and the next ones have another nursery
        nursery().close()
        nursery.cache_clear()
        raise
    finally:
        remove_segments(port)


def succeed(ranks: int, module: str, arguments: Sequence[str | Path], **more: str) -> list[Rank]:
    """`start`, and fail with the first bad rank's output."""
    return succeeded(start(ranks, module, arguments, **more))


def succeeded(done: list[Rank]) -> list[Rank]:
    """Ranks that have ended; fail with the first bad one's output."""
    for number, rank in enumerate(done):
        assert rank.code == 0, f"rank {number} ended with {rank.code}\n{rank.out}\n{rank.err}"
    return done
