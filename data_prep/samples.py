"""The samples of a WebDataset tar file: members grouped by key, with class and caption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.source import EXTENSIONS, as_utf8, check_label
from data_prep.sources.tars import members
from megapix.errors import InputError

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
    """From the `txt` member, or "caption" in the `json` member; else empty."""
    fault: str = ""
    """Why the sample cannot be used, if that is plain without decoding its image."""


def samples_of(tar: Path, shown: str = "") -> list[TarSample]:
    """List the samples of a tar file in its order; the images themselves are not read.

    A member's key is its name up to the first dot of the last part; members without a dot, and hidden ones, belong to
    no sample, as in webdataset.

    Args:
        shown: what to call the file in messages, if it is a temporary copy.

    Raises:
        InputError: a damaged tar file, or a key that occurs twice.
    """
    shown = shown or str(tar)
    found: dict[str, dict[str, tuple[str, int, int]]] = {}
    for name, at, size in members(tar):
        folder, _, base = name.rpartition("/")
        key, dot, extension = base.partition(".")
        if not key or not dot:
            continue
        parts = found.setdefault(f"{folder}/{key}".lstrip("/"), {})
        if extension.lower() in parts:
            raise InputError(f"{shown}: key {key!r} occurs twice (member {name!r}); keys must be unique")
        parts[extension.lower()] = (name, at, size)
    with open(tar, "rb") as file:
        return [_sample(file.fileno(), key, parts) for key, parts in found.items()]


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


def _sample(descriptor: int, key: str, parts: dict[str, tuple[str, int, int]]) -> TarSample:
    images = [place for extension, place in parts.items() if f".{extension}" in EXTENSIONS]
    name, at, size = images[0] if images else next(iter(parts.values()))
    try:
        if len(images) != 1:
            raise ValueError(f"expected one image (png, jpg, jpeg, webp), found {sorted(parts)}")
        label, caption = _label_and_caption(descriptor, parts)
    except (ValueError, InputError, RecursionError) as error:
        return TarSample(key, name, at, size, None, "", as_utf8(str(error)))
    return TarSample(key, name, at, size, label, caption)


def _label_and_caption(descriptor: int, parts: dict[str, tuple[str, int, int]]) -> tuple[int | None, str]:
    def text(extension: str) -> str:
        if extension not in parts:
            return ""
        _, at, size = parts[extension]
        if size > LARGEST_TEXT:
            raise ValueError(f"its {extension} member has {size} bytes, at most {LARGEST_TEXT} are read")
        return os.pread(descriptor, size, at).decode("utf-8", "replace").strip()

    about: Any = {}
    if "json" in parts:
        try:
            about = json.loads(text("json"))
        except json.JSONDecodeError as error:
            raise ValueError(f"its json member is not JSON: {error}") from error
    about = about if isinstance(about, dict) else {}
    label: Any = about.get("label")
    if "cls" in parts:
        label = text("cls")
        label = int(label) if label.isdecimal() else label
    number = None if label is None else check_label(label, "cls" if "cls" in parts else "json")
    return number, as_utf8(text("txt") or str(about.get("caption") or ""))
