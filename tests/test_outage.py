"""What is tried again, until when, and what is said of it meanwhile."""

from __future__ import annotations

import errno
import os
import time

import pytest

from megapix import outage
from megapix.errors import InputError, StorageError
from megapix.outage import error_of, persist


class Clock:
    """A clock that stands still but for sleeping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.naps = 1000.0, list[float]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)
        monkeypatch.setattr(outage, "_said", -outage.EACH)

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def fails(times: int, number: int) -> object:
    """Work that fails so often, and then has a value."""
    left = [OSError(number, os.strerror(number))] * times

    def once() -> str:
        if left:
            raise left.pop()
        return "the bytes"

    return once


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN])
def test_what_passes_is_tried_again(number: int, clock: Clock) -> None:
    assert persist("a file", fails(7, number)) == "the bytes"  # type: ignore[arg-type]
    assert len(clock.naps) == 6, "at once, and then after waits"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EISDIR])
def test_what_does_not_pass_is_not(number: int, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        persist("a file", fails(1, number))  # type: ignore[arg-type]
    assert (clock.naps, capsys.readouterr().err) == ([], "")


def test_the_deadline_and_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten minutes by default, to the second, with waits that grow to at most ten seconds."""
    with pytest.raises(StorageError, match=r"^RUN/x: Stale file handle; tried again for 10 minutes$") as caught:
        persist("RUN/x", fails(10**6, errno.ESTALE))  # type: ignore[arg-type]
    assert clock.now - 1000.0 == pytest.approx(600)
    assert max(clock.naps[:4]) <= 0.8
    assert 5 < max(clock.naps) <= 10
    assert len(set(clock.naps)) > 50, "they are jittered"
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "megapix: warning: RUN/x: Stale file handle; tried again, for 0.0 of 10 minutes so far"
    assert 9 <= len(said) <= 10
    assert (caught.value.exit_code, isinstance(caught.value, InputError)) == (74, False)


def test_nothing_is_waited_for_with_no_minutes(clock: Clock) -> None:
    with pytest.raises(StorageError):
        persist("a file", fails(3, errno.EIO), minutes=0)  # type: ignore[arg-type]
    assert sum(clock.naps) == 0


def test_another_error_ends_the_waiting(clock: Clock) -> None:
    errors = [OSError(errno.EIO, "x"), OSError(errno.EIO, "x"), FileNotFoundError(errno.ENOENT, "gone")]

    def once() -> None:
        raise errors.pop(0)

    with pytest.raises(FileNotFoundError):
        persist("a file", once)


def test_what_an_error_of_writing_is() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        assert type(error_of(OSError(number, ""), "x")) is StorageError
    assert type(error_of(OSError(errno.EACCES, ""), "x")) is InputError
