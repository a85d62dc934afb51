"""Existing WebDataset shards: an image and its class number (`cls`) under each key, to be written anew."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.source import Item, is_image
from data_prep.sources.tars import TarReader, members
from megapix.errors import InputError

LARGEST_TEXT = 1 << 20
"""Bytes of a cls or json member that are read at most."""


@dataclass(frozen=True)
class Shards:
    """Tar files of samples; class names are taken from an index beside them if there is one, else they are numbers."""

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: TarReader = field(default_factory=TarReader)
    about: dict[str, Any] = field(default_factory=lambda: {"kind": "WebDataset shards"})

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there is a tar file that holds a `cls` member."""
        tars = _tars(path)
        return bool(tars) and any(name.endswith(".cls") for name, _, _ in members(tars[0]))

    @classmethod
    def open(cls, path: Path) -> Shards:
        """List the samples of a shard, or of a folder of shards.

        Raises:
            InputError: no tar file, a damaged one, or a sample without an image or a class.
        """
        tars = _tars(path)
        if not tars:
            raise InputError(f"source {str(path)!r} holds no tar file")
        items: list[Item] = []
        for tar in tars:
            samples: dict[str, dict[str, tuple[str, int, int]]] = {}
            for name, at, size in members(tar):
                folder, _, base = name.rpartition("/")
                key, _, extension = base.partition(".")
                samples.setdefault(f"{folder}/{key}", {})[extension.lower()] = (name, at, size)
            with open(tar, "rb") as file:
                items += [_item(tar, file.fileno(), key, found) for key, found in samples.items()]
        classes = _class_names(path) or tuple(str(n) for n in range(1 + max(item.label for item in items)))
        return cls(classes, items)


def _item(tar: Path, descriptor: int, key: str, found: dict[str, tuple[str, int, int]]) -> Item:
    images = [place for place in found.values() if is_image(place[0])]
    if len(images) != 1 or "cls" not in found:
        raise InputError(f"{tar}: sample {key.lstrip('/')!r}: expected one image and one cls, found {sorted(found)}")

    def text(extension: str) -> str:
        _, at, size = found[extension]
        return os.pread(descriptor, min(size, LARGEST_TEXT), at).decode("utf-8", "replace")

    try:
        label = int(text("cls"))
    except ValueError as error:
        raise InputError(f"{tar}: sample {key.lstrip('/')!r}: cls is {text('cls')[:20]!r}, not a number") from error
    caption = text("txt").strip() if "txt" in found else ""
    if not caption and "json" in found:
        about = json.loads(text("json"))
        caption = str(about.get("caption", "")) if isinstance(about, dict) else ""
    name, at, size = images[0]
    return Item(f"{tar.name}/{name}", label, caption, (str(tar), at, size))


def _tars(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if entry.suffix == ".tar" and not entry.name.startswith("."))
    return [path] if path.suffix == ".tar" else []


def _class_names(path: Path) -> tuple[str, ...] | None:
    from megapix.shards import INDEX_NAME, read_index

    return read_index(path).class_names if (path / INDEX_NAME).is_file() else None
