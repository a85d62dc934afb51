"""The headers of an ordinary tar file, walked many times sooner than by tarfile, which stays the reference.

Ordinary are files and folders in USTAR, GNU and PAX form, with long names and times in fractions of seconds. What is
not (links, sparse files, damage, a name that is no UTF-8, …) is left to tarfile, so that one place judges it: `walk`
gives None then, and costs little.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from megapix.shards.index import TAR_BLOCK

Member: TypeAlias = tuple[str, int, int]
"""(name, offset of its data in the file, size)."""
WINDOW = 1 << 13
"""Bytes that are read at a time: a header, and often a small member with the next header."""
SMALL = 1 << 12
"""Bytes of the texts that are kept as they are met."""
CHECKED = 1 << 12
"""Headers whose checksums are counted together."""
CHECKSUM = slice(148, 156)
NUMBERS = [
    slice(*ends) for ends in ((100, 108), (108, 116), (116, 124), (136, 148), (148, 156), (329, 337), (337, 345))
]
"""Bytes of a header with its mode, owners, time, checksum and device: octal digits, then blanks or zeros."""
END = bytes(TAR_BLOCK)
FILES, FOLDER, PAX, LONG_NAME = (b"0", b"\0"), b"5", b"x", b"L"
RECORD = re.compile(rb"(\d+) ([^=\n]+)=")
IGNORED = re.compile(rb"[amc]time|[ug]id|[ug]name|comment|(SCHILY|LIBARCHIVE)\..*")
"""Keys of a PAX header that change neither name nor data."""


class Walk(NamedTuple):
    """What an ordinary tar file holds."""

    members: list[Member]
    """Its files, in its order."""
    texts: dict[int, bytes]
    """Offset -> data of those small ones that were asked for."""


class _Unusual(Exception):
    """Something that tarfile is to judge."""


def walk(path: Path, texts: tuple[str, ...] = ()) -> Walk | None:
    """The files of the tar at `path`; None where it is not an ordinary one from beginning to end.

    Args:
        texts: endings of the names whose data are wanted, too.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return _walk(file.fileno(), os.fstat(file.fileno()).st_size, texts)
    except (_Unusual, ValueError, OSError):  # ValueError: a number or a text that is none
        return None


def _walk(descriptor: int, length: int, texts: tuple[str, ...]) -> Walk:
    members: list[Member] = []
    kept: dict[int, bytes] = {}
    headers: list[bytes] = []
    window, start = b"", 0
    at, longer, extended = 0, "", False
    while True:
        if not start <= at <= start + len(window) - TAR_BLOCK:
            window, start = os.pread(descriptor, WINDOW, at), at
        header = window[at - start : at - start + TAR_BLOCK]
        if len(header) < TAR_BLOCK:
            raise _Unusual
        if header == END and not extended:
            break
        headers.append(header)
        if len(headers) == CHECKED:
            _check(headers)
            headers = []
        size = int(header[124:135], 8) if not header[135] else _octal(header[124:136])
        kind, data = header[156:157], at + TAR_BLOCK
        at = data + (size + TAR_BLOCK - 1) // TAR_BLOCK * TAR_BLOCK
        if size < 0 or data + size > length:
            raise _Unusual
        if kind in FILES:
            name = longer or _name(header)
            longer, extended = "", False
            if not name or name[-1] == "/":
                raise _Unusual
            members.append((name, data, size))
            if texts and size <= SMALL and name.endswith(texts):
                inside = window[data - start : data - start + size]
                kept[data] = inside if len(inside) == size else os.pread(descriptor, size, data)
        elif kind in (PAX, LONG_NAME) and not extended:
            extended = True
            inside = window[data - start : data - start + size]
            block = inside if len(inside) == size else os.pread(descriptor, size, data)
            longer = _path(block) if kind == PAX else block.partition(b"\0")[0].decode()
            if kind == LONG_NAME and not longer:
                raise _Unusual
        elif kind == FOLDER and not size:
            longer, extended = "", False
        else:
            raise _Unusual
    _check(headers)
    _check_rest(descriptor, at, length)
    return Walk(members, kept)


def _octal(field: bytes) -> int:
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    """The name in a USTAR header; UnicodeDecodeError, which is a ValueError."""
    name = header[:100].partition(b"\0")[0]
    if header[345]:
        return (header[345:500].partition(b"\0")[0] + b"/" + name).decode()
    return name.decode()


def _path(block: bytes) -> str:
    """The name that a PAX header gives the next file; empty if it gives none."""
    at, path = 0, ""
    while at < len(block) and block[at]:
        match = RECORD.match(block, at)
        if match is None:
            raise _Unusual
        end = at + int(match[1])
        if not match.end() < end <= len(block) or block[end - 1] != 10:
            raise _Unusual
        if match[2] == b"path":
            path = block[match.end() : end - 1].decode()
        elif not IGNORED.fullmatch(match[2]):
            raise _Unusual
        at = end
    return path


def _check(headers: list[bytes]) -> None:
    """Compare the checksums, which count their own eight bytes as blanks, and look at the numbers that nobody uses but
    tarfile refuses where they are none."""
    if not headers:
        return
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, TAR_BLOCK)
    for field in NUMBERS:
        cells = table[:, field]
        digits = (cells >= ord("0")) & (cells < ord("8"))
        if not (digits | (cells == 0) | (cells == ord(" "))).all() or (digits[:, 1:] & ~digits[:, :-1]).any():
            raise _Unusual
    sums = table.sum(axis=1, dtype=np.int64) - table[:, CHECKSUM].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    values = table[:, 148:154].astype(np.int64) - ord("0")
    written = values @ (8 ** np.arange(5, -1, -1))
    plain = ((values >= 0) & (values < 8)).all(axis=1) & (table[:, 154] == 0)  # six digits, as most write it
    for row in np.flatnonzero(~plain).tolist():
        written[row] = _octal(headers[row][CHECKSUM])
    if (written != sums).any():
        raise _Unusual


def _check_rest(descriptor: int, at: int, length: int) -> None:
    """After the end mark there are zeros alone."""
    while at < length and (rest := os.pread(descriptor, 1 << 20, at)):
        if rest.count(0) != len(rest):
            raise _Unusual
        at += len(rest)
