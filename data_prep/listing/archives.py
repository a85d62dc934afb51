"""Compressed tar files: recognised by their first bytes, and unpacked once, so that members are read by offset."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib.util
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megapix.errors import InputError
from megapix.files import whole_file

MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00", "zstd": b"\x28\xb5\x2f\xfd"}
"""Compression -> the first bytes of a file."""
PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""Endings of compressed tar files."""
UNPACKED = ".unpacked"
"""Folder in OUT, for as long as `write` is at work."""


class DamagedTar(InputError):
    """A tar file that cannot be read: one rejected entry of a set of them."""


def is_packed(name: str) -> bool:
    """Whether a file has the name of a compressed tar file."""
    return name.lower().endswith(PACKED)


def is_tar(name: str) -> bool:
    """Whether a file has the name of a tar file, compressed or not."""
    return name.endswith(".tar") or is_packed(name)


def without_ending(name: str) -> str:
    """The name of a tar file, compressed or not, without that ending."""
    ending = next((ending for ending in (*PACKED, ".tar") if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def compression_of(path: Path) -> str:
    """How a file is compressed, whatever its name says; empty if it is not."""
    with open(path, "rb") as file:
        first = file.read(6)
    return next((kind for kind, magic in MAGIC.items() if first.startswith(magic)), "")


def plain_tar(path: Path, unpacked: Path | None) -> Path:
    """The tar file itself, or if it is compressed, an unpacked copy in the folder `unpacked`, which is made once.

    Raises:
        DamagedTar: it is damaged. InputError: its compression's package is not installed, or there is no such folder.
    """
    kind = compression_of(path)
    if not kind:
        return path
    if unpacked is None:
        raise InputError(f"{path} is compressed ({kind}); expected a plain tar file")
    about = path.stat()
    known = hashlib.sha256(os.fsencode(f"{path.resolve()}\n{about.st_size}\n{about.st_mtime_ns}")).hexdigest()
    plain = unpacked / f"{known[:32]}.tar"
    if not plain.is_file():
        unpacked.mkdir(parents=True, exist_ok=True)
        try:
            with _opened(path, kind) as packed, whole_file(plain) as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        except _damage() as error:
            raise DamagedTar(f"{path}: cannot be unpacked ({kind}): {error}") from error
    return plain


def check_installed(path: Path) -> None:
    """Raise InputError if a file is compressed in a way whose package is not installed."""
    if compression_of(path) == "zstd" and importlib.util.find_spec("zstandard") is None:
        raise InputError(f"{path} needs zstandard: pip install 'megapix[zstd]'")


def names_in(path: Path) -> Iterator[str]:
    """Names of the members of a tar file, compressed or not, read no further than they are asked for.

    Raises:
        InputError: as `plain_tar`.
    """
    kind = compression_of(path)
    try:
        with _opened(path, kind) if kind else open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            yield from (member.name for member in tar)
    except _damage() as error:
        raise DamagedTar(f"{path}: cannot be read as a tar file: {error}") from error


def _opened(path: Path, kind: str) -> Any:
    if kind == "gzip":
        return gzip.open(path)
    if kind == "bzip2":
        return bz2.open(path)
    if kind == "xz":
        return lzma.open(path)
    check_installed(path)
    import zstandard

    return zstandard.open(path, "rb")


def _damage() -> tuple[type[Exception], ...]:
    """What the libraries raise for damaged data; a full disk is an OSError of another kind."""
    found: tuple[type[Exception], ...] = (EOFError, ValueError, tarfile.TarError)
    found += (zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    if importlib.util.find_spec("zstandard") is None:
        return found
    import zstandard

    return (*found, zstandard.ZstdError)
