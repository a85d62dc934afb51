"""The options of filters, and what they say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import tyro

from data_prep.filters.rules import CaptionRule, Duplicates, Filters, LanguageRule, SizeRule
from megapix.errors import InputError

THRESHOLD = 4
"""Bits of --dedupe near, without a number."""
LARGEST_THRESHOLD = 8
"""Above it unlike images are taken for the same, and finding them takes long."""
WRITTEN = ("source", "caption", "captions")
"""Keys of a written sample's JSON, which no column takes."""


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Samples that are not wanted: each counts as filtered, under the first of these that takes it."""

    caption_min: Annotated[str, tyro.conf.arg(metavar="N[words]")] = ""
    """Shortest caption, in characters (20) or words (3words); one without a caption has none of either."""
    caption_max: Annotated[str, tyro.conf.arg(metavar="N[words]")] = ""
    """Longest caption, in characters or words."""
    where: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="EXPRESSION")] = ()
    """What must be true of JSON keys or parquet columns: "aesthetic > 5 and lang in ('en', 'de')"; may be repeated."""
    language: Annotated[str, tyro.conf.arg(metavar="COLUMN=en,…")] = ""
    """Languages that stay, as a column names them."""
    max_side: int = 0
    """Longest side of an image in pixels, upright and before the policy; 0 is any, as for the next three."""
    min_area: int = 0
    """Smallest area in pixels."""
    max_area: int = 0
    """Largest area in pixels."""
    max_aspect: float = 0.0
    """Largest ratio of the longer side to the shorter."""
    dedupe: Annotated[str, tyro.conf.arg(metavar="exact|near[=BITS]")] = ""
    """exact leaves out images of equal pixels, near those whose perceptual hashes differ in 4 bits or BITS, of 64; the
    first stays."""


def filters_of(options: FilterOptions) -> Filters:
    """What the options say, but for --min-side.

    Raises:
        InputError: one that cannot be read, or is out of range.
    """
    from data_prep.filters.expression import parse

    filters = Filters(
        captions=tuple(_caption_rules(options)),
        where=tuple(dict.fromkeys(parse(text) for text in options.where)),
        language=_language(options.language),
        sizes=tuple(_sizes(options)),
        duplicates=_duplicates(options.dedupe),
    )
    filters.check()
    return filters


def kept_columns(option: str) -> tuple[str, ...]:
    """Read --keep, such as 'aesthetic,similarity'.

    Raises:
        InputError: a column that is empty, or one of the keys that every sample has.
    """
    columns = tuple(column.strip() for column in option.split(",")) if option else ()
    for column in columns:
        if not column or column in WRITTEN or columns.count(column) > 1:
            why = "is empty" if not column else "is there anyway" if column in WRITTEN else "is named twice"
            raise InputError(f"--keep {option!r}: column {column!r} {why}; expected columns, separated by commas")
    return columns


def _caption_rules(options: FilterOptions) -> list[CaptionRule]:
    rules = []
    for least, text in ((True, options.caption_min), (False, options.caption_max)):
        name = f"--caption-{'min' if least else 'max'}"
        match = re.fullmatch(r"(\d{1,9})\s*(chars|characters|words)?", text.strip())
        if text and not match:
            raise InputError(f"{name} = {text!r}: expected characters, such as 20, or words, such as 3words")
        if match:
            rules.append(CaptionRule(least, int(match[1]), "words" if match[2] == "words" else "chars"))
    return rules


def _language(option: str) -> LanguageRule | None:
    column, equals, names = option.rpartition("=")
    languages = tuple(name.strip().casefold() for name in names.split(","))
    if option and (not equals or not column.strip() or not all(languages)):
        raise InputError(f"--language = {option!r}: expected COLUMN=LANGUAGE,…, such as lang=en,de")
    return LanguageRule(column.strip(), languages) if option else None


def _sizes(options: FilterOptions) -> list[SizeRule]:
    given = (
        SizeRule("max-side", options.max_side),
        SizeRule("min-area", options.min_area),
        SizeRule("max-area", options.max_area),
        SizeRule("max-aspect", options.max_aspect),
    )
    for rule in given:
        least = 1 if rule.name == "max-aspect" else 0
        if rule.bound and not least <= rule.bound < float("inf"):
            raise InputError(f"{rule.option.replace(' ', ' = ')}: expected at least {least}, or 0 for any")
    return [rule for rule in given if rule.bound]


def _duplicates(option: str) -> Duplicates | None:
    kind, equals, bits = option.partition("=")
    if not option:
        return None
    if option == "exact":
        return Duplicates()
    if kind != "near" or (equals and not (bits.isascii() and bits.isdecimal() and int(bits) <= LARGEST_THRESHOLD)):
        raise InputError(
            f"--dedupe = {option!r}: expected exact, near, or near=BITS with at most {LARGEST_THRESHOLD} bits"
        )
    return Duplicates(int(bits) if equals else THRESHOLD)
