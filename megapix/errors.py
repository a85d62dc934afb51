"""The errors that end a command with one line. Imports nothing; every module may import it."""

from __future__ import annotations

from typing import ClassVar


class InputError(Exception):
    """Bad input: a file, option or value that the user can put right.

    The message names the file, key or option, the value found and what would be right, in one line.
    The command line prints it without a traceback and exits with code 2.
    """

    exit_code: ClassVar[int] = 2


class RunError(Exception):
    """A run that cannot continue though its input was right: it diverged, or a checkpoint could not be written.

    Raised on every rank. The command line prints it without a traceback and exits with code 1.
    """

    exit_code: ClassVar[int] = 1
    collective: ClassVar[bool] = True
    """Whether every rank raises it, so that all can leave in order; what has no such attribute may be of one rank."""


class StorageError(RunError):
    """Storage that cannot be read or written now, for longer than it is waited for, or that is full; on this rank, and
    perhaps on this one alone. It says nothing about what lies there.

    The command line prints it without a traceback and exits with code 74: the same command resumes.
    """

    exit_code: ClassVar[int] = 74
    collective: ClassVar[bool] = False


class OutOfMemory(RunError):
    """A GPU or a host had too little memory for this rank, and perhaps for this one alone: no collective may follow.

    The first rank to tell prints it, and each ends with code 1 by itself (`resilience/out_of_memory.py`).
    """

    collective = False


class Reported(Exception):
    """The end of a rank because of an error, its own or another rank's, that the log has and all ranks know of.

    Nothing more is to be said, and no collective may follow: the process ends with `code`.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class RankLost(RunError):
    """Another rank has ended, or this rank's data workers are killed again and again. Each rank that is left prints its
    message; the command line exits with 69, after which the same command resumes."""

    exit_code = 69
    collective = False


def one_of(name: str, names: list[str] | tuple[str, ...]) -> str:
    """Return " (did you mean 'x'?)" for the nearest of `names`, else the list of them."""
    import difflib

    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (one of: {', '.join(sorted(names))})"
