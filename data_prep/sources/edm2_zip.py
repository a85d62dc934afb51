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

from data_prep.sources.base import Item, check_label, is_image
from megapix.errors import InputError


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

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it is a zip file."""
        return path.is_file() and zipfile.is_zipfile(path)

    @classmethod
    def open(cls, path: Path) -> Edm2Zip:
        """List the labelled images.

        Raises:
            InputError: not a zip file, no or a wrong dataset.json, or an image that it does not list.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                names = sorted(name for name in archive.namelist() if is_image(name))
                pairs = json.loads(archive.read("dataset.json"))["labels"]
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
        return cls(classes, items, ZipReader(path))
