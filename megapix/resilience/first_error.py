"""The first error of any rank: what the log says of it, and the code that all ranks end with."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass

from megapix import outage
from megapix.errors import InputError, OutOfMemory, RunError, StorageError
from megapix.resilience.out_of_memory import lack

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Failure:
    """Why all ranks end."""

    code: int
    reason: str
    """One line, with rank, host and phase."""


def collective(error: BaseException) -> bool:
    """Whether every rank has raised it, and leaves in order."""
    return isinstance(error, SystemExit) or getattr(error, "collective", False)


def perhaps_of_another(error: BaseException) -> bool:
    """Whether it may be a collective that broke because another rank is lost, or has failed: torch's RuntimeError."""
    return isinstance(error, RuntimeError) and lack(error) is None


def failure(error: BaseException, rank: int, host: str, step: int, phase: str) -> Failure:
    """What one rank's error is to all."""
    place = f"rank {rank} on {host}, " + (f"step {step}, " if step else "") + f"phase '{phase}'"
    if isinstance(error, KeyboardInterrupt):
        return Failure(EXIT_INTERRUPTED, f"{place}: interrupted; the same command resumes from the last checkpoint")
    if isinstance(error, OutOfMemory):
        return Failure(error.exit_code, str(error))  # it names them itself
    if isinstance(error, (InputError, RunError)):
        return Failure(error.exit_code, f"{place}: {error}")
    if outage.of_storage(error):
        return Failure(StorageError.exit_code, f"{place}: {outage.said(error)}")
    return Failure(1, f"{place}: {type(error).__name__}: {' '.join(str(error).split())}")


def show(error: BaseException) -> None:
    """Print where an error that nobody has foreseen comes from: this process may be ended before it could do it."""
    if not isinstance(error, (InputError, RunError, KeyboardInterrupt)) and not outage.of_storage(error):
        traceback.print_exception(error)
        sys.stderr.flush()
