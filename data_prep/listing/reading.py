"""How a source is read: what the options of `write` and `index` say of it, in one value that all kinds take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from data_prep.listing.base import as_utf8
from data_prep.listing.captions import CaptionKeys, option_of, parse_keys
from data_prep.listing.classes import Given
from megapix.errors import InputError


@dataclass(frozen=True)
class Reading:
    """Options of reading a source; small, and pickled into worker processes."""

    keys: CaptionKeys = ()
    """JSON keys or parquet columns that hold the captions (--captions)."""
    labels: Path | None = None
    """Label file of a flat set (--labels)."""
    columns: tuple[str, ...] = ()
    """JSON keys or columns that go into `Item.about`, where a sample has them: filters ask for them, or they are
    kept."""
    classes: Given | None = None
    """The classes, if they are given (--classes)."""
    class_order: Literal["name", "number"] | None = None
    """Order of class folders (--class-order); by default that of their numbers, if all are numbers."""
    image_keys: tuple[str, ...] = ()
    """What may follow the first dot in the name of a sample's image in a tar file, the preferred first, in lower case
    (--image-key)."""
    split: str = ""
    """The one split to take (--split); 'all' takes all together."""
    unpacked: Path | None = None
    """Folder for unpacked copies of compressed tar files; without one they are refused."""
    lists: Path | None = None
    """Folder in which the lists of tar files are kept (`lists.tar_lists`); without one they are not."""
    workers: int = 1
    """Processes that list tar files."""
    max_rejected_tars: float = 0.01
    """Largest share of tar files that may be left out because they cannot be read (--max-rejected-tars)."""

    def chosen(self, metadata: Mapping[str, Any]) -> str:
        """Those of `columns` that a sample has, as the text of a JSON object; empty if it has none (`about_of`)."""
        return about_of({key: metadata[key] for key in self.columns if key in metadata}) if self.columns else ""

    def recorded(self) -> dict[str, Any]:
        """What plan and index record of it, besides what the list of samples shows; nothing without options."""
        captions = {"captions": option_of(self.keys)} if self.keys else {}
        image_key = {"image_key": ",".join(self.image_keys)} if self.image_keys else {}
        return captions | image_key


PLAIN = Reading()
"""Without any option."""


def about_of(metadata: Mapping[str, Any]) -> str:
    """What is known of a sample, as the text of a JSON object; empty if nothing is.

    Texts, finite numbers, truth values and dates are taken; null, NaN and what is nested count as missing.
    """
    found = {as_utf8(key): scalar for key, value in metadata.items() if (scalar := _scalar(value)) is not None}
    return json.dumps(found, ensure_ascii=False) if found else ""


def _scalar(value: Any) -> str | float | None:
    if isinstance(value, str):
        return as_utf8(value)
    if isinstance(value, date):
        return value.isoformat()
    value = float(value) if isinstance(value, Decimal) else value
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def parse_image_keys(option: str) -> tuple[str, ...]:
    """Read --image-key, such as 'image.jpg,jpg'.

    Raises:
        InputError: one of them is empty or cannot be part of a name.
    """
    keys = tuple(key.strip().lower().removeprefix(".") for key in option.split(",")) if option else ()
    if wrong := [key for key in keys if not key or "/" in key]:
        raise InputError(
            f"--image-key {option!r}: {wrong[0]!r} is no ending; expected what follows the first dot of an image's "
            "name, such as image.jpg, or several of them separated by commas"
        )
    return keys


def as_indexed(source: Mapping[str, Any]) -> Reading:
    """How the tar files of an index are read, from what it records of its source."""
    keys, image_keys = (str(source.get(key, "")) for key in ("captions", "image_key"))
    return Reading(parse_keys(keys), image_keys=parse_image_keys(image_keys))
