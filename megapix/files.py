"""Files and folders written whole: atomic, synced to disk, and checked for being writable before the work starts; and
the header of safetensors files that are written as a stream."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megapix.errors import InputError
from megapix.outage import persist


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside `path`; at the end it is synced to disk and gets its name.

    Raises:
        OSError: it cannot be written; nothing is left beside.
    """
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def temporary_of(path: Path) -> Path:
    """A name beside `path` for what is being written: no process of any machine has the same."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_atomic(path: Path, data: bytes) -> None:
    """`whole_file` of bytes that are in memory."""
    with whole_file(path) as file:
        file.write(data)


def write_new(path: Path, data: bytes) -> bool:
    """Write a whole file unless one is there; return whether this call has. Of processes of several machines that try
    at once, one has.

    Raises:
        OSError: it cannot be written.
    """
    temporary = temporary_of(path)
    try:
        with open(temporary, "xb") as made:
            made.write(data)
            made.flush()
            os.fsync(made.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:  # also where NFS has lost the answer to a call that went well
            return os.stat(temporary).st_nlink == 2
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            with suppress(FileExistsError), open(path, "xb") as file:  # a file system without hard links
                file.write(data)
                return True
            return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(option: str, path: Path) -> None:
    """Check before the work starts that a file can be written at `path`; its folder is made.

    Raises:
        InputError: it cannot; names `option`.
    """
    if path.is_dir():
        raise InputError(f"{option} {str(path)!r} is a folder; expected a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {str(path)!r}: nothing can be written there: {error.strerror}") from error


def size_of(path: Path, minutes: float | None = None) -> int | None:
    """Bytes of a file; None if no file is there. `read_bytes` has the errors and `minutes`."""
    found = _stat(path, minutes)
    return found.st_size if found and stat.S_ISREG(found.st_mode) else None


def is_there(path: Path, minutes: float | None = None) -> bool:
    """Whether a path names anything. `read_bytes` has the errors and `minutes`."""
    return _stat(path, minutes) is not None


def _stat(path: Path, minutes: float | None) -> os.stat_result | None:
    try:
        return persist(path, lambda: os.stat(path), minutes=minutes)
    except (FileNotFoundError, NotADirectoryError):
        return None


def names_in(folder: Path, minutes: float | None = None) -> list[str]:
    """Names in a folder, in order; none if there is no such folder. `read_bytes` has the errors and `minutes`.

    pathlib's `glob` takes a folder that cannot be read now for an empty one.
    """
    try:
        return sorted(persist(folder, lambda: os.listdir(folder), minutes=minutes))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_bytes(path: Path, minutes: float | None = None) -> bytes:
    """A whole file, read again if an error passes (`outage.py`).

    Args:
        minutes: as long as that, in place of the process's own patience.

    Raises:
        StorageError: it cannot be read now.
        OSError: it is not there, or may not be read.
    """
    return persist(path, path.read_bytes, minutes=minutes)


def read_range(path: Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start` on, or fewer where it ends; `read_bytes` has the errors."""

    def once() -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)

    return persist(path, once)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks; `read_bytes` has the errors."""

    def once() -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    return persist(path, once)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, waiting for it, or BlockingIOError. Lock files stay: without one there
    would be two."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def appearing(out: Path, option: str = "--out") -> Iterator[Path]:
    """A path to write a synced file or folder to; at the end it becomes `out`, whole or not at all.

    Raises:
        InputError: it cannot be written; names `option`.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        _remove(temporary)  # of a process that was killed
        yield temporary
        os.replace(temporary, out)
        sync_folder(out.parent)
    except OSError as error:
        raise InputError(f"{option} {str(out)!r} cannot be written: {error.strerror}") from error
    finally:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):
        temporary.unlink()


NUMBER_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of a number, by safetensors' names of dtypes."""


def safetensors_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None, room: int = 0
) -> bytes:
    """The first bytes of a safetensors file whose tensors lie end to end in the order given; their number is a multiple
    of 8. The library writes whole files from memory; with this header a file is written as a stream.

    Args:
        tensors: name -> (safetensors' name of the dtype, shape).
        room: bytes that the header has at least.
    """
    described: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + NUMBER_BYTES[dtype] * math.prod(shape)
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(described, separators=(",", ":")).encode()
    size = max(len(text), room - 8)
    size += -size % 8
    return size.to_bytes(8, "little") + text.ljust(size)
