"""A process that has imported what ranks need, and forks them: an import takes seconds of a core, a fork milliseconds.

A forked rank is what `python -m MODULE ARGUMENTS` is, in a session of its own, with its own environment and outputs,
but for the number of threads and the hash seed, which are the fork server's.

Requests and answers are lines of JSON on a socket: {"argv", "environment", "outputs"} is answered with the number of a
new process, {"ended": number} with its exit code, or null while it is at work. When the client is gone, all end.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "megapix.cli.main",
    "megapix.train.loop",
    "tests.support.small_run",
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
"""The latter two are imported by the first optimizer and the first engine, and take longer than the others together."""


class ForkServer:
    """The process, as its one client sees it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._answers = self._socket.makefile("r")
        atexit.register(self._close)

    def fork(self, argv: Sequence[str], environment: dict[str, str], outputs: Sequence[Path]) -> int:
        """A new process with the module argv[0] as its main one, and stdout and stderr in two files: its number."""
        return self._ask(argv=argv, environment=environment, outputs=[str(path) for path in outputs])

    def ended(self, process: int) -> int | None:
        """Its exit code, negative for a signal; None while it is at work."""
        return self._ask(ended=process)

    def _ask(self, **request: Any) -> Any:
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        answer = self._answers.readline()
        assert answer, "the fork server has ended"
        return json.loads(answer)

    def _close(self) -> None:
        self._answers.close()
        self._socket.close()
        self._process.wait()


def _serve(requests: socket.socket) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a rank would copy the pages of all that was imported
    codes: dict[int, int | None] = {}
    lines = requests.makefile("r")
    for line in lines:
        asked = json.loads(line)
        if number := asked.get("ended"):
            answer = codes[number] = _ended(number) if codes[number] is None else codes[number]
        else:
            sys.stdout.flush()
            answer = os.fork()
            if not answer:
                lines.close()
                requests.close()
                return _run(**asked)
            while os.getpgid(answer) != answer:  # whoever knows its number can signal its group
                time.sleep(0.001)
            codes[answer] = None
        requests.sendall(json.dumps(answer).encode() + b"\n")
    for number, code in codes.items():
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)


def _run(argv: list[str], environment: dict[str, str], outputs: list[str]) -> None:
    """Be a rank, and end as a new interpreter does, but for its teardown: that of so many modules takes seconds."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what runs in the background
    np.random.seed()  # as in a new process
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = argv[1:]
    code: object = 0
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _ended(process: int) -> int | None:
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
