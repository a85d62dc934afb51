"""Images with a metadata file, as Hugging Face's `imagefolder`: captions, labels and whatever else is known of each."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.listing.base import SHOWN_EXTENSIONS, Entries, Item, as_utf8, ending, is_image
from data_prep.listing.captions import CAPTION_COLUMNS, captions_in, captions_of, trimmed
from data_prep.listing.classes import Label, NoClass, label_of, settle
from data_prep.listing.files import files_below, parsed_once
from data_prep.listing.reading import PLAIN, Reading, about_of
from data_prep.listing.splits import of_split
from data_prep.sources.image_folder import FileReader
from data_prep.sources.metadata_files import FILE_NAME, NAMES, Line, Table, image_column, is_metadata, read
from data_prep.sources.parquet import LABEL_COLUMNS
from megapix.errors import InputError
from megapix.shards.captions import Caption

KIND = "images with metadata"


@dataclass(frozen=True)
class Metadata:
    """The images below a folder. What a line says of its image is its caption, its label, and `Item.about`.

    Lines without an image, and lines that cannot be read, are samples with a fault. An image without a line has an
    empty caption; where others have a label, it has a fault.
    """

    items: Sequence[Item]
    reader: FileReader
    classes: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=lambda: {"kind": KIND})
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there is a metadata file that names images."""
        names = files_below(path, Entries()) if path.is_dir() else []
        return any(image_column(parsed_once(path / name, read).columns) for name in names if is_metadata(name))

    @classmethod
    def open(cls, root: Path, reading: Reading = PLAIN) -> Metadata:
        """List the images below `root`, with what the metadata files say of them.

        Raises:
            InputError: no metadata file that names images, one that is damaged, no image, or no such column as
                --captions names.
        """
        entries, where = Entries(), f"source {str(root)!r}"
        names = files_below(root, entries) if root.is_dir() else []
        tables = {name: parsed_once(root / name, read) for name in names if is_metadata(name)}
        named = {name: table for name, table in tables.items() if image_column(table.columns)}
        if not named:
            raise InputError(f"{where} holds no {', '.join(NAMES)} with a column {FILE_NAME!r}{_columns(tables)}")
        columns = list(dict.fromkeys(column for table in named.values() for column in table.columns))
        if missing := [key for key, _ in reading.keys if key not in columns]:
            raise InputError(f"{where}: --captions names column {missing[0]!r}, which is not there; it has {columns}")
        lines, lost = _lines(named, names)
        images = sorted({*filter(is_image, names), *lines})
        chosen, split = of_split(images, reading.split, entries, where, files=False)
        known = _Columns(
            next((column for column in CAPTION_COLUMNS if column in columns), ""),
            next((column for column in LABEL_COLUMNS if column in columns), ""),
            {image_column(table.columns) for table in named.values()},
        )
        found = [known.sample(name, lines.get(name, []), reading) for name in chosen]
        captioned = bool(reading.keys or known.caption)
        classes, numbers = settle([label for _, label in found], reading.classes, captioned)
        items = [
            item._replace(label=number, fault=item.fault or fault)
            for (item, _), (number, fault) in zip(found, numbers, strict=True)
        ]
        for name in {*names} - {*images}:
            if name in named:
                entries.part()
            else:
                entries.pass_over(ending(name))
        for _ in (*items, *lost):
            entries.item()
        entries.captioned = captioned
        entries.remark(classes.remark)
        for count, what in (
            (sum(name not in lines for name in chosen), f"of {len(chosen):,} images have no line of metadata"),
            (
                sum(len(lines.get(name, ())) > 1 for name in chosen),
                "images have several lines of metadata: all captions count",
            ),
            (len(lost), "lines of metadata name no image, or cannot be read: they are rejected"),
        ):
            entries.remark(f"{count:,} {what}" if count else "")
        if not items:
            raise InputError(f"{where} holds no image ({SHOWN_EXTENSIONS})")
        return cls(
            [*items, *lost], FileReader(root), classes.names, {"kind": KIND, **reading.recorded(), **split}, entries
        )


class _Columns(NamedTuple):
    """What the columns are."""

    caption: str
    label: str
    images: set[str]

    def sample(self, name: str, lines: Sequence[Line], reading: Reading) -> tuple[Item, Label]:
        """An image, and its label as it is there."""
        label, captions, values = self._label(lines), list[Caption](), dict[str, Any]()
        try:
            for line in lines:
                own = line.values.get(self.caption) if self.caption else None
                captions += captions_of(line.values, "", reading.keys) if reading.keys else captions_in(own)
                values = line.values | {key: value for key, value in values.items() if value is not None}
            if lines and not (reading.keys or self.caption) and isinstance(label, str):
                captions = [Caption(label.replace("_", " "))]  # as a class folder's name is
            caption = trimmed(list(dict.fromkeys(captions)))
        except ValueError as error:
            return Item(name, 0, "", fault=str(error)), label
        rest = {key: value for key, value in values.items() if key not in self.images | {self.caption, self.label}}
        about = reading.chosen(values) if reading.columns else about_of(rest)
        return Item(name, 0, caption, about=about), label

    def _label(self, lines: Sequence[Line]) -> Label:
        labels = []
        for line in lines if self.label else ():
            value = line.values.get(self.label)
            if isinstance(value, float):  # pandas writes 3.0 where another label is missing
                value = int(value) if value.is_integer() else None if value != value else value
            labels.append(label_of(value, self.label))
        known = list(dict.fromkeys(label for label in labels if label != NoClass()))
        if len(known) > 1:
            return NoClass(f"its lines of metadata give it several classes: {known[0]!r} and {known[1]!r}")
        return known[0] if known else NoClass()


def _lines(tables: dict[str, Table], names: Iterable[str]) -> tuple[dict[str, list[Line]], list[Item]]:
    """(name of a file -> its lines, the lines that tell of none)."""
    there = set(names)
    folded: dict[str, list[str]] = {}
    for name in there:
        folded.setdefault(name.lower(), []).append(name)
    lines: dict[str, list[Line]] = {}
    lost = []
    for table_name, table in tables.items():
        column, folder = image_column(table.columns), table_name.rpartition("/")[0]
        for line in table.lines:
            given, fault = line.values.get(column), line.fault
            if not fault and (given is None or not str(given).strip()):
                fault = f"names no image in {column!r}"
            if not fault:
                found = _file(folder, str(given), there, folded)
                if found:
                    lines.setdefault(found, []).append(line)
                    continue
                fault = f"there is no file {str(given)!r} beside it"
            lost.append(Item(f"{table_name}, line {line.number}", 0, "", fault=as_utf8(fault)))
    return lines, lost


def _file(folder: str, given: str, there: set[str], folded: dict[str, list[str]]) -> str:
    """The file that a line names, relative to the folder of its metadata file; empty if there is none.

    The backslashes of another system, blanks around it, and the case of letters do not matter where they need not.
    """
    for name in (given, given.strip().replace("\\", "/")):
        path = posixpath.normpath(posixpath.join(folder, name))
        if path in there:
            return path
    alike = folded.get(path.lower(), [])
    return alike[0] if len(alike) == 1 else ""


def _columns(tables: dict[str, Table]) -> str:
    """'; metadata.csv has …', for a message."""
    return "".join(f"; {name} has {list(table.columns)}" for name, table in tables.items())
