"""A flat set of images with a label file: ImageNet's validation set as it ships, and the like."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.listing.archives import plain_tar
from data_prep.listing.base import SHOWN_EXTENSIONS, Entries, Item, Reader, as_utf8, ending, is_image
from data_prep.listing.captions import of_class
from data_prep.listing.classes import NoClass, label_of, numbered
from data_prep.listing.files import files_in
from data_prep.listing.reading import Reading
from data_prep.listing.tars import TarReader, members
from data_prep.sources.image_folder import FileReader
from megapix.errors import InputError
from megapix.text import text_of

BOXES = "predictionstring"
"""Column of ImageNet's LOC_val_solution.csv: a synset and a box, several times."""
LABELS = ("label", "labels", "class", "class_name", "class_id", "category", "target", "cls", "synset", BOXES)
"""Titles of a column of labels, in lower case."""
NAMES = ("file_name", "filename", "file", "image", "image_id", "imageid", "img", "name", "path", "id")
"""Titles of a column of images."""


@dataclass(frozen=True)
class LabelledImages:
    """Images in one folder or tar file; the label file has a line for each image.

    A line is LABEL, for the images in the order of their names, or NAME LABEL, or a row of CSV or TSV that holds both.
    A label is a class name, such as a synset; the classes are all names in order. Names that are numbers are ordered by
    value, so a file that uses every class number from 0 keeps them.
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
            InputError: no image, a label file that cannot be read or names none of the images, or one without names
                that has another number of lines than there are images.
        """
        places: dict[str, tuple[Any, ...]]
        reader: Reader
        entries = Entries()
        if path.is_dir():
            places, reader = {name: () for name in files_in(path, entries)}, FileReader(path)
        else:
            plain = plain_tar(path, reading.unpacked)
            places, reader = {name: (str(plain), at, size) for name, at, size in members(plain, entries)}, TarReader()
        for name in list(places):
            if is_image(name):
                entries.item()
            else:
                if path.is_dir() and reading.labels and (path / name).resolve() == reading.labels.resolve():
                    entries.part()
                else:
                    entries.pass_over(ending(name))
                del places[name]
        if not places:
            raise InputError(f"source {str(path)!r} holds no image ({SHOWN_EXTENSIONS})")
        names = sorted(places)
        assert reading.labels
        given = _labels_of(reading.labels, names, entries)
        labels = [given.get(name, NoClass(f"no label in {reading.labels.name}")) for name in names]
        classes = sorted(
            {label for label in labels if isinstance(label, str)},
            key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label),
        )
        place = {label: number for number, label in enumerate(classes)}
        if reading.classes:
            raw = [label_of(label, "label") if isinstance(label, str) else label for label in labels]
            numbers, classes = numbered(raw, reading.classes), list(reading.classes.names)
        else:
            numbers = [(place[label], "") if isinstance(label, str) else (0, label.reason) for label in labels]
        items = [
            Item(name, number, of_class(label), places[name], fault=fault)
            for name, label, (number, fault) in zip(names, labels, numbers, strict=True)
        ]
        if not classes:
            raise InputError(f"--labels {reading.labels}: no image has a class; the first: {items[0].fault}")
        return cls(tuple(classes), items, reader, entries=entries)


