"""How long storage that is away is waited for: the one way in which files are read, on local disks and remote servers.

    read fails ──▶ passes by itself? ──no──▶ the error, at once: no such file, no permission, a server that refuses
                        │ yes: EIO, ESTALE, a broken connection, …
                        └──▶ opened and tried again, with growing, jittered waits ──▶ StorageError at the deadline

"Cannot be read now" is never taken for "damaged": a StorageError is no InputError, and what replaces a sample, or goes
back to an older checkpoint, does so because of an InputError.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

from megapix.dist import warn
from megapix.errors import InputError, StorageError

T = TypeVar("T")

DISK = frozenset({errno.EIO, errno.ESTALE, errno.EREMOTEIO})
"""What a disk or a network file system answers while it has trouble, and a socket never does."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""No room, or none for this user."""
PASSES = DISK | {
    *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOLCK, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
    *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ECOMM, errno.ENOLINK),
}
"""Errors of local files after which the same read may succeed."""
FIRST, LONGEST = 0.1, 10.0
"""Seconds that the first wait takes at most, and any."""
EACH = 60.0
"""Seconds between two lines of a process about what it waits for."""

_minutes = 10.0
_said = -EACH
_clock: Any = None


def wait_at_most(minutes: float) -> None:
    """How long this process waits for a read from now on, where nothing else is said; 0 tries once more."""
    global _minutes
    _minutes = minutes


def note_waits(clock: Any) -> None:
    """Have `clock.value` say when this process last began to wait, or to try again: seconds of `time.monotonic`, which
    all processes of a host share. A look at it tells a wait, which ends at its deadline, from a hang."""
    global _clock
    _clock = clock


def passing(error: BaseException) -> bool:
    """Whether an error of a local file may be gone at the next try."""
    return isinstance(error, OSError) and error.errno in PASSES


def of_storage(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error that nobody has caught is one of a disk or file system: it has trouble, or no room."""
    return isinstance(error, OSError) and error.errno in DISK | FULL


def error_of(error: OSError, message: str) -> InputError | StorageError:
    """What to raise for an OSError of work that is not tried again: bad input, or storage that may do it later."""
    return (StorageError if error.errno in PASSES | FULL else InputError)(message)


def plain(error: BaseException) -> str:
    """An error of a local file in words."""
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}".rstrip(": ")


def said(error: OSError) -> str:
    """An error `of_storage` that nobody has caught, in one line."""
    return f"{error.filename or 'storage'}: {plain(error)}"


def persist(
    what: object,
    once: Callable[[], T],
    passes: Callable[[BaseException], bool] = passing,
    reason: Callable[[BaseException], str] = plain,
    minutes: float | None = None,
) -> T:
    """The value of `once`, which opens and reads `what`, tried until it succeeds or the deadline is reached.

    Args:
        passes: whether another try can help after an error.
        reason: an error in words.
        minutes: until the deadline, in place of the process's own (`wait_at_most`).

    Raises:
        StorageError: it could not be read until then.
        Exception: an error of `once` that does not pass by itself.
    """
    try:
        return once()
    except Exception as error:
        if not passes(error):
            raise
        limit = 60 * (_minutes if minutes is None else minutes)
        _note()
        _say(f"{what}: {reason(error)}", 0.0, limit)
    return _again(what, once, passes, reason, limit)


def _again(
    what: object,
    once: Callable[[], T],
    passes: Callable[[BaseException], bool],
    reason: Callable[[BaseException], str],
    limit: float,
) -> T:
    from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    growing = wait_random_exponential(multiplier=FIRST, max=LONGEST)

    def pause(state: RetryCallState) -> float:
        left = limit - (state.seconds_since_start or 0.0)
        return max(0.0, min(growing(state), left))  # the last try is at the deadline

    def tell(state: RetryCallState) -> None:
        _note()
        error = state.outcome.exception() if state.outcome else None
        _say(f"{what}: {reason(error) if error else ''}", state.seconds_since_start or 0.0, limit)

    retrying = Retrying(
        stop=stop_after_delay(limit),
        wait=pause,
        retry=retry_if_exception(passes),
        before=lambda _: _note(),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return retrying(once)
    except Exception as error:
        if not passes(error):
            raise
        raise StorageError(f"{what}: {reason(error)}; tried again for {limit / 60:.3g} minutes") from error


def _note() -> None:
    if _clock is not None:
        _clock.value = time.monotonic()


def _say(about: str, waited: float, limit: float) -> None:
    """Say what is waited for, in the whole process at most once in `EACH` seconds."""
    global _said
    now = time.monotonic()
    if now - _said >= EACH:
        _said = now
        warn(f"{about}; tried again, for {waited / 60:.1f} of {limit / 60:.3g} minutes so far")
