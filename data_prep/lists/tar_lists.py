"""What a set of tar files holds: listed in processes, and kept, so that none is listed again that has not changed.

The lists lie in OUT/.lists, a file for each tar file, good while its size and time of modification (and those of
img2dataset's table beside it) stand. Once there is a plan they are what it was made of: where a tar file is gone then,
cannot be read any more, or holds other samples, they say which samples are lost.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from data_prep.listing.archives import UNPACKED, DamagedTar, check_installed, compression_of, plain_tar
from data_prep.listing.base import Entries
from data_prep.listing.classes import NoClass
from data_prep.listing.img2dataset import Rows, beside
from data_prep.listing.reading import Reading
from data_prep.listing.tar_samples import samples_of
from data_prep.listing.tars import TarBudget
from data_prep.writing.pool import in_processes, load_in_workers
from megapix.files import write_atomic

LISTS = ".lists"
PLANNED = "tars.json"
"""Among the lists: names of the tar files that the plan was made of."""
FORMAT = 1
PLAN_NAME = "plan.json"
"""Beside the lists' folder, once there is a plan (`writing.plan`)."""
AT_ONCE = 256 << 20
"""Bytes of tar files that are listed sooner than a process is started."""
GONE = "is not there any more"
CHANGED = "has changed: it holds other samples"

Row: TypeAlias = tuple[Any, ...]
"""The fields of a `TarSample`; a label that is none is the tuple (reason,)."""


class TarList(NamedTuple):
    """The samples of a tar file."""

    tar: Path
    plain: str
    """The file with their bytes: itself, or an unpacked copy."""
    samples: list[Row]
    lost: str = ""
    """Why they cannot be read any more, though the plan has them."""


class _Made(NamedTuple):
    """What a process has made of a tar file."""

    plain: str = ""
    payload: bytes = b""
    damage: str = ""


def folder_in(out: Path) -> Path | None:
    """Where the lists of a command lie that writes into `out`; None if that is somebody else's folder."""
    if not out.exists() or (out / PLAN_NAME).is_file() or (out.is_dir() and set(os.listdir(out)) <= {LISTS, UNPACKED}):
        return out / LISTS
    return None


def planned_in(lists: Path | None) -> list[str]:
    """Names of the tar files that the plan was made of; none before there is one."""
    if lists is None or not (lists / PLANNED).is_file() or not _has_plan(lists):
        return []
    return list(json.loads((lists / PLANNED).read_bytes()))


def lists_of(tars: Sequence[Path], reading: Reading, entries: Entries) -> Iterator[TarList]:
    """The samples of each tar file, in the order of the files. Those that cannot be read are rejected.

    Args:
        tars: with those that the plan was made of, though they may be gone.
        entries: counts what they hold.

    Raises:
        InputError: more tar files that cannot be read than allowed, or a package that one of them needs is not
            installed.
    """
    budget, planned = TarBudget(reading.max_rejected_tars, len(tars)), set(planned_in(reading.lists))
    states = {tar: _state(tar) for tar in tars}
    good = {tar for tar in tars if states[tar] and _kept(reading, tar)[0] == states[tar]}
    made = _made([tar for tar in tars if states[tar] and tar not in good], reading)
    for tar in tars:
        _, payload = _kept(reading, tar, whole=tar in good or tar.name in planned)
        if tar in good:
            new = _Made(str(tar), payload) if payload else _list(reading, tar)
        else:
            new = next(made) if states[tar] else _Made(damage=GONE)
        lost = ""
        if tar not in good and tar.name in planned and payload:
            lost = _lost(new, payload)
        if new.damage or lost:
            budget.spend(tar.name, new.damage or lost)
        if new.damage and not lost:
            entries.reject(tar.name, new.damage)
            continue
        if not lost and tar not in good and (not planned or tar.name in planned):
            _keep(reading, tar, states[tar], new.payload)
        (listed, parts, passed, captioned, remarks), samples = marshal.loads(payload if lost else new.payload)
        entries.add(Entries(listed, parts, passed, captioned=captioned, remarks=remarks))
        if lost:
            entries.lost[tar.name] = lost
        yield TarList(tar, new.plain, samples, lost)
    if reading.lists and not _has_plan(reading.lists):
        with _room(reading.lists):
            write_atomic(reading.lists / PLANNED, json.dumps([tar.name for tar in tars]).encode())


