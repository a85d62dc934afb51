"""Existing WebDataset shards, to be written again: an image under each key, with its class number or captions."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.listing.archives import DamagedTar, is_tar, names_in
from data_prep.listing.base import Entries, Item, is_image
from data_prep.listing.captions import check_found
from data_prep.listing.classes import Label, NoClass, settle_counted
from data_prep.listing.files import files_in
from data_prep.listing.img2dataset import beside, count_others
from data_prep.listing.reading import PLAIN, Reading
from data_prep.listing.splits import of_split
from data_prep.listing.tars import TarReader
from data_prep.lists.items import Items, made_in
from data_prep.lists.tar_lists import lists_of, planned_in
from megapix.errors import InputError
from megapix.shards.index import read_index

KIND = "WebDataset shards"


@dataclass(frozen=True)
class Shards:
    """Tar files of samples; class names are taken from an index beside them if there is one, else they are numbers."""

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: TarReader = field(default_factory=TarReader)
    about: dict[str, Any] = field(default_factory=lambda: {"kind": KIND})
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether the first tar file that is neither empty nor damaged holds a `cls`, `txt` or `json` member, or has a
        table beside.

        Raises:
            DamagedTar: all are empty or damaged.
        """
        damage: DamagedTar | None = None
        for tar in _tars(path, Entries()):
            images: list[bool] = []
            try:
                for name in names_in(tar):
                    if name.lower().endswith((".cls", ".txt", ".json")):
                        return True
                    images.append(is_image(name))
            except DamagedTar as error:
                damage = damage or error
                continue
            if images:
                return beside(tar) is not None and any(images)
        if damage:
            raise damage
        return False

    @classmethod
    def open(cls, path: Path, reading: Reading = PLAIN) -> Shards:
        """List the samples of a shard, or of a folder of shards.

        Raises:
            InputError: no tar file, more damaged ones than allowed, several splits without train, more names than
                classes have, or a key that no sample has.
        """
        entries = Entries()
        tars = _tars(path, entries)
        if not tars:
            raise InputError(f"source {str(path)!r} holds no tar file")
        there = {*(tar.name for tar in tars), *planned_in(reading.lists)}  # what the plan has may be gone
        names, split = of_split(sorted(there), reading.split, entries, f"source {str(path)!r}")
        folder = path if path.is_dir() else path.parent
        items, keys, captioned = Items(made_in(reading.lists)), set[str](), bool(reading.keys)
        numbers, counts = dict[Label, int](), array("Q")
        for tar, plain, rows, lost in lists_of([folder / name for name in names], reading, entries):
            for _, name, at, size, raw, caption, fault, has, about in rows:
                keys.update(has)
                number = -1
                if not fault:
                    number = numbers.setdefault(NoClass(*raw) if isinstance(raw, tuple) else raw, len(counts))
                    counts.extend([0] * (number == len(counts)))
                    counts[number] += 1
                    captioned = captioned or bool(caption)
                place = (plain, at, size)
                items.add(
                    Item(
                        f"{tar.name}/{name}",
                        number,
                        caption,
                        place,
                        about=about,
                        fault=fault or (lost and f"its tar file {lost}"),
                    )
                )
        if not items:
            raise InputError(f"source {str(path)!r} holds no sample")
        check_found(reading.keys, keys, f"source {str(path)!r}")
        found = dict(zip(numbers, counts, strict=True))
        classes, settled = settle_counted(found, reading.classes, captioned, names_beside(path))
        items.settle(settled)
        entries.remark(classes.remark)
        return cls(classes.names, items, about={"kind": KIND, **reading.recorded(), **split}, entries=entries)


def names_beside(folder: Path) -> tuple[str, ...]:
    """Class names in our index beside the shards; none if there is no such index (or a stranger's)."""
    try:
        return read_index(folder).class_names
    except InputError:
        return ()


def _tars(path: Path, entries: Entries) -> list[Path]:
    """The tar files; other files of the folder are counted as parts (img2dataset's tables) or passed over."""
    if not path.is_dir():
        return [path] if is_tar(path.name) else []
    names = files_in(path, entries)
    tars = [name for name in names if is_tar(name)]
    count_others(names, tars, entries)
    return [path / name for name in tars]
