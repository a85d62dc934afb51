"""Images inside uncompressed tar files, found once by their headers and then read by offset."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data_prep.listing.archives import DamagedTar, compression_of
from data_prep.listing.base import HEAD, Entries, Item, Reader
from data_prep.listing.tar_headers import walk
from megapix.errors import InputError
from megapix.shards.index import TAR_BLOCK


@dataclass(frozen=True)
class TarReader(Reader):
    """Images at `item.place` = (tar file, offset, size)."""

    def read(self, item: Item, size: int) -> bytes:
        """The member's bytes."""
        return self._first(item, item.place[2])

    def head(self, item: Item, size: int) -> bytes:
        """The member's first bytes."""
        return self._first(item, min(item.place[2], HEAD))

    def _first(self, item: Item, length: int) -> bytes:
        path, offset, _ = item.place
        with open(path, "rb") as file:
            return os.pread(file.fileno(), length, offset)


@dataclass
class TarBudget:
    """Counts rejected tar files and stops the run when they are too many of all."""

    share: float
    """Above 0 it allows one at least, and never all."""
    files: int = 0
    rejected: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise InputError(f"--max-rejected-tars = {self.share}: expected a share, 0 to 1")

    def spend(self, name: str, reason: str) -> None:
        """Count a rejected tar file.

        Raises:
            InputError: the budget is used up; names the tar file and the reason.
        """
        self.rejected += 1
        allowed = min(self.files - 1, max(int(self.share * self.files), int(self.share > 0)))
        if self.rejected > allowed:
            raise InputError(
                f"{self.rejected} of {self.files} tar files cannot be used, --max-rejected-tars {self.share:g} allows "
                f"{allowed}; the latest is {name!r}: {reason}"
            )


class Links:
    """Links of a tar file to members of it, which are files with the target's data: GNU tar writes what has several
    names once, and hard links for the others."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[int, int]] = {}
        self._open: dict[str, str] = {}
        self.symbolic: set[str] = set()
        """Names of the symbolic ones."""

    def add(self, name: str, at: int, size: int) -> None:
        """Note a file of the tar."""
        self._files[posixpath.normpath(name)] = at, size

    def follow(self, member: tarfile.TarInfo) -> tuple[int, int] | None:
        """(offset, size) of a link's data; None if its target has not come yet."""
        target = member.linkname
        if member.issym():
            self.symbolic.add(member.name)
            target = posixpath.join(posixpath.dirname(member.name), target)
        found = self._files.get(target := posixpath.normpath(target))
        if found:
            self.add(member.name, *found)
        else:
            self._open[member.name] = target
        return found

    def rest(self) -> Iterator[tuple[str, int, int]]:
        """Links whose targets have come after them."""
        while found := {name: self._files[target] for name, target in self._open.items() if target in self._files}:
            for name, place in found.items():
                self.add(name, *place)
                del self._open[name]
                yield name, *place

    def broken(self) -> dict[str, str]:
        """Name -> target of the links that lead to no file of the tar."""
        return dict(self._open)


@dataclass
class TextData:
    """Small members that are read as they are met."""

    endings: tuple[str, ...]
    data: dict[int, bytes] = field(default_factory=dict)
    """Offset -> bytes; what is not there has to be read."""


def members(
    path: Path,
    entries: Entries,
    offset: int = 0,
    end: int | None = None,
    broken: dict[str, str] | None = None,
    shown: str = "",
    symbolic: set[str] | None = None,
    texts: TextData | None = None,
) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, size) of each file of the tar at `path`, or of one nested in it at `offset`. A link to
    a file of the tar is one, with that one's data; folders are no entries.

    Args:
        entries: counts other links, and devices, as passed over.
        broken: takes name -> target of the other links, which are not counted then.
        shown: what to call the file in messages, if it is a copy.
        symbolic: takes the names of symbolic links.
        texts: takes the data of small texts that were met on the way: members called so.

    Raises:
        DamagedTar: not a tar file, cut short, with a damaged header, or with something after its end.
    """
    if not offset and end is None and (found := walk(path, texts.endings if texts else ())):
        if texts:
            texts.data = found.texts
        yield from found.members
        return
    links, shown = Links(), shown or str(path)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.size < 0:
                        raise DamagedTar(f"{shown}: member {member.name!r} has a size of {member.size}")
                    # offset_data counts from the start of the file object, which is the outer file.
                    if member.islnk() or member.issym():
                        if target := links.follow(member):
                            yield member.name, *target
                    elif member.isreg() and not member.issparse():
                        links.add(member.name, member.offset_data, member.size)
                        yield member.name, member.offset_data, member.size
                    elif not member.isdir():
                        entries.pass_over("sparse file" if member.issparse() else "no file")
                    tar.members = []  # type: ignore[attr-defined]  # keep memory flat over millions of members
                    if end is not None and file.tell() >= end:
                        break
                _check_end(shown, file, tar.offset, end if end is not None else os.fstat(file.fileno()).st_size)
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, tarfile.TarError) and (kind := compression_of(path)):
            raise DamagedTar(f"{shown} is compressed ({kind}): data_prep write unpacks it for its work") from error
        raise DamagedTar(f"{shown}: cannot be read as an uncompressed tar file: {error}") from error
    yield from links.rest()
    if symbolic is not None:
        symbolic |= links.symbolic
    if broken is not None:
        broken.update(links.broken())
    elif count := len(links.broken()):
        entries.pass_over("link", count)


def _check_end(shown: str, file: BinaryIO, offset: int, end: int) -> None:
    """tarfile takes a damaged header, or the end of a cut file, for the end; a real end is a block of zeros."""
    file.seek(offset)
    block = file.read(min(TAR_BLOCK, max(0, end - offset)))
    if len(block) < TAR_BLOCK:
        raise DamagedTar(f"{shown}: cut short at byte {offset}: the end mark of a tar file is missing")
    if any(block):
        raise DamagedTar(f"{shown}: the tar header at byte {offset} is damaged")
    while file.tell() < end and (rest := file.read(min(1 << 20, end - file.tell()))):
        if any(rest):
            raise DamagedTar(
                f"{shown}: there is something after the end mark at byte {offset}, perhaps another tar file"
            )
