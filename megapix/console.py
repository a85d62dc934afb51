"""The ends of both programs: options that are read or refused in one line, and an output that nobody reads any more."""

from __future__ import annotations

import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import Any

EXIT_PIPE = 141
"""As a shell says of a program whose reader has gone: 128 + SIGPIPE."""
WIDE = "20000"
"""Columns in which no message of tyro's is broken into lines."""
FRAME = re.compile(r"[╭╮╰╯│─+|\s-]*")
"""A line that tyro draws around messages and between their parts, in Unicode or ASCII as the locale has it."""


def parse(kind: Any, arguments: list[str], program: str, here: bool = True, **rest: Any) -> Any:
    """The value of type `kind` (a dataclass) that the arguments say, read by tyro.

    Args:
        program: the command, such as 'data_prep write'; its first word begins the message.
        here: whether this process prints help and messages.
        rest: what `tyro.cli` takes besides.

    Raises:
        SystemExit: code 2 for arguments that are refused, after one line on stderr; code 0 for --help.
    """
    import tyro

    def read(arguments: list[str]) -> Any:
        with _wide("-h" not in arguments and "--help" not in arguments), redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=program, console_outputs=here, **rest)

    said = io.StringIO()
    try:
        return read(arguments)
    except SystemExit as end:
        if end.code and here:
            unknown = re.search(r"Unrecognized options: (--[^\s,=]+)=", said.getvalue())
            if unknown:  # tyro looks for the nearest name of an option alone, without its value
                said.truncate(said.seek(0))
                with suppress(SystemExit):
                    read([a.partition("=")[0] if a.startswith(f"{unknown[1]}=") else a for a in arguments])
            line = in_one_line(said.getvalue(), program)
            print(f"{program.split()[0]}: error: {line}", file=sys.stderr, flush=True)
        raise


def in_one_line(box: str, program: str) -> str:
    """What a box of tyro's says, without its frame, with the nearest option's name where it suggests some."""
    drawn = [row for row in box.splitlines() if not FRAME.fullmatch(row)]
    rows = [row.strip("╭╮─+- ") if row.startswith(("╭", "+")) else row.strip("│| ") for row in drawn]
    help_ = f"'{program} --help' lists the options"
    if not rows:
        return f"the arguments are not understood; {help_}"
    title, *rows = rows
    end = next((n for n, row in enumerate(rows) if row.startswith(("For full helptext", "Argument helptext"))), None)
    rows = rows[:end]
    near = re.search(r"Perhaps you meant:\s+(--[\w.-]+)", "\n".join(rows))
    found = re.match(r"Unrecognized options: (.*)", rows[0] if rows else "")
    if not found:
        message = (" ".join(rows) or title).rstrip(".")
        return f"{message[0].lower()}{message[1:]}; {help_}"
    first = found[1].split(", ")[0]
    if not first.startswith("-"):
        return f"{first!r} is one argument too many; {help_}"
    meant = f" (did you mean {near[1]!r}?)" if near and near[1] != first else ""
    return f"option {first!r} does not exist{meant}; {help_}"


@contextmanager
def _wide(yes: bool) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    if yes:
        os.environ["COLUMNS"] = WIDE
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        elif yes:
            del os.environ["COLUMNS"]


def until_nobody_reads(run: Callable[[], int]) -> int:
    """What `run` returns; EXIT_PIPE, without a word, once the reader of stdout has gone, as `| head` does."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return EXIT_PIPE


def _reader_has_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # stdout is no file, as in tests
        return False
