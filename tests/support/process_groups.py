"""Processes of a rank's group, as /proc has them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def command_of(pid: int) -> str:
    """The command line of a process; empty once it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def alive(group: int) -> list[int]:
    """The processes of a group, but for those that nobody has waited for yet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def workers_of(group: int) -> list[int]:
    """The server that the data workers of a rank are forked from, and these, which came later."""
    return [pid for pid in alive(group) if "multiprocessing.forkserver" in command_of(pid)]
