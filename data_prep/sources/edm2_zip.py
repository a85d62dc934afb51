"""A zip file of images: in the layout of EDM2's dataset tool, with labels in `dataset.json`, or with class folders."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.listing.base import SHOWN_EXTENSIONS, Entries, Item, Reader, ending, in_one_line, is_image
from data_prep.listing.captions import of_class
from data_prep.listing.classes import Label, NoClass, label_of, settle
from data_prep.listing.reading import PLAIN, Reading
from data_prep.listing.splits import of_split
from data_prep.sources.image_folder import numbered_folders
from megapix.errors import InputError
from megapix.text import text_of

LABELS = "dataset.json"
READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
"""Methods of compression that are read."""


@lru_cache(maxsize=2)
def _archive(path: Path) -> zipfile.ZipFile:
    """The open archive of this process: its directory is read once, not for each image."""
    return zipfile.ZipFile(path)


@dataclass(frozen=True)
class ZipReader(Reader):
    """Images of a zip file, by name."""

    path: Path

    def read(self, item: Item, size: int) -> bytes:
        """The member's bytes, checked by the archive's CRC."""
        try:
            return _archive(self.path).read(item.name)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of damaged bytes zipfile makes all kinds
            raise ValueError(in_one_line(error)) from error


@dataclass(frozen=True)
class Edm2Zip:
    """Images and `dataset.json`: {"labels": [["00000/img00000000.png", 0], …]}, or null where there are no classes.
    Without that file the class is the first folder, as in an image folder."""

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: ZipReader
    about: dict[str, Any] = field(default_factory=lambda: {"kind": "EDM2 zip"})
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it is a zip file."""
        return path.is_file() and zipfile.is_zipfile(path)

    @classmethod
    def open(cls, path: Path, reading: Reading = PLAIN) -> Edm2Zip:
        """List the images.

        Raises:
            InputError: not a zip file, no image in it, a wrong dataset.json, or several splits without train.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                members = {member.filename: member for member in archive.infolist() if not member.is_dir()}
                given = _labels(archive, path) if LABELS in members else None
        except (InputError, MemoryError):
            raise
        except Exception as error:  # as above
            raise InputError(f"source {str(path)!r} cannot be read as a zip file: {in_one_line(error)}") from error
        entries = Entries()
        images = sorted(name for name in members if is_image(name))
        if not images:
            raise InputError(f"source {str(path)!r} holds no image ({SHOWN_EXTENSIONS})")
        names, split = of_split(images, reading.split, entries, f"source {str(path)!r}", files=False)
        if given is None and (placed := _class_folders(names)):
            for name in names:
                if name not in placed:
                    entries.pass_over("image outside the class folders")
            kind, (classes, items, about) = "image folder in a zip", _of_folders(placed, reading, entries)
        else:
            if reading.class_order:
                raise InputError(
                    f"--class-order has no meaning for {str(path)!r}; expected a zip file of class folders"
                )
            kind, about, (classes, items) = "EDM2 zip", {}, _of_labels(names, given or {}, reading, entries)
        for name in members:
            if name == LABELS:
                entries.part()
            elif not is_image(name):
                entries.pass_over(ending(name))
        for _ in items:
            entries.item()
        items = [item._replace(fault=item.fault or _fault(members[item.name])) for item in items]
        return cls(classes, items, ZipReader(path), {"kind": kind, **split, **about}, entries)


def _labels(archive: zipfile.ZipFile, path: Path) -> dict[str, Label]:
    """Name -> label of `dataset.json`; nothing if it says that there are none ({"labels": null})."""
    try:
        pairs = json.loads(text_of(archive.read(LABELS)))["labels"]
        return {str(name): label_of(label, LABELS) for name, label in pairs or ()}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: dataset.json holds no list 'labels' of [name, class], or null where there are no classes"
        ) from error


def _of_labels(
    names: list[str], given: dict[str, Label], reading: Reading, entries: Entries
) -> tuple[tuple[str, ...], list[Item]]:
    labels = [given.get(name, NoClass(f"{LABELS} has no label for it") if given else NoClass()) for name in names]
    classes, numbers = settle(labels, reading.classes, captioned=False)
    entries.remark(classes.remark)
    return classes.names, [
        Item(name, number, "" if isinstance(label, NoClass) else str(label), fault=fault)
        for name, label, (number, fault) in zip(names, labels, numbers, strict=True)
    ]


def _of_folders(
    placed: dict[str, str], reading: Reading, entries: Entries
) -> tuple[tuple[str, ...], list[Item], dict[str, Any]]:
    folders, numbers, about = numbered_folders(sorted(set(placed.values())), reading, entries)
    number = dict(zip(folders, numbers, strict=True))
    items = [Item(name, number[own][0], of_class(own), fault=number[own][1]) for name, own in placed.items()]
    return reading.classes.names if reading.classes else tuple(folders), items, about


def _class_folders(names: list[str]) -> dict[str, str]:
    """Image -> its class, the first folder below one that holds everything; images outside any are left out."""
    above = ""
    while len({name[len(above) :].partition("/")[0] for name in names}) == 1 and all(
        name[len(above) :].count("/") > 1 for name in names
    ):
        above += names[0][len(above) :].partition("/")[0] + "/"
    inside = ((name, name[len(above) :].partition("/")) for name in names)
    return {name: folder for name, (folder, slash, _) in inside if slash}


def _fault(member: zipfile.ZipInfo) -> str:
    """Why a member cannot be read; empty if it can."""
    if member.flag_bits & 1:
        return "it is encrypted; expected a zip file without a password"
    if member.compress_type not in READABLE:
        method = zipfile.compressor_names.get(member.compress_type, "unknown")  # type: ignore[attr-defined]
        return f"it is compressed by method {member.compress_type} ({method}), which is not read; expected deflate"
    return ""
