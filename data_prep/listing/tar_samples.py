"""The samples of a WebDataset tar file: members grouped by key, with class and captions."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from data_prep.listing.base import SHOWN_EXTENSIONS, Entries, as_utf8, ending, is_image
from data_prep.listing.captions import LARGEST_TEXT, captions_of, json_object, trimmed
from data_prep.listing.classes import Label, NoClass, label_of
from data_prep.listing.img2dataset import Rows
from data_prep.listing.reading import PLAIN, Reading
from data_prep.listing.tars import TextData, members
from megapix.shards.index import IMAGE_ENDINGS
from megapix.text import text_of

READ = ("cls", "txt", "json")
"""Members of a sample that are read, beside its image."""
TEXTS = tuple(f".{kind}" for kind in READ)
SHOWN = 6
"""Members that a message names."""
KIND_OF_IMAGE = re.compile(r"[a-z_][\w-]*")
"""What stands between the first dot and the last one in 0001.image.jpg; a number there belongs to a name with dots."""

MEMBER = "\0"
"""No name of a member has it."""
TWO_ENDINGS = "some images are members such as KEY.image.jpg, each the only one under its key; --image-key names them"

NOWHERE = 0
"""Offset of an image that is a link out of the tar file; the data of a member never begins there."""

Parts: TypeAlias = dict[str, tuple[str, int, int]]
"""What follows the first dot of a member's name, in lower case -> (its name, offset of its data, size)."""


class TarSample(NamedTuple):
    """One sample of a tar file."""

    key: str
    name: str
    """Name of the image's member."""
    offset: int
    """Of the image's data in the tar file."""
    size: int
    label: Label
    """As it is there: in the `cls` member, or "label" in the `json` member."""
    caption: str
    """Packed, from the `json` and `txt` members (`data_prep.listing.captions.captions_of`); empty if there is none."""
    fault: str = ""
    """Why the sample cannot be used, if that is plain without decoding its image."""
    caption_keys: tuple[str, ...] = ()
    """Those of --captions that its JSON has."""
    about: str = ""
    """What is kept of its JSON (`Reading.chosen`)."""


def samples_of(
    tar: Path, entries: Entries, reading: Reading = PLAIN, rows: Rows | None = None, shown: str = ""
) -> list[TarSample]:
    """List the samples of a tar file in its order; the images themselves are not read.

    A member's key is its name up to the first dot of the last part; members without a dot, and hidden ones, belong to
    no sample, as in webdataset. Where a kind of member comes again under one key, a second sample begins, which cannot
    be used.

    Args:
        entries: counts the members.
        rows: those of img2dataset's table beside the tar file, for samples without JSON.
        shown: what to call the tar file in messages, if it is a copy.

    Raises:
        DamagedTar: as `members`.
    """
    found: dict[str, list[Parts]] = {}
    shapes: Counter[tuple[tuple[str, ...], str]] = Counter()
    broken: dict[str, str] = {}
    symbolic: set[str] = set()
    texts = TextData(TEXTS)
    there = members(tar, entries, broken=broken, shown=shown, symbolic=symbolic, texts=texts)
    for name, at, size in chain(there, _images_of(broken, entries)):
        folder, _, base = name.rpartition("/")
        key, dot, extension = base.partition(".")
        if not key or not dot:
            entries.pass_over(ending(name))
            continue
        key, extension = f"{folder}/{key}".lstrip("/") if folder or name[0] == "/" else key, extension.lower()
        groups = found.get(key)
        if groups is None:
            found[key] = groups = [{}]
        elif extension in groups[-1]:
            groups.append({})
        groups[-1][extension] = (name, at, size)
    samples: list[TarSample] = []
    with open(tar, "rb") as file:
        inside = _Texts(file.fileno(), texts.data)
        for key, groups in found.items():
            for number, parts in enumerate(groups):
                if len(parts) == 1 and (only := next(iter(parts.values())))[0] in symbolic and only[1] != NOWHERE:
                    entries.pass_over("link")  # to an image of another sample, and all that there is of this one
                    continue
                kinds = tuple(parts)
                image, fault = _image(kinds, reading.image_keys)
                if fault:
                    fault = fault.replace(MEMBER, repr(parts[image][0]))
                if not fault and parts[image][1] == NOWHERE:
                    fault = f"it is a link to {broken[parts[image][0]]!r}, which is not in the tar file"
                shapes[kinds, image] += 1
                if number:
                    name, at, size = parts[image]
                    fault = f"key {key!r} occurs twice (member {name!r}); keys must be unique"
                    # Names are unique, those of what cannot be used, too.
                    samples.append(TarSample(key, f"{name}#{number + 1}", at, size, NoClass(), "", as_utf8(fault)))
                    continue
                samples.append(_sample(inside, key, parts, image, fault, reading, rows))
                if not fault and "." in image and not reading.image_keys:
                    entries.remark(TWO_ENDINGS)
    for (kinds, image), times in shapes.items():
        _count(kinds, image, entries, times)
    return samples


