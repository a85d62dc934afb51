"""A folder of class folders, the layout of torchvision's ImageFolder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.listing.base import HEAD, SHOWN_EXTENSIONS, Entries, Item, Reader, ending, is_image
from data_prep.listing.captions import of_class
from data_prep.listing.classes import Label, NoClass, label_of, numbered
from data_prep.listing.files import files_below, files_in, folders_in
from data_prep.listing.reading import PLAIN, Reading
from data_prep.listing.splits import tree_of_split
from megapix.errors import InputError
from megapix.shards.mix.alike import UNCLASSED

KIND = "image folder"


@dataclass(frozen=True)
class FileReader(Reader):
    """Images that are files below a folder, by their relative names."""

    root: Path

    def read(self, item: Item, size: int) -> bytes:
        """The file as it is."""
        return (self.root / item.name).read_bytes()

    def head(self, item: Item, size: int) -> bytes:
        """The beginning of the file."""
        with open(self.root / item.name, "rb", buffering=0) as file:
            return file.read(HEAD)


@dataclass(frozen=True)
class ImageFolder:
    """The class is the first-level folder; images may lie in folders below it. Folders that are all numbers are in the
    order of these, others in that of their names. Where all images lie in the folder itself, they are of one class,
    which is said."""

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: FileReader
    about: dict[str, Any] = field(default_factory=lambda: {"kind": KIND})
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there are folders at `path`, or images."""
        return path.is_dir() and (bool(folders_in(path)) or any(is_image(name) for name in files_in(path, Entries())))

    @classmethod
    def open(cls, root: Path, reading: Reading = PLAIN) -> ImageFolder:
        """List the images of `root`.

        Raises:
            InputError: no such folder, no class folder, a class without images, or several splits without train.
        """
        if not root.is_dir():
            raise InputError(f"source {str(root)!r} is not a folder; expected one folder of images for each class")
        entries = Entries()
        root, about = tree_of_split(root, reading.split, entries)
        folders, images = folders_in(root), images_below(root, entries)
        if images and not any("/" in name for name in images):
            return cls._flat(root, images, about, entries)
        if not folders:
            raise InputError(f"source {str(root)!r} has no class folders; expected one folder of images for each class")
        folders, numbers, order = numbered_folders(folders, reading, entries)
        about = about | order
        place = {name: (number, *numbers[number]) for number, name in enumerate(folders)}
        captions = list(map(of_class, folders))
        placed: list[tuple[int, Item]] = []
        for name in images:
            folder, inside, _ = name.partition("/")
            if inside:
                entries.item()
                at, label, fault = place[folder]
                placed.append((at, Item(name, label, captions[at], fault=fault)))
            else:
                entries.pass_over("image outside the class folders")
        if empty := set(range(len(folders))) - {at for at, _ in placed}:
            raise InputError(f"class folder {str(root / folders[min(empty)])!r} holds no image ({SHOWN_EXTENSIONS})")
        placed.sort(key=lambda pair: pair[0])
        classes = reading.classes.names if reading.classes else tuple(folders)
        items = [item for _, item in placed]
        return cls(classes, items, FileReader(root), about={"kind": KIND, **about}, entries=entries)

    @classmethod
    def _flat(cls, root: Path, images: list[str], about: dict[str, Any], entries: Entries) -> ImageFolder:
        for _ in images:
            entries.item()
        entries.remark(
            f"{str(root)!r} has no class folders: its {len(images):,} images are one class, {UNCLASSED!r}, without "
            "captions (--labels FILE gives them classes)"
        )
        items = [Item(name, 0, "") for name in images]
        return cls((UNCLASSED,), items, FileReader(root), about={"kind": KIND, **about}, entries=entries)


def numbered_folders(
    folders: list[str], reading: Reading, entries: Entries
) -> tuple[list[str], list[tuple[int, str]], dict[str, str]]:
    """(class folders in their order, (class number, why its images are rejected) of each, what plan and index record).

    Args:
        folders: their names, in order.
        entries: takes a remark where they are put in another order.

    Raises:
        InputError: --class-order number, but one is no number.
    """
    by_number, about = _in_order(folders, reading.class_order), dict[str, str]()
    if by_number != folders:
        entries.remark(
            f"class folders are in the order of their numbers: {', '.join(by_number[:3])}, …; "
            "--class-order name is the other way"
        )
        folders, about = by_number, {"class_order": "number"}
    labels: list[Label] = [_label(name) for name in folders]
    numbers = numbered(labels, reading.classes) if reading.classes else [(n, "") for n in range(len(folders))]
    return folders, numbers, about


def _in_order(folders: list[str], order: str | None) -> list[str]:
    """The class folders in the order of their numbers, if all are numbers or that order is asked for.

    Raises:
        InputError: it is asked for, but one is no number.
    """
    others = [name for name in folders if not (name.isascii() and name.isdecimal())]
    if order == "number" and others:
        raise InputError(f"--class-order number: class folder {others[0]!r} is no number; expected name")
    return folders if others or order == "name" else sorted(folders, key=lambda name: (int(name), name))


def _label(folder: str) -> Label:
    """A folder's name as the label that --classes knows, whatever it is."""
    label = label_of(folder, "folder")
    return folder if isinstance(label, NoClass) else label


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
