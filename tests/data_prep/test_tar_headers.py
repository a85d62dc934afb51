"""The quick walk over tar headers gives what tarfile gives, or leaves the file to it."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_prep.listing.tar_headers import walk

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = ["a.jpg", "deep/" * 30 + "b.jpg", "x" * 96 + ".png", "deep.er/" + "y" * 95, "grün/ö.txt", "7.cls", "e.json"]
LONG = "z" * 150 + ".jpg"


def tar_with(path: Path, kind: str, change: Any = None, names: list[str] = NAMES) -> Path:
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for n, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = (700 * n + 13) % 9001 if n else 0
            member.mtime = 1_700_000_000 + (n + 0.25 if kind == "pax" else n)
            if change:
                change(n, member)
            tar.addfile(member, io.BytesIO(bytes([n % 251 + 1]) * member.size) if member.isreg() else None)
    return path


def by_tarfile(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


@pytest.mark.parametrize("kind", FORMATS)
def test_ordinary_files_are_walked(kind: str, tmp_path: Path) -> None:
    def folder(n: int, member: tarfile.TarInfo) -> None:
        if n == 4:
            member.type, member.size = tarfile.DIRTYPE, 0

    names = NAMES if kind == "ustar" else [*NAMES, LONG, "ü" * 80]
    for change in (None, folder):
        path = tar_with(tmp_path / "a.tar", kind, change, names)
        found = walk(path, (".cls", ".txt", ".json"))
        assert found
        assert found.members == by_tarfile(path)
        data = path.read_bytes()
        small = [
            (at, size) for name, at, size in found.members if name.endswith((".cls", ".txt", ".json")) and size <= 4096
        ]
        assert found.texts == {at: data[at : at + size] for at, size in small}


def test_many_headers_and_large_members(tmp_path: Path) -> None:
    def large(n: int, member: tarfile.TarInfo) -> None:
        member.size = 100_000 if n % 700 == 3 else n % 3

    path = tar_with(tmp_path / "a.tar", "ustar", large, [f"{n:05d}.jpg" for n in range(5000)])
    found = walk(path)
    assert found
    assert (found.members, found.texts) == (by_tarfile(path), {})


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"g"])
def test_what_is_not_ordinary_is_left_to_tarfile(kind: bytes, tmp_path: Path) -> None:
    def change(n: int, member: tarfile.TarInfo) -> None:
        if n == 3:
            member.type, member.linkname, member.size = kind, NAMES[0], 0

    assert walk(tar_with(tmp_path / "a.tar", "gnu", change)) is None


def test_odd_ends_are_left_to_tarfile(tmp_path: Path) -> None:
    whole = tar_with(tmp_path / "a.tar", "gnu").read_bytes()
    at = whole.rindex(b"e.json")
    for n, data in enumerate(
        (b"", whole[:at], whole[: at + 600], whole + b"more", whole + whole, b"\x1f\x8b" + whole[2:])
    ):
        (tmp_path / f"{n}.tar").write_bytes(data)
        assert walk(tmp_path / f"{n}.tar") is None, n
    assert walk(tmp_path / "none.tar") is None


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_headers_are_never_read_otherwise_than_by_tarfile(kind: str, tmp_path: Path) -> None:
    """Bytes of headers are changed, with the checksum that fits: whatever the walk takes, tarfile reads alike."""
    rng, path = random.Random(7), tmp_path / "a.tar"
    whole = tar_with(path, kind, names=[*NAMES[:5], LONG, *NAMES[5:]] if kind != "ustar" else NAMES).read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    taken = 0
    for _ in range(300):
        data, at = bytearray(whole), rng.choice(headers)
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.choice((rng.randrange(512), rng.randrange(100, 160), 156, 1024, 1030))
            byte = rng.choice((rng.randrange(256), ord("0") + rng.randrange(8), 0, 32, ord("/"), ord("x"), ord("5")))
            data[min(at + place, len(data) - 1)] = byte
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        path.write_bytes(data)
        if (found := walk(path)) is not None:
            taken += 1
            assert found.members == by_tarfile(path)
    assert 30 < taken < 290


def test_wrong_checksums_are_left_to_tarfile(tmp_path: Path) -> None:
    data = bytearray(tar_with(tmp_path / "a.tar", "gnu").read_bytes())
    at = data.index(b"7.cls")
    data[at] = ord("8")
    (tmp_path / "a.tar").write_bytes(data)
    assert walk(tmp_path / "a.tar") is None
