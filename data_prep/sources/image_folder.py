"""A folder of class folders, the layout of torchvision's ImageFolder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources.base import Entries, Item, ending, is_image
from data_prep.sources.captions import packed
from data_prep.sources.files import files_below, folders_in
from data_prep.sources.reading import PLAIN, Reading
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
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there are folders at `path`."""
        return path.is_dir() and bool(folders_in(path))

    @classmethod
    def open(cls, root: Path, reading: Reading = PLAIN) -> ImageFolder:
        """List the images of `root`.

        Raises:
            InputError: no such folder, no class folder, or a class without images.
        """
        if not root.is_dir():
            raise InputError(f"source {str(root)!r} is not a folder; expected one folder of images for each class")
        classes, entries = folders_in(root), Entries()
        if not classes:
            raise InputError(f"source {str(root)!r} has no class folders; expected one folder of images for each class")
        images = images_below(root, entries)
        number = {name: label for label, name in enumerate(classes)}
        captions = [packed([Caption(name.replace("_", " "))]) for name in classes]
        items: list[Item] = []
        for name in images:
            folder, inside, _ = name.partition("/")
            if inside:
                entries.item()
                items.append(Item(name, number[folder], captions[number[folder]]))
            else:
                entries.pass_over("image outside the class folders")
        if empty := set(classes) - {classes[item.label] for item in items}:
            raise InputError(f"class folder {str(root / min(empty))!r} holds no image (png, jpg, jpeg, webp)")
        items.sort(key=lambda item: item.label)
        return cls(tuple(classes), items, FileReader(root), entries=entries)


def images_below(root: Path, entries: Entries) -> list[str]:
    """Names of the images below a folder, in order; other files are counted as passed over.

    Raises:
        OSError: a folder cannot be read.
    """
    images = []
    for name in files_below(root, entries):
        if is_image(name):
            images.append(name)
        else:
            entries.pass_over(ending(name))
    return images
