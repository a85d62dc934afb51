"""--hold-out: a second folder of other samples, chosen by a hash of their names alone, so that a set that grows keeps
them."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.listing.base import Entries, Item, Reader, Source
from data_prep.lists.items import Some
from data_prep.writing.receipt import RECEIPTS
from megapix.errors import InputError

PLACES = 1 << 64
SUFFIX = "-held-out"
SEEN = "both"


def folder_beside(out: Path) -> Path:
    """Where the samples go that are held out."""
    return (
        out.with_name(f"{out.name}{SUFFIX}") if out.name else out.resolve().with_name(f"{out.resolve().name}{SUFFIX}")
    )


def place_of(name: str) -> int:
    """Where a sample lies among all names, 0 to 2^64 - 1: those that lie first are held out."""
    return int.from_bytes(hashlib.sha256(f"hold out/{name}".encode("utf-8", "surrogateescape")).digest()[:8], "big")


@dataclass(frozen=True)
class Side:
    """One of the two folders."""

    bound: int
    """Samples that lie before it are held out."""
    held: bool
    """Whether this is the folder of these."""

    def has(self, name: str) -> bool:
        """Whether a sample belongs to it."""
        return (place_of(name) < self.bound) == self.held

    @property
    def others(self) -> str:
        """The kind under which the samples of the other folder are passed over."""
        return "not held out" if self.held else "held out"

    @property
    def recorded(self) -> dict[str, Any]:
        """What tells the two folders apart in plan and index."""
        return {"part": "held out" if self.held else "the rest"}


@dataclass(frozen=True)
class HoldOut:
    """The option --hold-out: a share, or a number of samples."""

    option: str
    share: float = 0.0
    count: int = 0

    def sides(self, names: Iterable[str]) -> tuple[Side, Side]:
        """The folder of what is held out, and that of the rest.

        Args:
            names: of all samples that can be used, as far as that is known.

        Raises:
            InputError: one of the folders would be empty.
        """
        places = array("Q", map(place_of, names))
        if self.count:
            first = heapq.nsmallest(self.count, places)
            bound = first[-1] + 1 if len(first) == self.count else PLACES
        else:
            bound = round(self.share * PLACES)
        held = sum(place < bound for place in places)
        if not 0 < held < len(places):
            raise InputError(
                f"--hold-out {self.option} takes {'none' if not held else 'all'} of {len(places):,} samples; expected "
                "some in each of the two folders"
            )
        return Side(bound, True), Side(bound, False)

    def recorded(self) -> dict[str, Any]:
        """What plan and index record of it."""
        return {"hold_out": self.option}


def parse_hold_out(option: str) -> HoldOut | None:
    """Read --hold-out: a number of samples such as 5000, or a share of them such as 0.01.

    Raises:
        InputError: neither.
    """
    if not option:
        return None
    try:
        hold = HoldOut(option, count=int(option)) if option.isdecimal() else HoldOut(option, share=float(option))
    except ValueError:
        hold = HoldOut(option)
    if not (hold.count or 0 < hold.share < 1):
        raise InputError(f"--hold-out = {option!r}: expected a number of samples, or a share between 0 and 1")
    return hold


@dataclass(frozen=True)
class OneSide:
    """The samples of a source that belong to one of the folders, with the classes of all."""

    source: Source
    items: Sequence[Item]
    about: dict[str, Any]
    entries: Entries
    side: Side
    seen: Path
    """Folder that keeps what was seen of the images of both folders, where duplicates are looked for among all."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number."""
        return tuple(self.source.classes)

    @property
    def reader(self) -> Reader:
        """Reads the items."""
        return self.source.reader


def folders_of(source: Source, out: Path, hold: HoldOut | None) -> list[tuple[Source, Path]]:
    """What to write where: with --hold-out two sources for two folders, that of `out` last.

    Raises:
        InputError: one of them would be empty.
    """
    if hold is None:
        return [(source, out)]
    found: list[tuple[Source, Path]] = []
    for side in hold.sides(item.name for item in source.items if not item.fault):
        items = Some(source.items, [n for n, item in enumerate(source.items) if side.has(item.name)])
        # A tar file that cannot be read goes to one of the folders, as a sample does.
        unreadable = {name: reason for name, reason in source.entries.unreadable.items() if side.has(name)}
        others = len(source.items) - len(items) + len(source.entries.unreadable) - len(unreadable)
        entries = replace(source.entries, passed=source.entries.passed | {side.others: others}, unreadable=unreadable)
        about = source.about | hold.recorded() | side.recorded
        seen = folder_beside(out) / RECEIPTS / SEEN
        one = OneSide(source, items, about, entries, side, seen)
        found.append((one, folder_beside(out) if side.held else out))
    return found
