"""What a source is: a list of samples in a fixed order, and a reader for any of them.

Readers are small and are pickled into the worker processes, so they hold paths, not the list. Kinds of sources are in
`sources/`, one file each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from megapix.shards.decoding.heads import decides
from megapix.shards.index import IMAGE_ENDINGS

SHOWN_EXTENSIONS = "png, jpg, webp, gif, bmp, tif, avif, jp2, heic, jxl"
"""Those of messages."""
LARGEST_LABEL = 999_999
"""Class numbers above this are taken for a mistake."""


class Item(NamedTuple):
    """One sample of a source."""

    name: str
    """Unique, and independent of where the source lies; goes into the shard's JSON."""
    label: int
    """A place in the source's list of classes."""
    caption: str
    """One text, as `megapix.shards.captions` packs them: a single caption is its own text; empty if there is none."""
    place: tuple[Any, ...] = ()
    """Where the reader finds it, if the name is not enough."""
    chunk: str = ""
    """What must be read as a whole to read this sample, such as a parquet row group; the plan keeps a chunk's samples
    together."""
    about: str = ""
    """What is known of it besides, as the text of a JSON object; empty if nothing is."""
    fault: str = ""
    """Why it cannot be used, if that is known before its image is read: it is rejected."""


@dataclass
class Entries:
    """What became of the entries that a source lists (files, tar or zip members, parquet rows), each counted once, but
    for what reading the images will say of its items."""

    listed: int = 0
    parts: int = 0
    """Captions, labels and metadata of samples."""
    passed: dict[str, int] = field(default_factory=dict)
    """Kind -> entries that belong to no sample: a file's ending, 'hidden', 'link', …"""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Tar file that is rejected as a whole -> the reason; each is one entry."""
    lost: dict[str, str] = field(default_factory=dict)
    """Tar file of the plan -> why it cannot be read any more; its samples have a fault."""
    captioned: bool = False
    """Whether samples are meant to have captions, so that it is worth a remark if none has one."""
    remarks: list[str] = field(default_factory=list)
    """Lines about the whole source that its user should know: printed, and kept for `inspect`."""

    @property
    def losses(self) -> list[str]:
        """A line for each tar file that is lost."""
        then = "its samples are rejected where they are not written yet"
        return [f"tar file {name!r} of the plan {why}: {then}" for name, why in self.lost.items()]

    def remark(self, line: str) -> None:
        """Have a line printed, once; an empty one says nothing."""
        if line and line not in self.remarks:
            self.remarks.append(line)

    def item(self, count: int = 1) -> None:
        """Count entries that are samples' images: used, filtered or rejected later."""
        self.listed += count

    def part(self, count: int = 1) -> None:
        """Count entries that are part of a sample."""
        self.listed += count
        self.parts += count

    def pass_over(self, kind: str, count: int = 1) -> None:
        """Count entries that are of no kind that is read."""
        self.listed += count
        self.passed[kind] = self.passed.get(kind, 0) + count

    def reject(self, name: str, reason: str) -> None:
        """Count a tar file that cannot be read."""
        self.listed += 1
        self.unreadable[name] = reason

    def add(self, other: Entries) -> None:
        """Count what another one has counted."""
        self.listed += other.listed - sum(other.passed.values())
        self.parts += other.parts
        self.unreadable |= other.unreadable
        self.lost |= other.lost
        self.captioned = self.captioned or other.captioned
        for kind, count in other.passed.items():
            self.pass_over(kind, count)
        for line in other.remarks:
            self.remark(line)


class Filtered(Exception):
    """A sample that an option takes, and that is not wanted therefore."""

    def __init__(self, option: str) -> None:
        super().__init__(option)
        self.option = option


HEAD = 1 << 17
"""Bytes at the beginning of an image that are read for its size: JPEG has metadata of up to 64 KiB a segment there."""


class Reader(Protocol):
    """Reads the samples of one source, in any process."""

    def read(self, item: Item, size: int) -> bytes:
        """An encoded image of any kind that is read; a source of vectors draws it at `size`; ValueError or OSError."""

    def head(self, item: Item, size: int) -> bytes:
        """As `read`, or where that costs less, the first HEAD bytes alone."""
        return self.read(item, size)


def header_of(reader: Reader, item: Item, size: int) -> bytes:
    """As `Reader.read`, but perhaps no more of an image than what decides about its size."""
    head = reader.head(item, size)
    return reader.read(item, size) if len(head) == HEAD and not decides(head) else head


class Source(Protocol):
    """A listed source."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number."""

    @property
    def items(self) -> Sequence[Item]:
        """Every sample, in a fixed order."""

    @property
    def about(self) -> dict[str, Any]:
        """What the index records: kind, and licence and attribution where there are any."""

    @property
    def reader(self) -> Reader:
        """Reads the items."""

    @property
    def entries(self) -> Entries:
        """What has been listed."""


def is_image(name: str) -> bool:
    """Whether a file name has an image's ending and is not hidden."""
    return name.lower().endswith(IMAGE_ENDINGS) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, or one of macOS's resource forks."""
    *folders, base = name.split("/")
    return base.startswith(".") or "__MACOSX" in folders


def ending(name: str) -> str:
    """The kind of an entry that is passed over: 'hidden', its ending in lower case, or 'no ending'."""
    if is_hidden(name):
        return "hidden"
    base = name.rpartition("/")[2].lower()
    return f".{base.rpartition('.')[2]}" if "." in base else "no ending"


def in_one_line(error: BaseException) -> str:
    """What a library says of a damaged file, which may be nothing, several lines, or bytes of that file."""
    said = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in said)


def of_parquet() -> tuple[type[Exception], ...]:
    """What pyarrow raises of a file that is damaged, or is none; names that are not UTF-8 among it."""
    import pyarrow

    return pyarrow.ArrowException, OSError, UnicodeDecodeError


def as_utf8(text: str) -> str:
    """The text with what UTF-8 cannot hold (lone surrogates, bytes of another encoding) spelled out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
