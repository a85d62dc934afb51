"""Receipts: what is known of a finished part of the work, one JSON file each in OUT/.receipts.

A part is a shard that was written, or a tar file that was indexed. Its receipt holds entries, samples and what was
rejected, so that the index can be put together at the end, and again after an interruption, without looking at the
images a second time. Receipts are read one at a time: memory does not grow with the samples.

A written shard's receipt goes by its number; an indexed tar file's by its name, so that it stays good when other files
come or go, and says which state of the file it is of.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Container
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from data_prep.listing.base import Entries, as_utf8
from megapix.errors import InputError
from megapix.files import write_atomic
from megapix.shards.index import ShardEntry

RECEIPTS = ".receipts"
NO_TABLE = "none"
CHECKS = ("none", "headers", "decode")
"""How closely images of a tar file are looked at, the most closely last (--check)."""
Part = int | str
"""Number of a shard that is written, or name of a tar file that is indexed."""

OPTIONAL = ("caption_keys", "filtered", "notes", "unreadable", "names", "no_class", "columns", "prints", "noted")
"""Fields of a receipt that are left out where they are empty."""


@dataclass(frozen=True)
class Rejected:
    """A sample that could not be used."""

    source: str
    reason: str
    exception: str

    @staticmethod
    def because(source: str, error: Exception) -> Rejected:
        """What is recorded of an error: its text, and the type of what caused it."""
        return Rejected(as_utf8(source), as_utf8(str(error)), type(error.__cause__ or error).__name__)


class TarState(NamedTuple):
    """The tar file that was read for a receipt."""

    name: str
    bytes: int
    changed: str
    """What changes with its content: the time of modification in ns, or a server's ETag."""
    sha256: str
    """Empty if it is not known: the receipt is of an older version."""
    table: str = ""
    """The same of img2dataset's table beside it, or `NO_TABLE`; empty if no sample has asked for one."""


class Sample(NamedTuple):
    """One sample of a receipt; `entry` is a place in the receipt's entries."""

    entry: int
    size: int
    offset: int
    label: int | str
    """Its class number; of a tar file that is indexed, what stands there, and -1 if that is no class."""
    crc: int
    caption: str


@dataclass(frozen=True)
class Receipt:
    """A finished part; no entries where every sample was rejected."""

    entries: tuple[ShardEntry, ...]
    samples: tuple[Sample, ...]
    rejected: tuple[Rejected, ...]
    caption_keys: tuple[str, ...] = ()
    """Keys of --captions that at least one sample of the tar file has in its JSON."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Option -> samples that it took."""
    notes: dict[str, int] = field(default_factory=dict)
    """What is said of used samples -> how many: 'icc converted', 'upscaled', …"""
    listed: Entries | None = None
    """What the tar file holds; None for a shard that was written: its source has counted."""
    tar: TarState | None = None
    """The tar file that was indexed; None for a shard that was written."""
    unreadable: bool = False
    """Whether the tar file as a whole was rejected."""
    names: tuple[str, ...] = ()
    """Names of the samples of a tar file that is indexed; none in receipts of older versions."""
    no_class: tuple[tuple[int, str], ...] = ()
    """(place of a sample, what is wrong with its label)."""
    columns: tuple[str, ...] = ()
    """Columns that filters ask for and that at least one sample of the tar file has."""
    prints: tuple[str, ...] = ()
    """Fingerprints of the samples, in hexadecimal, where duplicates are to be found among all tar files."""
    noted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """As `notes`, with the places of the samples, where duplicates may take some of these."""
    check: str = CHECKS[-1]
    """How closely the images were looked at, one of CHECKS."""

    def name_of(self, place: int) -> str:
        """What a sample is called."""
        sample = self.samples[place]
        return self.names[place] if self.names else f"{self.entries[sample.entry].name} at byte {sample.offset}"

    def without(self, places: Container[int], option: str) -> Receipt:
        """The receipt without the samples at these places, which `option` takes."""
        left = [place for place in range(len(self.samples)) if place not in places]
        kept = [self.samples[place] for place in left]
        counts = Counter(sample.entry for sample in kept)
        entries = sorted(counts)
        wrong = dict(self.no_class)
        now = {place: place_now for place_now, place in enumerate(left)}
        noted = {what: tuple(now[place] for place in there if place in now) for what, there in self.noted.items()}
        return replace(
            self,
            entries=tuple(replace(self.entries[entry], samples=counts[entry]) for entry in entries),
            samples=tuple(sample._replace(entry=entries.index(sample.entry)) for sample in kept),
            filtered=self.filtered | {option: len(self.samples) - len(kept)},
            names=tuple(self.names[place] for place in left) if self.names else (),
            no_class=tuple((now[place], wrong[place]) for place in left if place in wrong),
            prints=tuple(self.prints[place] for place in left),
            notes={what: count for what, count in (self.notes | _counts(noted)).items() if count},
            noted=noted,
        )

    def save(self, out: Path, part: Part) -> None:
        """Write it atomically."""
        data = asdict(self)
        for key in OPTIONAL:
            if not data[key]:
                del data[key]
        if self.check == CHECKS[-1]:
            del data["check"]
        if self.listed is None:
            del data["listed"]
        else:
            for key in ("unreadable", "lost", "captioned", "remarks"):
                if not data["listed"][key]:
                    del data["listed"][key]
        if self.tar is None:
            del data["tar"]
        write_atomic(_path(out, part), (json.dumps(data, ensure_ascii=False) + "\n").encode())


