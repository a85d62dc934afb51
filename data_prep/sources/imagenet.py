"""ImageNet's training set as it ships: one tar file for each synset, in a folder or inside one large tar file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.listing.archives import is_tar, names_in, plain_tar
from data_prep.listing.base import Entries, Item, ending, is_image
from data_prep.listing.classes import numbered
from data_prep.listing.files import files_in
from data_prep.listing.reading import PLAIN, Reading
from data_prep.listing.tars import TarReader, members
from megapix.errors import InputError

SYNSET = re.compile(r"(?:.*/)?(n\d{8})\.tar")


@dataclass(frozen=True)
class SynsetTars:
    """ILSVRC2012 train; classes are the synsets (n01440764, …) in order, which is the usual class numbering."""

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: TarReader = field(default_factory=TarReader)
    about: dict[str, Any] = field(default_factory=lambda: {"kind": "ImageNet synset tars"})
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there are tar files named by synset."""
        if path.is_dir():
            return any(SYNSET.fullmatch(entry.name) for entry in path.iterdir())
        return is_tar(path.name) and any(SYNSET.fullmatch(name) for name in names_in(path))

    @classmethod
    def open(cls, path: Path, reading: Reading = PLAIN) -> SynsetTars:
        """List the images of every synset.

        Raises:
            InputError: no synset tar, or one that is damaged or holds no image.
        """
        entries, found = Entries(), list[tuple[str, Path, int, int | None]]()
        if inside := path.is_file():
            path = plain_tar(path, reading.unpacked)
        for name, at, size in members(path, entries) if inside else ((n, 0, 0) for n in files_in(path, entries)):
            if not (match := SYNSET.fullmatch(name)):
                entries.pass_over(ending(name))
            elif inside:
                found.append((match[1], path, at, at + size))
            else:
                found.append((match[1], plain_tar(path / name, reading.unpacked), 0, None))
        if not found:
            raise InputError(f"source {str(path)!r} holds no synset tar such as n01440764.tar")
        found.sort(key=lambda entry: entry[0])
        synsets = [synset for synset, *_ in found]
        labels = numbered(synsets, reading.classes) if reading.classes else [(n, "") for n in range(len(found))]
        items: list[Item] = []
        for (synset, file, start, end), (label, fault) in zip(found, labels, strict=True):
            there = sorted(members(file, entries, start, end))
            images = [entry for entry in there if is_image(entry[0])]
            for name, *_ in there:
                if is_image(name):
                    entries.item()
                else:
                    entries.pass_over(ending(name))
            if not images:
                raise InputError(f"{file}: synset {synset} holds no image")
            for name, at, size in images:
                items.append(Item(f"{synset}/{name}", label, synset, (str(file), at, size), fault=fault))
        return cls(reading.classes.names if reading.classes else tuple(synsets), items, entries=entries)
