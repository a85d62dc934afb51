"""Receipts: what is known of a finished part of the work, one JSON file each in OUT/.receipts.

A part is a shard that was written, or a tar file that was indexed. Its receipt holds entries, samples and what was
rejected, so that the index can be put together at the end, and again after an interruption, without looking at the
images a second time. Receipts are read one at a time: memory does not grow with the samples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_prep.sources.base import Entries, as_utf8
from megapix.errors import InputError
from megapix.files import write_atomic
from megapix.shards.index import ShardEntry

RECEIPTS = ".receipts"


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


class Sample(NamedTuple):
    """One sample of a receipt; `entry` is a place in the receipt's entries."""

    entry: int
    size: int
    offset: int
    label: int
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
    listed: Entries | None = None
    """What the tar file holds; None for a shard that was written: its source has counted."""

    def save(self, out: Path, number: int) -> None:
        """Write it atomically."""
        data = asdict(self)
        if not self.caption_keys:
            del data["caption_keys"]
        if not self.filtered:
            del data["filtered"]
        if self.listed is None:
            del data["listed"]
        write_atomic(_path(out, number), (json.dumps(data, ensure_ascii=False) + "\n").encode())


def load(out: Path, number: int) -> Receipt | None:
    """The receipt of part `number`, if there is one.

    Raises:
        InputError: it cannot be read.
    """
    path = _path(out, number)
    try:
        data = json.loads(path.read_text())
        return Receipt(
            tuple(ShardEntry(**entry) for entry in data["entries"]),
            tuple(Sample(*sample) for sample in data["samples"]),
            tuple(Rejected(**rejected) for rejected in data["rejected"]),
            tuple(data.get("caption_keys", ())),
            data.get("filtered", {}),
            Entries(**data["listed"]) if "listed" in data else None,
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged; delete it to have its shard written again") from error


def _path(out: Path, number: int) -> Path:
    return out / RECEIPTS / f"{number:06d}.json"
