"""A flat set of images with a label file: ImageNet's validation set as it ships, and the like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources.base import Entries, Item, Reader, ending, is_image
from data_prep.sources.files import files_in
from data_prep.sources.image_folder import FileReader
from data_prep.sources.reading import Reading
from data_prep.sources.tars import TarReader, members
from megapix.errors import InputError


@dataclass(frozen=True)
class LabelledImages:
    """Images in one folder or tar file; the label file has a line for each image.

    A line is LABEL, for the images in the order of their names, or NAME LABEL. A label is a class name, such as a
    synset; the classes are all names in order. Names that are numbers are ordered by value, so a file that uses every
    class number from 0 keeps them.
    """

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: Reader
    about: dict[str, Any] = field(default_factory=lambda: {"kind": "labelled images"})
    entries: Entries = field(default_factory=Entries)

    @classmethod
    def open(cls, path: Path, reading: Reading) -> LabelledImages:
        """List the images of `path` with the labels of the file `reading.labels`.

        Raises:
            InputError: no image, a line that cannot be read, or another number of lines than of images.
        """
        places: dict[str, tuple[Any, ...]]
        reader: Reader
        entries = Entries()
        if path.is_dir():
            places, reader = {name: () for name in files_in(path, entries)}, FileReader(path)
        else:
            places, reader = {name: (str(path), at, size) for name, at, size in members(path, entries)}, TarReader()
        for name in list(places):
            if is_image(name):
                entries.item()
            else:
                entries.pass_over(ending(name))
                del places[name]
        if not places:
            raise InputError(f"source {str(path)!r} holds no image (png, jpg, jpeg, webp)")
        names = sorted(places)
        assert reading.labels
        given = _read_labels(reading.labels, names)
        classes = sorted(
            set(given.values()),
            key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label),
        )
        number = {label: place for place, label in enumerate(classes)}
        items = [Item(name, number[given[name]], given[name].replace("_", " "), places[name]) for name in names]
        return cls(tuple(classes), items, reader, entries=entries)


def _read_labels(path: Path, names: list[str]) -> dict[str, str]:
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels {path}: cannot be read: {error}") from error
    if len(lines) != len(names):
        raise InputError(f"--labels {path} has {len(lines)} lines, but there are {len(names)} images")
    if all(len(line) == 1 for line in lines):
        return {name: line[0] for name, line in zip(names, lines, strict=True)}
    if not all(len(line) == 2 for line in lines):
        raise InputError(f"--labels {path}: expected LABEL, or NAME LABEL, on every line")
    given = {name: label for name, label in lines}
    if missing := [name for name in names if name not in given]:
        raise InputError(f"--labels {path} has no line for image {missing[0]!r}")
    return given
