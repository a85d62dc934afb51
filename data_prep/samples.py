"""The samples of a WebDataset tar file: members grouped by key, with class and caption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.source import is_image
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


def samples_of(tar: Path, shown: str = "") -> list[TarSample]:
    """List the samples of a tar file in its order; the images themselves are not read.

    Args:
        shown: what to call the file in messages, if it is a temporary copy.

    Raises:
        InputError: a damaged tar file, a key that occurs twice, a sample without exactly one image, or a class that is
            no number.
    """
    shown = shown or str(tar)
    found: dict[str, dict[str, tuple[str, int, int]]] = {}
    for name, at, size in members(tar):
        folder, _, base = name.rpartition("/")
        if base.startswith("."):
            continue
        key, _, extension = base.partition(".")
        parts = found.setdefault(f"{folder}/{key}".lstrip("/"), {})
        if extension.lower() in parts:
            raise InputError(f"{shown}: key {key!r} occurs twice (member {name!r}); keys must be unique")
        parts[extension.lower()] = (name, at, size)
    with open(tar, "rb") as file:
        return [_sample(shown, file.fileno(), key, parts) for key, parts in found.items()]


def _sample(shown: str, descriptor: int, key: str, parts: dict[str, tuple[str, int, int]]) -> TarSample:
    images = [place for place in parts.values() if is_image(place[0])]
    if len(images) != 1:
        raise InputError(f"{shown}: sample {key!r}: expected one image (png, jpg, jpeg, webp), found {sorted(parts)}")

    def text(extension: str) -> str:
        if extension not in parts:
            return ""
        _, at, size = parts[extension]
        return os.pread(descriptor, min(size, LARGEST_TEXT), at).decode("utf-8", "replace").strip()

    about: dict[str, Any] = {}
    if "json" in parts:
        try:
            about = json.loads(text("json"))
        except ValueError as error:
            raise InputError(f"{shown}: sample {key!r}: its json member is not JSON: {error}") from error
    label = text("cls") if "cls" in parts else about.get("label") if isinstance(about, dict) else None
    try:
        number = None if label is None else int(label)
    except (TypeError, ValueError) as error:
        raise InputError(f"{shown}: sample {key!r}: its class is {str(label)[:20]!r}, not a number") from error
    if number is not None and number < 0:
        raise InputError(f"{shown}: sample {key!r}: its class is {number}, expected 0 or more")
    caption = text("txt") or (str(about.get("caption") or "") if isinstance(about, dict) else "")
    name, at, size = images[0]
    return TarSample(key, name, at, size, number, caption)


def labels_of(samples: list[TarSample], shown: str) -> list[int]:
    """The samples' classes, or 0 for all where none has one.

    Raises:
        InputError: some have a class and some have not.
    """
    without = [sample for sample in samples if sample.label is None]
    if without and len(without) < len(samples):
        raise InputError(f"{shown}: sample {without[0].key!r} has no class (cls), but others have one")
    return [sample.label or 0 for sample in samples]
