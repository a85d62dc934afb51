"""A zip file in the layout of EDM2's dataset tool: images, and `dataset.json` with their labels."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.sources.base import Entries, Item, check_label, ending, is_image
from data_prep.sources.reading import PLAIN, Reading
from megapix.errors import InputError

LABELS = "dataset.json"


@lru_cache(maxsize=2)
def _archive(path: Path) -> zipfile.ZipFile:
    """The open archive of this process: its directory is read once, not for each image."""
    return zipfile.ZipFile(path)


@dataclass(frozen=True)
class ZipReader:
    """Images of a zip file, by name."""

    path: Path

    def read(self, item: Item, size: int) -> bytes:
        """The member's bytes, checked by the archive's CRC."""
        try:
            return _archive(self.path).read(item.name)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Edm2Zip:
    """Images and `dataset.json`: {"labels": [["00000/img00000000.png", 0], …]}."""

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
        """List the labelled images.

        Raises:
            InputError: not a zip file, no or a wrong dataset.json, or an image that it does not list.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member.filename for member in archive.infolist() if not member.is_dir()]
                names = sorted(name for name in members if is_image(name))
                pairs = json.loads(archive.read(LABELS))["labels"]
                labels = {name: check_label(label, f"{path}: dataset.json: {name}") for name, label in pairs}
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"source {str(path)!r} cannot be read as a zip file: {error}") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: dataset.json is missing or holds no list 'labels' of [name, class]") from error
        if not names:
            raise InputError(f"source {str(path)!r} holds no image (png, jpg, jpeg, webp)")
        if unlabelled := [name for name in names if name not in labels]:
            raise InputError(f"{path}: dataset.json has no label for {unlabelled[0]!r}")
        classes = tuple(str(number) for number in range(max(labels.values()) + 1))
        items = [Item(name, labels[name], str(labels[name])) for name in names]
        entries = Entries()
        for name in members:
            if is_image(name):
                entries.item()
            elif name == LABELS:
                entries.part()
            else:
                entries.pass_over(ending(name))
        return cls(classes, items, ZipReader(path), entries=entries)
