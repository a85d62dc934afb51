"""A folder of class folders, the layout of torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources.base import Item, is_image
from data_prep.sources.captions import packed
from megapix.errors import InputError
from megapix.shards.captions import Caption


@dataclass(frozen=True)
class FileReader:
    """Images that are files below a folder, by their relative names."""

    root: Path

    def read(self, item: Item, size: int) -> bytes:
        """The file as it is."""
        return (self.root / item.name).read_bytes()


@dataclass(frozen=True)
class ImageFolder:
    """The class is the first-level folder; images may lie in folders below it."""

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: FileReader
    about: dict[str, Any] = field(default_factory=lambda: {"kind": "image folder"})

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there are folders at `path`."""
        return path.is_dir() and bool(_class_folders(path))

    @classmethod
    def open(cls, root: Path) -> ImageFolder:
        """List the images of `root`.

        Raises:
            InputError: no such folder, no class folder, or a class without images.
        """
        if not root.is_dir():
            raise InputError(f"source {str(root)!r} is not a folder; expected one folder of images for each class")
        classes = _class_folders(root)
        if not classes:
            raise InputError(f"source {str(root)!r} has no class folders; expected one folder of images for each class")
        items: list[Item] = []
        for label, name in enumerate(classes):
            images = sorted(images_below(root / name, f"{name}/"))
            if not images:
                raise InputError(f"class folder {str(root / name)!r} holds no image (png, jpg, jpeg, webp)")
            caption = packed([Caption(name.replace("_", " "))])
            items += [Item(image, label, caption) for image in images]
        return cls(tuple(classes), items, FileReader(root))


def _class_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def images_below(folder: Path, prefix: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of the images below `folder`, with `prefix`; hidden files and folders are passed over.

    Raises:
        InputError: a link to a folder that it lies in.
    """
    here = os.path.realpath(folder)
    if here in above:
        raise InputError(f"{str(folder)!r} is a link to {here!r}, which it lies in")
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from images_below(Path(entry.path), f"{prefix}{entry.name}/", (*above, here))
        elif is_image(entry.name):
            yield prefix + entry.name