def _made(tars: Sequence[Path], reading: Reading) -> Iterator[_Made]:
    """What the tar files hold, in their order."""
    work = partial(_list, reading)
    if len(tars) < 2 or reading.workers < 2 or sum(tar.stat().st_size for tar in tars) <= AT_ONCE:
        yield from map(work, tars)
        return
    load_in_workers("data_prep.lists.tar_lists", "data_prep.writing.shard", "webdataset")
    found: dict[Path, _Made] = {}
    waiting = iter(tars)
    following = next(waiting)
    for tar, made in in_processes(work, tars, reading.workers):
        found[tar] = made
        while following in found:
            yield found.pop(following)
            following = next(waiting, Path())


def _list(reading: Reading, tar: Path) -> _Made:
    counted = Entries()
    try:
        check_installed(tar)
    except OSError as error:
        return _Made(damage=f"{tar}: cannot be read: {error.strerror or error}")
    try:
        plain = plain_tar(tar, reading.unpacked)
        samples = samples_of(plain, counted, reading, Rows(partial(beside, tar), reading), str(tar))
    except DamagedTar as error:
        return _Made(damage=str(error))
    rows = [
        (*sample[:4], tuple(sample.label) if isinstance(sample.label, NoClass) else sample.label, *sample[5:])
        for sample in samples
    ]
    about = counted.listed, counted.parts, counted.passed, counted.captioned, counted.remarks
    return _Made(str(plain), marshal.dumps((about, rows)))


def _lost(new: _Made, before: bytes) -> str:
    """What has become of a tar file, in the words of a message; empty if its samples are still there."""
    if new.damage:
        return GONE if new.damage == GONE else f"cannot be read any more ({new.damage})"
    return "" if _alike(before, new.payload) else CHANGED


def _alike(before: bytes, now: bytes) -> bool:
    """Whether two lists have the same samples, wherever in the file these lie."""
    return all(
        len(old) == len(new) and all(a[:2] == b[:2] and a[4:] == b[4:] for a, b in zip(old, new, strict=True))
        for old, new in [(marshal.loads(before)[1], marshal.loads(now)[1])]
    )


def _state(tar: Path) -> str:
    """What changes with the content of a tar file, or of the table beside it; empty if the file is gone."""
    try:
        of = [tar.stat(), *([table.stat()] if (table := beside(tar)) else [])]
    except OSError:
        return ""
    return repr([(one.st_size, one.st_mtime_ns) for one in of])


# ---------------------------------------------------------------------------------------------------------------------
# As they are kept: 4 bytes with the length of a header, the header, and the list
# ---------------------------------------------------------------------------------------------------------------------


def _has_plan(lists: Path) -> bool:
    return (lists.parent / PLAN_NAME).is_file()


def _how(reading: Reading) -> str:
    """What a list depends on, beside the files."""
    return repr((FORMAT, sys.version_info[:2], reading.keys, reading.columns, reading.image_keys))


def _path(lists: Path, tar: Path) -> Path:
    return lists / f"{hashlib.sha256(os.fsencode(tar.name)).hexdigest()[:32]}.list"


def _kept(reading: Reading, tar: Path, whole: bool = False) -> tuple[str, bytes]:
    """(state of the files that it is of, the list itself if `whole`); empty where none is kept that is read alike."""
    if reading.lists is None:
        return "", b""
    try:
        with open(_path(reading.lists, tar), "rb") as file:
            how, state, crc = marshal.loads(file.read(int.from_bytes(file.read(4), "little")))
            payload = file.read() if whole else b""
    except (OSError, ValueError, EOFError, TypeError):
        return "", b""
    if how != _how(reading) or (whole and zlib.crc32(payload) != crc):
        return "", b""
    return state, payload


def _keep(reading: Reading, tar: Path, state: str, payload: bytes) -> None:
    if reading.lists is None or compression_of(tar):  # a compressed one has to be unpacked again in any case
        return
    header = marshal.dumps((_how(reading), state, zlib.crc32(payload)))
    with _room(reading.lists):
        write_atomic(_path(reading.lists, tar), len(header).to_bytes(4, "little") + header + payload)


@contextmanager
def _room(lists: Path) -> Iterator[None]:
    """A list that cannot be kept is made again: a full disk is named by what has to be written."""
    with suppress(OSError):
        lists.mkdir(parents=True, exist_ok=True)
        yield
