"""Starting real ranks: the environment that `deepspeed` and `torchrun` set, one process a rank, gloo between them."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megapix.dist import free_port
from tests.support.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[2]
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


@functools.cache
def fork_server() -> ForkServer:
    """The one of this test run."""
    return ForkServer(environment(0))


class Forked:
    """A rank from the fork server, with the members of `subprocess.Popen`."""

    def __init__(self, argv: Sequence[str], environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("out", "err")]
        self.returncode: int | None = None
        self.pid = fork_server().fork(argv, environment, self._outputs)

    def poll(self) -> int | None:
        """The exit code; None while it is at work."""
        if self.returncode is None:
            self.returncode = fork_server().ended(self.pid)
        return self.returncode

    def wait(self, timeout: float = TIMEOUT) -> None:
        """Wait for its end."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"a rank is still at work after {timeout} s"
            time.sleep(0.01)

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """Wait for its end, and read what it wrote."""
        self.wait(timeout)
        out, err = (path.read_text() for path in self._outputs)
        return out, err

    def output_text(self) -> str:
        """What it has written to stdout so far."""
        return self._outputs[0].read_text() if self._outputs[0].exists() else ""

    def error_text(self) -> str:
        """What it has written to stderr so far."""
        return self._outputs[1].read_text() if self._outputs[1].exists() else ""

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)


class Launch:
    """Ranks at work, each in a process group of its own, as under a launcher."""

    def __init__(self, ranks: int, module: str, arguments: Sequence[str | Path], **more: str) -> None:
        self.port = free_port()
        argv = [module, *map(str, arguments)]
        self.processes = [self._start(argv, e) for e in of_ranks(environment(self.port) | more, ranks)]

    def _start(self, argv: list[str], environment: dict[str, str]) -> Forked | subprocess.Popen[str]:
        return Forked(argv, environment)

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
        for segment in Path("/dev/shm").glob(f"deepspeed_*_127.0.0.1_{self.port}_*"):
            segment.unlink(missing_ok=True)


class FreshLaunch(Launch):
    """Ranks whose interpreters are new, too."""

    def _start(self, argv: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        pipe, command = subprocess.PIPE, [sys.executable, "-m", *argv]
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )


def start(ranks: int, module: str, arguments: Sequence[str | Path], **more: str) -> list[Rank]:
    """Run `python -m module arguments` on `ranks` ranks and return them all; a hang fails the test."""
    return Launch(ranks, module, arguments, **more).finish()


def succeed(ranks: int, module: str, arguments: Sequence[str | Path], **more: str) -> list[Rank]:
    """`start`, and fail with the first bad rank's output."""
    return succeeded(start(ranks, module, arguments, **more))


def succeeded(done: list[Rank]) -> list[Rank]:
    """Ranks that have ended; fail with the first bad one's output."""
    for number, rank in enumerate(done):
        assert rank.code == 0, f"rank {number} ended with {rank.code}\n{rank.out}\n{rank.err}"
    return done