def _images_of(broken: dict[str, str], entries: Entries) -> Iterator[tuple[str, int, int]]:
    """Images that are links out of the tar file, once its members are listed; their samples have a fault. Other such
    links are counted as passed over."""
    for name in broken:
        if is_image(name):
            yield name, NOWHERE, 0
        else:
            entries.pass_over("link")


@lru_cache(1024)
def _image(parts: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, str]:
    """(which member is the image, or stands for the sample; why the sample cannot be used, with MEMBER in place of that
    member's name)."""
    plain = [kind for kind in parts if f".{kind}" in IMAGE_ENDINGS]
    dotted = [kind for kind in parts if kind not in plain and kind.endswith(IMAGE_ENDINGS)]
    first, there = [*plain, *dotted, *parts][0], sorted(parts)[:SHOWN]
    if wanted:
        chosen = next((kind for kind in wanted if kind in parts), "")
        return chosen or first, "" if chosen else f"no member is {' or '.join(wanted)} (--image-key), found {there}"
    if len(plain) == 1:
        return first, ""
    if not plain and not dotted:
        return first, f"expected one image ({SHOWN_EXTENSIONS}), found {there}"
    if plain:
        return first, f"expected one image, found {there}; --image-key {plain[0]} takes one of them"
    middle = first.rpartition(".")[0]
    if not KIND_OF_IMAGE.fullmatch(middle) or any(f"{middle}.{kind}" in parts for kind in READ):
        return first, (
            f"what follows the first dot of {MEMBER} is taken for its kind, as in webdataset; expected one "
            f"image ({SHOWN_EXTENSIONS}) under the key, found {there}"
        )
    if len(dotted) > 1:
        return first, f"expected one image, found {there}; --image-key {first} takes one of them"
    return first, ""


def _count(parts: Iterable[str], image: str, entries: Entries, times: int) -> None:
    """Count the members of so many samples: the image (or what stands for the sample), what is read of it, the rest."""
    for each in parts:
        if each == image:
            entries.item(times)
        elif each in READ or f".{each}" in IMAGE_ENDINGS:
            entries.part(times)
        else:
            entries.pass_over(f".{each}", times)


def _sample(
    texts: _Texts, key: str, parts: Parts, image: str, fault: str, reading: Reading, rows: Rows | None
) -> TarSample:
    name, at, size = parts[image]
    has: tuple[str, ...] = ()
    try:
        if fault:
            raise ValueError(fault)
        about = _about(texts, parts)
        if rows and "json" not in parts and ("txt" not in parts or reading.keys or reading.columns):
            about = rows.of(key.rpartition("/")[2])
        has = tuple([wanted for wanted, _ in reading.keys if wanted in about])
        label = _label(texts, parts, about)
        caption = trimmed(captions_of(about, texts.of(parts, "txt"), reading.keys))
    except (ValueError, RecursionError) as error:
        return TarSample(key, name, at, size, NoClass(), "", as_utf8(str(error)), has)
    return TarSample(key, name, at, size, label, caption, "", has, reading.chosen(about))


class _Texts(NamedTuple):
    """The texts of a tar file."""

    descriptor: int
    known: dict[int, bytes]
    """Offset -> data of those that have been read."""

    def of(self, parts: Parts, extension: str) -> str:
        """That of a sample, stripped; empty if there is none. ValueError that names it."""
        if extension not in parts:
            return ""
        _, at, size = parts[extension]
        if size > LARGEST_TEXT:
            raise ValueError(f"its {extension} member has {size} bytes, at most {LARGEST_TEXT} are read")
        data = self.known.get(at)
        try:
            return text_of(os.pread(self.descriptor, size, at) if data is None else data).strip()
        except ValueError as error:
            raise ValueError(f"its {extension} member: {error}") from error


def _about(texts: _Texts, parts: Parts) -> dict[str, Any]:
    """The JSON object of the sample; an empty one if it has none."""
    text = texts.of(parts, "json")
    try:
        return json_object(text) if "json" in parts else {}
    except ValueError as error:
        raise ValueError(f"its json member {error}") from error


def _label(texts: _Texts, parts: Parts, about: dict[str, Any]) -> Label:
    """Its label as it is there."""
    if "cls" not in parts:
        return label_of(about.get("label"), "json")
    try:
        return label_of(texts.of(parts, "cls"), "cls")
    except ValueError as error:
        return NoClass(str(error))
