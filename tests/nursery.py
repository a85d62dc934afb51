"""A process that has imported what ranks need, and forks them: an import takes seconds of a core, a fork milliseconds.

A forked rank is what `python -m MODULE ARGUMENTS` is, in a session of its own, with its own environment and outputs,
but for the number of threads and the hash seed, which are the nursery's. `tests.launch.Launch` starts ranks as a
launcher does.

Requests and answers are lines of JSON on a socket, one at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ("megapix.cli", "megapix.loop", "tests.runs", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")
"""The latter two are imported by the first optimizer and the first engine, and take longer than the others together."""


class Nursery:
    """The process, as its one client sees it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.nursery", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._answers = self._socket.makefile("r")
        atexit.register(self.close)

    def run(
        self, module: str, arguments: Sequence[str], environments: Sequence[dict[str, str]], timeout: float
    ) -> list[tuple[int, str, str]]:
        """One rank for each environment: its exit code and its two outputs. A hang ends all, and is an error."""
        with tempfile.TemporaryDirectory() as folder:
            outputs = [[f"{folder}/{rank}.{name}" for name in ("out", "err")] for rank in range(len(environments))]
            asked = {"argv": [module, *arguments], "ranks": [*zip(environments, outputs, strict=True)]}
            self._socket.sendall(json.dumps(asked | {"timeout": timeout}).encode() + b"\n")
            answer = self._answers.readline()
            assert answer, "the nursery has ended"
            codes = json.loads(answer)
            assert codes, f"a rank hangs: not all {len(environments)} had ended after {timeout} s"
            texts = [[Path(path).read_text() for path in pair] for pair in outputs]
            return [(code, *pair) for code, pair in zip(codes, texts, strict=True)]

    def close(self) -> None:
        """End it, and what it has at work."""
        self._answers.close()
        self._socket.close()
        self._process.wait()


def _serve(requests: socket.socket) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    with requests, requests.makefile("r") as lines:
        for line in lines:
            asked = json.loads(line)
            ranks = [_fork(asked["argv"], *rank, (requests, lines)) for rank in asked["ranks"]]
            try:
                codes = _wait(ranks, asked["timeout"], requests)
            finally:
                for rank in ranks:
                    _kill(rank)  # what a rank has left behind, too
            requests.sendall(json.dumps(codes).encode() + b"\n")


def _fork(argv: list[str], environment: dict[str, str], outputs: list[str], ours: Sequence[Any]) -> int:
    """The new rank's process number; the rank itself never returns from here."""
    sys.stdout.flush()
    if rank := os.fork():
        return rank
    os.setsid()
    np.random.seed()  # as in a new process
    for end in ours:
        end.close()
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = argv[1:]
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    sys.exit()


def _wait(ranks: list[int], timeout: float, requests: socket.socket) -> list[int]:
    """The exit codes, negative for a signal; none if one does not end in time. The client's end is ours."""
    deadline, codes = time.monotonic() + timeout, {}
    while len(codes) < len(ranks):
        if time.monotonic() > deadline:
            return []
        if select.select([requests], [], [], 0.01)[0]:
            raise SystemExit("the client has gone")
        for rank in ranks:
            if rank not in codes and (ended := os.waitpid(rank, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
    return [codes[rank] for rank in ranks]


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