def _counts(noted: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {what: len(places) for what, places in noted.items()}


def load(out: Path, part: Part) -> Receipt | None:
    """The receipt of a part, if there is one.

    Raises:
        InputError: it cannot be read.
    """
    return _load(_path(out, part))


def written_at(out: Path, part: Part) -> int:
    """When the receipt of a part was written: its time of modification in ns; OSError."""
    return _path(out, part).stat().st_mtime_ns


def by_name(out: Path) -> None:
    """Give receipts of indexed tar files their names: those of an older version went by the place in the list.

    Raises:
        InputError: one cannot be read.
    """
    for path in sorted((out / RECEIPTS).iterdir()):
        if re.fullmatch(r"\d{6}\.json", path.name) and (old := _load(path)):
            if old.entries:  # without any it does not say of which tar file it is, which is read again then
                entry = old.entries[0]
                replace(old, tar=TarState(entry.name, entry.bytes, "", "")).save(out, entry.name)
            path.unlink(missing_ok=True)  # another part may have done it


def _load(path: Path) -> Receipt | None:
    try:
        data = json.loads(path.read_bytes())
        return Receipt(
            tuple(ShardEntry(**entry) for entry in data["entries"]),
            tuple(Sample(*sample) for sample in data["samples"]),
            tuple(Rejected(**rejected) for rejected in data["rejected"]),
            caption_keys=tuple(data.get("caption_keys", ())),
            filtered=data.get("filtered", {}),
            notes=data.get("notes", {}),
            listed=Entries(**data["listed"]) if "listed" in data else None,
            tar=TarState(*data["tar"]) if "tar" in data else None,
            unreadable=data.get("unreadable", False),
            names=tuple(data.get("names", ())),
            no_class=tuple((place, reason) for place, reason in data.get("no_class", ())),
            columns=tuple(data.get("columns", ())),
            prints=tuple(data.get("prints", ())),
            noted={what: tuple(places) for what, places in data.get("noted", {}).items()},
            check=data.get("check", CHECKS[-1]),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged; delete it to have its shard written again") from error


def _path(out: Path, part: Part) -> Path:
    name = f"{part:06d}" if isinstance(part, int) else f"tar-{hashlib.sha256(os.fsencode(part)).hexdigest()[:32]}"
    return out / RECEIPTS / f"{name}.json"
