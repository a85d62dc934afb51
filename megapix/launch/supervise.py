"""A launcher at work: signals become a stop file or an end, and no rank outlives it."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from megapix.errors import RankLost
from megapix.launch.hostfile import Node

HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
BY_HAND = 130
LOST = RankLost.exit_code
PATIENCE = 40.0
"""Seconds for the other nodes, once one is done: those of a launcher and some more."""
LEFTOVERS = 45.0
"""Seconds for what the launcher has left behind; it gives its ranks 30."""
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of Linux: orphans become this process's children. The first process of a container may collect
none, and what has ended would look like a process that has not."""


class Interrupted(BaseException):
    """A signal came before there was a run to ask."""

    def __init__(self, number: int) -> None:
        self.number = number


def say(program: str, message: str) -> None:
    """A line on stderr, if somebody still reads it: the terminal may be gone."""
    with suppress(OSError):
        os.write(2, os.fsencode(f"{program}: {message}\n"))


@contextmanager
def heeding(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Hand the signals to `handle`, but not those that this process was told to ignore, as nohup does."""
    before = {number: signal.getsignal(number) for number in HEEDED}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    try:
        for number in heeded:
            signal.signal(number, handle)
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler for the time before a run is started.

    Raises:
        Interrupted: always.
    """
    raise Interrupted(number)


class Supervisor:
    """Starts a launcher and waits for it and all that it has started.

    Args:
        program: what messages begin with.
        run: the run folder, for its stop file; None for a command without one, which any signal ends at once.
        nodes: those that ssh starts, or none; port: the run's, which tells its processes on them from others.
    """

    def __init__(self, program: str, run: Path | None, nodes: list[Node], port: int) -> None:
        self.program, self.run, self.nodes, self.port = program, run, nodes, port
        self.signals: list[int] = []
        self.asked = False
        self.forced: int | None = None  # the exit code of a run that was ended by force
        self.one_is_done = threading.Event()

    def wait_for(self, command: list[str], environment: dict[str, str]) -> int:
        """Start the command and return its exit code; 69 for one that a signal has ended."""
        with heeding(lambda number, frame: self.signals.append(number)):
            # A process group of its own, so that one signal ends every rank of this machine: deepspeed's runner does
            # not pass SIGTERM on, and its ranks would go on alone.
            errors = subprocess.PIPE if self.nodes else None
            ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
            sys.stdout.flush()
            launcher = subprocess.Popen(command, env=environment, stderr=errors, preexec_fn=os.setpgrp)
            relay = threading.Thread(target=self._relay, args=(launcher,), daemon=True)
            relay.start()
            self._watch(launcher)
            self._end_leftovers(launcher.pid)
            relay.join(timeout=5)
        if self.asked and self.run:
            (self.run / "stop").unlink(missing_ok=True)  # if no rank has lived to obey it
        if self.forced is not None:
            return self.forced
        code = launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode
        return LOST if code > 128 and code != BY_HAND else code  # a rank ended by a signal, or a node that ssh has lost

    def _watch(self, launcher: subprocess.Popen[bytes]) -> None:
        """Until the launcher has ended, do what signals ask, and give up nodes that do not end with the others."""
        deadline = None
        while launcher.poll() is None:
            while self.signals:
                self._obey(self.signals.pop(0), launcher)
            if self.one_is_done.is_set() and self.forced is None:
                deadline = deadline or time.monotonic() + PATIENCE
                if time.monotonic() > deadline:
                    say(self.program, "error: ranks of other nodes have not ended: ending them")
                    self._end_now(LOST, launcher)
            time.sleep(0.1)

    def _obey(self, number: int, launcher: subprocess.Popen[bytes]) -> None:
        if self.asked or not self.run or number == signal.SIGINT:
            self.asked = True
            say(self.program, "ending the ranks; the same command resumes from the last checkpoint")
            self._end_now(BY_HAND, launcher)
        else:
            self.asked = True
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / "stop").touch()  # neither deepspeed nor pdsh hands signals on to the ranks
            say(self.program, "asking the run to save and end; once more ends it now")

    def _end_now(self, code: int, launcher: subprocess.Popen[bytes]) -> None:
        """End every rank of this run, here and, where ssh started them, on the other nodes.

        DeepSpeed's own way would end all jobs that this user has on those nodes; the port tells this one.
        """
        self.forced = code
        if not self.nodes:
            _kill(launcher.pid, signal.SIGTERM)
            return
        _kill(launcher.pid, signal.SIGKILL)
        ours = f"deepspeed[.]launcher[.]launch .*--master_port={self.port} "
        until = f"n=0; while pgrep -f '{ours}' >/dev/null && [ $n -lt 45 ]; do sleep 1; n=$((n + 1)); done"
        hosts = ",".join(node.host for node in self.nodes)
        subprocess.run(
            ["pdsh", "-f", "1024", "-w", hosts, f"pkill -f '{ours}'; {until}"], stderr=subprocess.DEVNULL, check=False
        )

    def _relay(self, launcher: subprocess.Popen[bytes]) -> None:
        """Pass pdsh's stderr on, and mark the moment when the first node is done."""
        for line in launcher.stderr or ():
            with suppress(OSError):
                os.write(2, line)
            if re.match(rb"pdsh@.*exited with exit code", line):
                self.one_is_done.set()

    def _end_leftovers(self, group: int) -> None:
        """Wait for the processes that the launcher has left behind, and kill them in the end."""
        deadline = time.monotonic() + LEFTOVERS
        while _kill(group, 0) and time.monotonic() < deadline + 5:  # no longer: what is left then is nobody's child
            with suppress(ChildProcessError):  # orphans are ours
                os.waitpid(-group, os.WNOHANG)
            if time.monotonic() > deadline:
                _kill(group, signal.SIGKILL)
            time.sleep(0.1)


def _kill(group: int, number: int) -> bool:
    """Send a signal to a process group; whether there was one."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False
