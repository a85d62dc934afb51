"""Image–text pairs: images with a `.txt` or `.json` file of the same name beside them, in any folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources.base import UNCLASSED, Entries, Item, ending, is_image
from data_prep.sources.captions import CaptionKeys, captions_of, check_found, packed
from data_prep.sources.files import files_below
from data_prep.sources.image_folder import FileReader
from data_prep.sources.reading import PLAIN, Reading
from megapix.errors import InputError

TEXTS = (".txt", ".json")
KIND = "image-text pairs"


@dataclass(frozen=True)
class ImageText:
    """One class; the captions are "captions" in the JSON file, else the text file, else "caption" in the JSON file.

    The layout of img2dataset's `files`.
    """

    items: Sequence[Item]
    reader: FileReader
    classes: tuple[str, ...] = (UNCLASSED,)
    about: dict[str, Any] = field(default_factory=lambda: {"kind": KIND})
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether an image below the folder has a text beside it."""
        names = set(files_below(path, Entries())) if path.is_dir() else set[str]()
        return any(is_image(name) and any(_beside(name, text) in names for text in TEXTS) for name in names)

    @classmethod
    def open(cls, root: Path, reading: Reading = PLAIN) -> ImageText:
        """List the pairs below `root`.

        Raises:
            InputError: no such folder, no image, an image without a text that can be read, a caption or weight that is
                none, or a key that no sample has.
        """
        entries = Entries()
        names = files_below(root, entries) if root.is_dir() else []
        images, texts = [name for name in names if is_image(name)], _texts(names)
        if not images:
            raise InputError(f"source {str(root)!r} holds no image (png, jpg, jpeg, webp)")
        found: set[str] = set()
        items = [Item(name, 0, _caption(root / name, reading.keys, found)) for name in images]
        for name in names:
            if is_image(name):
                entries.item()
            elif name in texts:
                entries.part()
            else:
                entries.pass_over(ending(name))
        check_found(reading.keys, found, f"source {str(root)!r}")
        return cls(items, FileReader(root), about={"kind": KIND, **reading.recorded()}, entries=entries)


def _beside(name: str, ending: str) -> str:
    """Name of the file with another ending beside an image."""
    return f"{name.rpartition('.')[0]}{ending}"


def _texts(names: Iterable[str]) -> set[str]:
    """Names of the files that belong to an image, if they are there."""
    return {_beside(name, text) for name in names if is_image(name) for text in TEXTS}


def _caption(image: Path, keys: CaptionKeys, found: set[str]) -> str:
    """The packed captions of an image; those of `keys` that its JSON file has are put into `found`."""
    beside, about = (image.with_suffix(ending) for ending in TEXTS)
    text, written = _read(beside), _read(about)
    if text is None and written is None:
        raise InputError(f"{image}: expected {beside.name} or {about.name} beside it")
    try:
        members = json.loads(written) if written is not None else {}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{about}: expected JSON: {error}") from error
    members = members if isinstance(members, dict) else {}
    if text is None and not keys and not {"caption", "captions"} & members.keys():
        raise InputError(f"{about}: expected the key 'caption' or 'captions', or {beside.name} beside it")
    found.update(key for key, _ in keys if key in members)
    try:
        captions = captions_of(members, text or "", keys)
        return packed([caption._replace(text=caption.text.strip()) for caption in captions])
    except ValueError as error:
        raise InputError(f"{about}: {error}") from error


def _read(path: Path) -> str | None:
    """The text of a file, stripped; None if there is no such file."""
    try:
        return path.read_text("utf-8").strip() if path.is_file() else None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text: {error}") from error
