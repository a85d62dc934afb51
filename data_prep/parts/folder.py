"""Where the parts of one output leave word of themselves, for as long as it is not finished: OUT/.parts, or beside an
output that is a file, .OUT.parts.

    parts.json               the command, the number of parts, the options that all must have, and the round
    ROUND/part-00003.json    part 3 is finished; with what it has counted
    ROUND/finishing          the lock of the one that puts the output together

Every file appears whole, or is created by one process alone; no part waits for another one. When the output is put
together, the folder goes.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from data_prep.parts.lease import STALE, lease
from data_prep.parts.part import Part
from megapix.errors import InputError
from megapix.files import write_atomic, write_new

T = TypeVar("T")

PARTS, BEGUN = ".parts", "parts.json"
SHOWN = 8
"""Parts that a message names."""


class PartDone(Exception):
    """No error: a part has done its share, and the output is not put together by it; says what is missing."""


@dataclass(frozen=True)
class Parts:
    """The parts of one output."""

    out: Path
    command: str
    count: int
    options: dict[str, Any]
    """What all parts were given alike."""
    folder: Path
    round: str
    part: Part | None = None
    """That of this process; None for who only puts the output together."""

    def path(self, name: str) -> Path:
        """A file of this round."""
        return self.folder / self.round / name

    def agree(self, name: str, value: Mapping[str, Any], free: tuple[str, ...] = ()) -> dict[str, Any]:
        """What the first part has said of something that is the same for all; this part's own value if it is the first.

        Args:
            free: keys that each part may have of its own.

        Raises:
            InputError: this part's value is another one.
        """
        mine = json.loads(json.dumps(value))
        if write_new(self.path(name), _dump(mine)):
            return mine
        theirs = self.read(name)
        for key in (*mine, *theirs):
            if key not in free and mine.get(key) != theirs.get(key):
                before, now = _apart(theirs.get(key), mine.get(key))
                raise InputError(
                    f"{self.out}: the parts do not see the same files: {key} = {_value(before)} elsewhere, "
                    f"{_value(now)} for part {self.part}"
                )
        return theirs

    def read(self, name: str) -> dict[str, Any]:
        """What lies in a file of this round.

        Raises:
            InputError: it is damaged, or not there.
        """
        try:
            return dict(json.loads(self.path(name).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError) as error:
            raise InputError(f"{self.path(name)} is gone or damaged; give one of the parts again") from error

    def counts(self) -> list[dict[str, Any]]:
        """What each part has counted."""
        return [self.read(_done(number))["counted"] for number in range(self.count)]

    def missing(self) -> list[int]:
        """The parts that are not finished."""
        return [number for number in range(self.count) if not self.path(_done(number)).is_file()]

    def leave(self, counted: Mapping[str, Any], close: Callable[[Parts], T]) -> T:
        """Say that this part is finished; if all are, put the output together by `close`, and return what it does.

        Raises:
            PartDone: others are not finished, or another process is putting the output together.
        """
        assert self.part
        record = {"part": self.part.number, "parts": self.count, "options": self.options, "counted": counted}
        done, holder = f"part {self.part} of {self.out} is finished", "another part"
        try:
            write_atomic(self.path(_done(self.part.number)), _dump(record))
            missing = self.missing()
            with lease(self.path("finishing")) if not missing else nullcontext("others") as holder:
                if not holder:
                    return self._closed(close)
        except FileNotFoundError:
            if (self.folder / BEGUN).exists():
                raise
        if not (self.folder / BEGUN).exists():
            raise PartDone(f"{done}, and all of it") from None
        raise PartDone(f"{done}; not yet {_listed(missing, self.count)}" if missing else f"{done}; {holder} closes it")

    def finish(self, close: Callable[[Parts], T]) -> T:
        """Put the output together by `close`, and return what it does.

        Raises:
            InputError: parts are not finished, or another process is at it.
        """
        if missing := self.missing():
            raise InputError(
                f"{self.out} is not finished: parts {_listed(missing, self.count)} are missing; "
                f"give the same 'data_prep {self.command}' command with --part {missing[0]}/{self.count}"
            )
        with lease(self.path("finishing"), patience=2 * STALE) as holder:
            if holder:
                raise InputError(f"{holder} puts {self.out} together")
            return self._closed(close)

    def _closed(self, close: Callable[[Parts], T]) -> T:
        made = close(self)
        (self.folder / BEGUN).unlink()  # first: without it there are no parts at work
        shutil.rmtree(self.folder / self.round, ignore_errors=True)
        with suppress(OSError):  # others have begun anew
            self.folder.rmdir()
        return made


def parts_of(out: Path) -> Parts | None:
    """The parts that are at work on an output, if there are any.

    Raises:
        InputError: what lies there is damaged.
    """
    folder = _folder_of(out)
    try:
        there = json.loads((folder / BEGUN).read_bytes())
        return Parts(out, there["command"], there["parts"], there["options"], folder, there["round"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / BEGUN} is damaged; remove {folder}, and give all parts again") from error


def join(out: Path, part: Part, command: str, options: Mapping[str, Any]) -> Parts | None:
    """Begin to work on a part of `out`; None for a command that does all of it.

    Args:
        options: name -> value of those that all parts must have alike, beside what is compared elsewhere.

    Raises:
        InputError: parts are at work where this command does all, or the other parts are of another command, another
            number, or other options.
    """
    there = parts_of(out)
    if part.whole:
        if there:
            raise InputError(
                f"{out} is being made in {there.count} parts; give one of them (--part 0/{there.count}), or "
                f"'data_prep finish {out}' when they are done"
            )
        return None
    mine = {"command": command, "parts": part.of, "options": json.loads(json.dumps(options))}
    if there is None:
        folder = _folder_of(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_new(folder / BEGUN, _dump(mine | {"round": secrets.token_hex(4)}))
        there = parts_of(out)
        if there is None:
            raise InputError(f"{out} was put together just now; give the same command again to look at it")
    if there.command != command:
        raise InputError(f"{out} is being made by 'data_prep {there.command}', in {there.count} parts")
    if there.count != part.of:
        raise InputError(
            f"{out} is being made in {there.count} parts, this is part {part}; expected --part I/{there.count} (or "
            f"remove {there.folder}, once no part is at work: what is finished stays)"
        )
    for key in (*mine["options"], *there.options):
        if (theirs := there.options.get(key)) != (value := mine["options"].get(key)):
            raise InputError(
                f"{out}: its parts have --{key.replace('_', '-')} {_value(theirs)}, part {part} has {_value(value)}; "
                "expected the same options for all parts"
            )
    (there.folder / there.round).mkdir(exist_ok=True)
    return replace(there, part=part)


def _folder_of(out: Path) -> Path:
    return out / PARTS if out.is_dir() else out.with_name(f".{out.name}{PARTS}")


def _done(number: int) -> str:
    return f"part-{number:05d}.json"


def _listed(numbers: list[int], count: int) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    more = f" and {len(numbers) - SHOWN:,} more" if len(numbers) > SHOWN else ""
    return f"{shown}{more} of {count}"


def _apart(first: Any, second: Any) -> tuple[Any, Any]:
    """Two values that differ; of two lists the first elements that do."""
    if isinstance(first, list) and isinstance(second, list):
        return next(pair for pair in zip_longest(first, second) if pair[0] != pair[1])
    return first, second


def _value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} …"


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=True) + "\n").encode()