def _labels_of(path: Path, names: list[str], entries: Entries) -> dict[str, str | NoClass]:
    """Image -> its label, as the label file has it, for those of `names` that it knows.

    Raises:
        InputError: it cannot be read, or has no lines for these images.
    """
    try:
        rows = _rows(path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"--labels {path}: cannot be read: {error}") from error
    if max(map(len, rows), default=1) == 1:
        if len(rows) == len(names) + 1 and str(rows[0][0]).lower() in LABELS:
            del rows[0]
        if len(rows) != len(names):
            raise InputError(f"--labels {path} has {len(rows)} lines, but there are {len(names)} images")
        return {name: _label(row[0]) for name, row in zip(names, rows, strict=True)}
    known = _known(names)
    width = min(map(len, rows))
    found = [{_image(row[column], known) for row in rows} - {None} for column in range(width)]
    if width < 2 or not any(found):
        raise InputError(
            f"--labels {path}: not one line names an image such as {names[0]!r}; expected LABEL, or NAME LABEL, on "
            "every line, or NAME and LABEL as columns of CSV or TSV"
        )
    column = max(range(width), key=lambda n: len(found[n]))
    titles = [str(cell).strip().lower() for cell in rows[0]]
    titled = _image(rows[0][column], known) is None and bool({*titles} & {*LABELS, *NAMES})
    at = _label_column(path, rows[0], titles if titled else [], column)
    labels: dict[str, str | NoClass] = {}
    strangers = 0
    for row in rows[titled:]:
        label = _label(row[at] if at < len(row) else None, boxes=titled and titles[at] == BOXES)
        if (name := _image(row[column], known)) is None:
            strangers += 1
        elif labels.setdefault(name, label) != label:
            labels[name] = NoClass(f"{path.name} has several labels for it")
    if strangers:
        entries.remark(f"{path.name} has {strangers:,} lines without an image")
    return labels


def _rows(path: Path) -> list[list[Any]]:
    """The cells of each line that is not blank; ValueError, OSError."""
    text = text_of(path.read_bytes())
    if path.suffix.lower() == ".json" or text.lstrip().startswith(("{", "[")):
        read = json.loads(text)
        pairs = read.items() if isinstance(read, dict) else read
        if not isinstance(pairs, Iterable) or isinstance(pairs, str):
            raise ValueError("expected a JSON object of name and label, or a list of labels")
        return [list(pair) if isinstance(pair, (list, tuple)) and pair else [pair] for pair in pairs]
    lines = [line for line in text.split("\n") if line.strip()]
    delimiter = next((each for each in "\t,;" if all(each in line for line in lines)), None)
    if delimiter is None and path.suffix.lower() in (".csv", ".tsv"):
        delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    if delimiter is None:
        rows = [line.split() for line in lines]
        if len({len(row) for row in rows}) > 1 or any(len(row) > 2 for row in rows):
            raise ValueError("expected LABEL, or NAME LABEL, on every line")
        return list(rows)
    return [
        [cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True) if row
    ]


def _known(names: list[str]) -> dict[str, str]:
    """How a line may call an image -> its name: as it is, without folders, without its ending, if that is one image."""
    known: dict[str, str] = {}
    for shorten in (lambda name: _base(name).rpartition(".")[0], _base, lambda name: name):
        once: dict[str, list[str]] = {}
        for name in names:
            once.setdefault(shorten(name), []).append(name)
        known |= {short: same[0] for short, same in once.items() if len(same) == 1}
    return known


def _base(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _image(cell: Any, known: dict[str, str]) -> str | None:
    cell = str(cell)
    return known.get(cell) or known.get(_base(cell))


def _label(cell: Any, boxes: bool = False) -> str | NoClass:
    """The label as it is written, if it is one."""
    if isinstance(cell, str):
        cell = (cell.split() or [""])[0] if boxes else cell.strip()
    label = label_of(cell, "label")
    if isinstance(label, NoClass):
        return NoClass(label.reason or "its label is null")
    return as_utf8(str(cell))


def _label_column(path: Path, first: Sequence[Any], titles: list[str], names: int) -> int:
    """The column of labels, beside column `names` of images."""
    others = [n for n in range(len(first)) if n != names]
    titled = [n for n in others if n < len(titles) and titles[n] in LABELS]
    if len(titled or others) != 1:
        raise InputError(
            f"--labels {path}: which of the columns {[str(first[n]) for n in others]} holds the labels is not "
            f"plain; expected NAME,LABEL, or one column titled {' or '.join(LABELS[:3])}"
        )
    return (titled or others)[0]
