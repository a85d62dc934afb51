"""Image–text pairs: images with a `.txt` or `.json` file of the same name beside them, in any folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.source import UNCLASSED, Item, as_utf8
from data_prep.sources.image_folder import FileReader, images_below
from megapix.errors import InputError

TEXTS = (".txt", ".json")


@dataclass(frozen=True)
class ImageText:
    """One class; the caption is the text file, or "caption" in the JSON file. The layout of img2dataset's `files`."""

    items: Sequence[Item]
    reader: FileReader
    classes: tuple[str, ...] = (UNCLASSED,)
    about: dict[str, Any] = field(default_factory=lambda: {"kind": "image-text pairs"})

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether the first image below the folder has a text beside it."""
        first = next(images_below(path), None) if path.is_dir() else None
        return first is not None and any((path / first).with_suffix(ending).is_file() for ending in TEXTS)

    @classmethod
    def open(cls, root: Path) -> ImageText:
        """List the pairs below `root`.

        Raises:
            InputError: no such folder, no image, or an image without a text that can be read.
        """
        names = sorted(images_below(root)) if root.is_dir() else []
        if not names:
            raise InputError(f"source {str(root)!r} holds no image (png, jpg, jpeg, webp)")
        return cls([Item(name, 0, _caption(root / name)) for name in names], FileReader(root))


def _caption(image: Path) -> str:
    text, about = (image.with_suffix(ending) for ending in TEXTS)
    try:
        if text.is_file():
            return as_utf8(text.read_text("utf-8").strip())
        caption = json.loads(about.read_text("utf-8"))["caption"]
        return "" if caption is None else as_utf8(str(caption).strip())
    except FileNotFoundError as error:
        raise InputError(f"{image}: expected {text.name} or {about.name} beside it") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        at_fault = text if text.is_file() else about
        raise InputError(f"{at_fault}: expected UTF-8 text, or JSON with the key 'caption': {error!r}") from error
