"""The samples of a WebDataset tar file: members grouped by key, with class and captions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.sources.base import EXTENSIONS, Entries, as_utf8, check_label, ending
from data_prep.sources.captions import captions_of, packed
from data_prep.sources.reading import PLAIN, Reading
from data_prep.sources.tars import members
from megapix.errors import InputError

READ = ("cls", "txt", "json")
"""Members of a sample that are read, beside its image."""
LARGEST_TEXT = 1 << 20
"""Bytes of a cls, txt or json member that are read at most."""


class TarSample(NamedTuple):
    """One sample of a tar file."""

    key: str
    name: str
    """Name of the image's member."""
    offset: int
    """Of the image's data in the tar file."""
    size: int
    label: int | None
    """From the `cls` member, or "label" in the `json` member; None if there is neither."""
    caption: str
    """Packed, from the `json` and `txt` members (`data_prep.sources.captions.captions_of`); empty if there is none."""
    fault: str = ""
    """Why the sample cannot be used, if that is plain without decoding its image."""
    caption_keys: tuple[str, ...] = ()
    """Those of --captions that its JSON has."""


def samples_of(tar: Path, entries: Entries, reading: Reading = PLAIN, shown: str = "") -> list[TarSample]:
    """List the samples of a tar file in its order; the images themselves are not read.

    A member's key is its name up to the first dot of the last part; members without a dot, and hidden ones, belong to
    no sample, as in webdataset.

    Args:
        entries: counts the members.
        shown: what to call the file in messages, if it is a temporary copy.

    Raises:
        InputError: a damaged tar file, or a key that occurs twice.
    """
    shown = shown or str(tar)
    found: dict[str, dict[str, tuple[str, int, int]]] = {}
    for name, at, size in members(tar, entries):
        folder, _, base = name.rpartition("/")
        key, dot, extension = base.partition(".")
        if not key or not dot:
            entries.pass_over(ending(name))
            continue
        parts = found.setdefault(f"{folder}/{key}".lstrip("/"), {})
        if extension.lower() in parts:
            raise InputError(f"{shown}: key {key!r} occurs twice (member {name!r}); keys must be unique")
        parts[extension.lower()] = (name, at, size)
    with open(tar, "rb") as file:
        samples = [_sample(file.fileno(), key, parts, reading) for key, parts in found.items()]
    for parts in found.values():
        _count(parts, entries)
    return samples


def _count(parts: Iterable[str], entries: Entries) -> None:
    """Count the members of a sample: its image (or, without one, the sample as such), what is read of it, the rest."""
    left = list(parts)
    image = next((each for each in left if f".{each}" in EXTENSIONS), left[0])
    for each in left:
        if each == image:
            entries.item()
        elif each in READ or f".{each}" in EXTENSIONS:
            entries.part()
        else:
            entries.pass_over(f".{each}")


def labels_of(samples: Iterable[TarSample], shown: str) -> list[int]:
    """The samples' classes, or 0 for all where none has one; samples with a fault have none.

    Raises:
        InputError: some have a class and some have not.
    """
    samples = list(samples)
    whole = [sample for sample in samples if not sample.fault]
    without = [sample for sample in whole if sample.label is None]
    if without and len(without) < len(whole):
        raise InputError(f"{shown}: sample {without[0].key!r} has no class (cls), but others have one")
    return [sample.label or 0 for sample in samples]


def _sample(descriptor: int, key: str, parts: dict[str, tuple[str, int, int]], reading: Reading) -> TarSample:
    images = [place for extension, place in parts.items() if f".{extension}" in EXTENSIONS]
    name, at, size = images[0] if images else next(iter(parts.values()))
    has: tuple[str, ...] = ()
    try:
        if len(images) != 1:
            raise ValueError(f"expected one image (png, jpg, jpeg, webp), found {sorted(parts)}")
        about = _about(descriptor, parts)
        has = tuple(wanted for wanted, _ in reading.keys if wanted in about)
        label = _label(descriptor, parts, about)
        caption = packed(captions_of(about, _text(descriptor, parts, "txt"), reading.keys))
    except (ValueError, InputError, RecursionError) as error:
        return TarSample(key, name, at, size, None, "", as_utf8(str(error)), has)
    return TarSample(key, name, at, size, label, caption, "", has)


def _text(descriptor: int, parts: dict[str, tuple[str, int, int]], extension: str) -> str:
    if extension not in parts:
        return ""
    _, at, size = parts[extension]
    if size > LARGEST_TEXT:
        raise ValueError(f"its {extension} member has {size} bytes, at most {LARGEST_TEXT} are read")
    return os.pread(descriptor, size, at).decode("utf-8", "replace").strip()


def _about(descriptor: int, parts: dict[str, tuple[str, int, int]]) -> dict[str, Any]:
    """The JSON object of the sample; an empty one if it has none."""
    try:
        about = json.loads(_text(descriptor, parts, "json")) if "json" in parts else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"its json member is not JSON: {error}") from error
    return about if isinstance(about, dict) else {}


def _label(descriptor: int, parts: dict[str, tuple[str, int, int]], about: dict[str, Any]) -> int | None:
    label: Any = about.get("label")
    if "cls" in parts:
        label = _text(descriptor, parts, "cls")
        label = int(label) if label.isdecimal() else label
    return None if label is None else check_label(label, "cls" if "cls" in parts else "json")
