"""Image–text pairs: images with a `.txt` or `.json` file of the same name, beside them or in a folder of texts.

The layout of img2dataset's `files` is one of these: its table 00000.parquet stands in for the JSON of the folder 00000.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.listing.base import SHOWN_EXTENSIONS, Entries, Item, ending, is_image
from data_prep.listing.captions import LARGEST_TEXT, captions_of, check_found, json_object, trimmed
from data_prep.listing.files import files_below
from data_prep.listing.img2dataset import ENDING, STATS, Rows, beside
from data_prep.listing.reading import PLAIN, Reading
from data_prep.listing.splits import of_split
from data_prep.sources.image_folder import FileReader
from megapix.errors import InputError
from megapix.shards.mix.alike import UNCLASSED
from megapix.text import text_of

TEXTS = (".txt", ".json")
FOLDERS = ("captions", "caption", "texts", "text", "txt", "json", "labels")
"""Folders of texts, in any case: in the folder of an image, or in its path in place of another folder."""
KIND = "image-text pairs"


@dataclass(frozen=True)
class ImageText:
    """One class; the captions are "captions" in the JSON file, else the text file, else "caption" in the JSON file.

    An image without a text has an empty caption.
    """

    items: Sequence[Item]
    reader: FileReader
    classes: tuple[str, ...] = (UNCLASSED,)
    about: dict[str, Any] = field(default_factory=lambda: {"kind": KIND})
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether an image below the folder has a text, or the folder that it lies in a table of img2dataset's."""
        names = files_below(path, Entries()) if path.is_dir() else []
        there = set(names)
        return any(pair.text or pair.json or f"{pair.folder}{ENDING}" in there for pair in _pairs(names))

    @classmethod
    def open(cls, root: Path, reading: Reading = PLAIN) -> ImageText:
        """List the images below `root`. One whose text or JSON cannot be read has a fault.

        Raises:
            InputError: no such folder, no image, a key that no sample has, or several splits without train.
        """
        entries = Entries(captioned=True)
        names = files_below(root, entries) if root.is_dir() else []
        everything, where = list(_pairs(names)), f"source {str(root)!r}"
        if not everything:
            raise InputError(f"{where} holds no image ({SHOWN_EXTENSIONS})")
        images, split = of_split([pair.image for pair in everything], reading.split, entries, where, files=False)
        chosen = set(images)
        pairs = [pair for pair in everything if pair.image in chosen]
        found: set[str] = set()
        rows = {folder: Rows(partial(beside, root / folder), reading) for folder in {pair.folder for pair in pairs}}
        items = [_item(root, pair, reading, rows[pair.folder], found) for pair in pairs]
        parts = {name for pair in pairs for name in (pair.text, pair.json)} | {f"{folder}{ENDING}" for folder in rows}
        others = {name for pair in everything for name in (pair.text, pair.json)} - parts
        for name in names:
            if is_image(name):
                if name in chosen:  # else `of_split` has counted it
                    entries.item()
            elif name in parts:
                entries.part()
            elif name in others:
                entries.pass_over("text of another split")
            else:
                entries.pass_over(_kind(name))
        check_found(reading.keys, found, where)
        folders = {name.partition("/")[0] for name, *_ in pairs if "/" in name}
        if len(folders) > 1 and not all(item.caption or item.fault for item in items):
            entries.remarks.append(
                f"{len(folders)} folders of images are no classes beside captions; with --source image-folder they are"
            )
        return cls(items, FileReader(root), about={"kind": KIND, **reading.recorded(), **split}, entries=entries)


class _Pair(NamedTuple):
    """An image and its texts, by their names below the source."""

    image: str
    text: str = ""
    json: str = ""
    fault: str = ""

    @property
    def folder(self) -> str:
        return self.image.rpartition("/")[0]


def _pairs(names: Sequence[str]) -> Iterator[_Pair]:
    """The images in order, each with the first text and the first JSON file that there is for it (`_stems`).

    A file in a folder of texts that images of several folders could have is a fault of theirs.
    """
    texts: dict[tuple[str, str], str] = {}
    folders: dict[str, int] = {}
    for name in names:
        stem, dot, ending = name.rpartition(".")
        if f"{dot}{ending.lower()}" in TEXTS:
            texts.setdefault((stem, ending.lower()), name)
            folders |= {part: FOLDERS.index(part.lower()) for part in stem.split("/")[:-1] if part.lower() in FOLDERS}
    known = sorted(folders, key=lambda folder: (folders[folder], folder))
    pairs = []
    users: dict[str, set[str]] = {}
    for image in filter(is_image, names):
        stems = list(_stems(image, known))
        text, about = (next((texts[stem, e] for stem in stems if (stem, e) in texts), "") for e in ("txt", "json"))
        pairs.append(_Pair(image, text, about))
        for name in filter(None, (text, about)):
            users.setdefault(name, set()).add(pairs[-1].folder)
    for pair in pairs:
        shared = [name for name in (pair.text, pair.json) if len(users.get(name, ())) > 1]
        yield pair._replace(fault=f"{shared[0]} could belong to images of several folders") if shared else pair


def _stems(image: str, folders: Sequence[str]) -> Iterator[str]:
    """Where the texts of an image may lie, without their ending: a.jpg has a.txt (or a.jpg.txt) beside it, else in a
    folder of texts there, else where such a folder stands in place of one of its folders."""
    *path, base = image.split("/")
    places = [path, *([*path, folder] for folder in folders)]
    places += [[*path[:n], folder, *path[n + 1 :]] for n in reversed(range(len(path))) for folder in folders]
    for place in places:
        for stem in (base.rpartition(".")[0], base):
            yield "/".join((*place, stem))


def _item(root: Path, pair: _Pair, reading: Reading, rows: Rows, found: set[str]) -> Item:
    """The item of an image; the keys of --captions that its JSON has are put into `found`."""
    try:
        if pair.fault:
            raise ValueError(pair.fault)
        members = _members(root / pair.json) if pair.json else {}
        if not pair.json and (not pair.text or reading.keys or reading.columns):
            members = rows.of(Path(pair.image).stem)
        text = _read(root / pair.text) if pair.text else ""
        found.update(key for key, _ in reading.keys if key in members)
        try:
            caption = trimmed(captions_of(members, text, reading.keys))
        except ValueError as error:
            raise ValueError(f"{root / pair.json if pair.json else 'its row'}: {error}") from error
    except ValueError as error:
        return Item(pair.image, 0, "", fault=str(error))
    return Item(pair.image, 0, caption, about=reading.chosen(members))


def _members(path: Path) -> dict[str, Any]:
    text = _read(path)
    try:
        return json_object(text)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _read(path: Path) -> str:
    """The text of a file, stripped; ValueError that names it."""
    try:
        data = path.read_bytes()
        if len(data) > LARGEST_TEXT:
            raise ValueError(f"it has {len(data)} bytes, at most {LARGEST_TEXT} are read")
        return text_of(data).strip()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _kind(name: str) -> str:
    """The kind of a file that belongs to no image."""
    if name.endswith(STATS):
        return STATS
    return "text without an image" if name.lower().endswith(TEXTS) else ending(name)
