"""The errors that end a command with one line. Imports nothing; every module may import it."""

from __future__ import annotations


class InputError(Exception):
    """Bad input: a file, option or value that the user can put right.

    The message names the file, key or option, the value found and what would be right, in one line.
    The command line prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """A run that cannot continue though its input was right: it diverged, or a checkpoint could not be written.

    Raised on every rank. The command line prints it without a traceback and exits with code 1.
    """


class OutOfMemory(RunError):
    """A GPU or a host had too little memory for this rank, and perhaps for this one alone: no collective may follow.

    The first rank to tell prints it, and each ends with code 1 by itself (`resilience/out_of_memory.py`).
    """


class RankLost(RunError):
    """Another rank has ended. Each remaining rank prints its message; the command line exits with 69."""


def one_of(name: str, names: list[str] | tuple[str, ...]) -> str:
    """Return " (did you mean 'x'?)" for the nearest of `names`, else the list of them."""
    import difflib

    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (one of: {', '.join(sorted(names))})"
