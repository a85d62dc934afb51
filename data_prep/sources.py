"""What can be read. A source lists its samples once, in a fixed order, and renders any of them; a new one is one file.

Sources are pickled into the worker processes, so they hold names and paths, not images.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megapix.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


class Item(NamedTuple):
    """One sample of a source."""

    name: str
    """Unique and independent of where the source lies; goes into the shard's JSON."""
    label: int
    caption: str


class Source(Protocol):
    """What `write.write` needs of a source."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; an item's label is a place in this list."""

    @property
    def items(self) -> tuple[Item, ...]:
        """Every sample, in a fixed order."""

    @property
    def about(self) -> dict[str, Any]:
        """What the index records: kind, and licence and attribution where there are any."""

    @property
    def policy(self) -> str:
        """The image policy, in words."""

    def render(self, item: Item, size: int) -> Image:
        """The sample as 8-bit RGB of size × size pixels; ValueError if it cannot be used."""


@dataclass(frozen=True)
class ImageFolder:
    """A folder of class folders: the class is the first-level folder, images may lie in folders below it."""

    root: Path
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    about: dict[str, Any] = field(default_factory=lambda: {"kind": "image folder"})
    policy: str = "ADM centre crop: box halving, bicubic, crop; transparency on white"

    @classmethod
    def open(cls, root: Path) -> ImageFolder:
        """List the images of `root`.

        Raises:
            InputError: no such folder, no class folder, or a class without images.
        """
        if not root.is_dir():
            raise InputError(f"source {str(root)!r} is not a folder; expected one folder of images for each class")
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not classes:
            raise InputError(f"source {str(root)!r} has no class folders; expected one folder of images for each class")
        items = []
        for label, name in enumerate(classes):
            images = sorted(p.relative_to(root).as_posix() for p in (root / name).rglob("*") if _is_image(p))
            if not images:
                raise InputError(f"class folder {str(root / name)!r} holds no image ({', '.join(EXTENSIONS)})")
            items += [Item(image, label, name.replace("_", " ")) for image in images]
        return cls(root, tuple(classes), tuple(items))

    def render(self, item: Item, size: int) -> Image:
        """Decode, then crop and resize."""
        from data_prep.transform import centre_crop, decode

        return centre_crop(decode((self.root / item.name).read_bytes()), size)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
