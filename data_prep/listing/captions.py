"""From what sources hold (texts, lists, weights, JSON) to the one text that an item keeps: that of `captions.pack`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from numbers import Number
from typing import Any, TypeAlias

from data_prep.listing.base import as_utf8
from megapix.errors import InputError
from megapix.shards.captions import Caption, pack

CaptionKeys: TypeAlias = tuple[tuple[str, float], ...]
"""The option --captions: columns or JSON keys, each with the weight of its captions; empty without it."""
CAPTION_COLUMNS = ("caption", "text", "txt", "captions")
"""The first of these columns of a table that there is holds the captions, without --captions."""
LARGEST_TEXT = 1 << 20
"""Bytes of a text or of JSON that are read at most."""
_BOX = re.compile(r"\d+(\s+[-+.\de]+){4,}")
"""A line of a detector's labels, as YOLO has them: a class and the numbers of a box."""


def parse_keys(option: str) -> CaptionKeys:
    """Read --captions, such as 'long=0.7,short=0.3'; a key without a weight has 1.

    Raises:
        InputError: a key that is empty, not UTF-8 or named twice, or a weight that is not a finite number above 0.
    """
    keys: dict[str, float] = {}
    for part in option.split(",") if option else ():
        key, equals, written = part.rpartition("=") if "=" in part else (part, "", "")
        key = key.strip()
        if not key or key in keys or key != as_utf8(key):
            fault = f"{key!r} is named twice" if key in keys else f"key {key!r} is " + ("not UTF-8" if key else "empty")
            raise InputError(f"--captions {option!r}: {fault}; expected KEY, or KEY=WEIGHT, separated by commas")
        try:
            keys[key] = float(written) if equals else 1.0
        except ValueError:
            keys[key] = math.nan
        if not 0 < keys[key] < math.inf:
            raise InputError(
                f"--captions {option!r}: the weight of {key!r} is {written!r}, expected a finite number above 0"
            )
    return tuple(keys.items())


def option_of(keys: CaptionKeys) -> str:
    """The option as plan and index record it; `parse_keys` reads it again."""
    return ",".join(key if weight == 1 and "=" not in key else f"{key}={weight!r}" for key, weight in keys)


def captions_in(value: Any, weight: float = 1.0) -> list[Caption]:
    """The captions in a JSON value or a parquet cell; what is null, empty, a number or NaN, as pandas writes what is
    missing, holds none.

    Args:
        value: a text, or a list of texts or of {"text": …, "weight": …}, where the weight may be missing.
        weight: of all these captions; their own are multiplied by it.

    Raises:
        ValueError: something else, or a weight that is not a finite number above 0.
    """
    if not value:
        return []
    if isinstance(value, list):
        return [caption for one in value for caption in _caption(one, weight)]
    return _caption(value, weight)


def _caption(value: Any, weight: float) -> list[Caption]:
    """One caption, or none where the text is no words: its weight may be anything then."""
    own: Any = None
    if isinstance(value, dict) and "text" in value:
        value, own = value["text"], value.get("weight")
    if value is None or isinstance(value, Number):
        return []
    if not isinstance(value, str):
        raise ValueError(
            f'a caption is {str(value)[:60]!r}, expected a text, or a list of texts or of {{"text": …, "weight": …}}'
        )
    if value == "":
        return []
    return [Caption(value, weight if own is None else _checked(weight * _checked(own, value), value))]


def _checked(weight: Any, text: str) -> float:
    """The weight of the caption `text` as a float; ValueError if it is not a finite number above 0."""
    try:
        if not isinstance(weight, bool) and isinstance(weight, (int, float)) and 0 < float(weight) < math.inf:
            return float(weight)
    except OverflowError:  # JSON's integers have no end
        weight = math.inf
    raise ValueError(f"the weight of caption {text[:40]!r} is {weight!r}, expected a finite number above 0")


def captions_of(about: dict[str, Any], text: str, keys: CaptionKeys) -> list[Caption]:
    """The captions of a sample with the JSON `about` and `text` (empty if there is none).

    With `keys`, what these hold. Else the first of these that holds any: "captions", the text, "caption". A text of
    boxes, as lie beside the images of a detector, is no caption.

    Raises:
        ValueError: as `captions_in`.
    """
    if keys:
        return [caption for key, weight in keys for caption in captions_in(about.get(key), weight)]
    if text and all(_BOX.fullmatch(line.strip()) for line in text.strip().split("\n")):
        text = ""
    return captions_in(about.get("captions")) or captions_in(text) or captions_in(about.get("caption"))


def json_object(text: str) -> dict[str, Any]:
    """The members of a JSON object; none where it is null or an empty list.

    Raises:
        ValueError: it is not JSON, or no object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if value and not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}, expected a JSON object")
    return value or {}


def packed(captions: Sequence[Caption]) -> str:
    """The captions as one UTF-8 text: blank ones are dropped among several, and the weight of a single one.

    Raises:
        ValueError: a weight that is not a finite number above 0.
    """
    if len(captions) > 1:
        captions = [caption for caption in captions if caption.text.strip()]
    if len(captions) == 1:
        captions = [Caption(captions[0].text)]
    return pack([Caption(as_utf8(text), weight) for text, weight in captions])


def trimmed(captions: Sequence[Caption]) -> str:
    """As `packed`, without the blanks and line ends around each caption: what an item keeps."""
    return packed([Caption(text.strip(), weight) for text, weight in captions])


@lru_cache
def of_class(label: object) -> str:
    """The name of a class as the packed caption of what has no other; empty for a number alone, or no class."""
    return packed([Caption(label.replace("_", " "))]) if isinstance(label, str) else ""


def lacking(without: int, samples: int, captioned: bool) -> list[str]:
    """The remark that so many of the samples have no caption; none where no sample has, unless they should."""
    if not without or (without == samples and not captioned):
        return []
    return [f"{without:,} of {samples:,} images have no caption: it is empty there"]


def check_found(keys: CaptionKeys, found: Iterable[str], where: str) -> None:
    """Check that each key of --captions was in the JSON of one sample at least.

    Raises:
        InputError: naming source and key.
    """
    if missing := [key for key, _ in keys if key not in set(found)]:
        raise InputError(f"{where}: --captions names {missing[0]!r}, but not one sample has this key in its JSON")
