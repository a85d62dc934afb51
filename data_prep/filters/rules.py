"""What each filter takes, in one small value that is pickled into worker processes.

They are asked in a fixed order, and the first that takes a sample counts it: captions, --where, --language, sizes,
duplicates.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from data_prep.filters.expression import Expression
from megapix.errors import InputError
from megapix.shards.captions import unpack

Unit = Literal["chars", "words"]


class CaptionRule(NamedTuple):
    """A bound on the length of captions."""

    least: bool
    bound: int
    unit: Unit

    @property
    def option(self) -> str:
        """As it is counted."""
        return f"--caption-{'min' if self.least else 'max'} {self.bound}{'' if self.unit == 'chars' else self.unit}"

    def takes(self, texts: Sequence[str]) -> bool:
        """Whether one of the captions is too short or too long; a sample without captions has one of length 0."""
        lengths = [len(text.split()) if self.unit == "words" else len(text.strip()) for text in texts] or [0]
        return min(lengths) < self.bound if self.least else max(lengths) > self.bound


class LanguageRule(NamedTuple):
    """The languages that stay, by a column."""

    column: str
    languages: tuple[str, ...]

    @property
    def option(self) -> str:
        """As it is counted."""
        return f"--language {self.column}={','.join(self.languages)}"

    def takes(self, metadata: dict[str, Any]) -> bool:
        """Whether the column names another language, or is missing; capitals do not matter."""
        return str(metadata.get(self.column, "")).strip().casefold() not in self.languages


class SizeRule(NamedTuple):
    """A bound on an image's size when it is upright, before the policy."""

    name: Literal["min-side", "max-side", "min-area", "max-area", "max-aspect"]
    bound: float

    @property
    def option(self) -> str:
        """As it is counted."""
        return f"--{self.name} {self.bound:.15g}"

    def takes(self, height: int, width: int) -> bool:
        """Whether an image of so many pixels is out of bounds."""
        shorter, longer = sorted((height, width))
        match self.name:
            case "min-side":
                return shorter < self.bound
            case "max-side":
                return longer > self.bound
            case "min-area":
                return height * width < self.bound
            case "max-area":
                return height * width > self.bound
            case "max-aspect":
                return longer > self.bound * shorter


class Duplicates(NamedTuple):
    """Which images are the same: the first in the source's order stays."""

    threshold: int | None = None
    """Largest number of bits (of 64) in which perceptual hashes of the same image differ; None: equal pixels alone."""

    @property
    def option(self) -> str:
        """As it is counted."""
        return "--dedupe exact" if self.threshold is None else f"--dedupe near={self.threshold}"


@dataclass(frozen=True)
class Filters:
    """All filters of a command; none by default."""

    captions: tuple[CaptionRule, ...] = ()
    where: tuple[Expression, ...] = ()
    language: LanguageRule | None = None
    sizes: tuple[SizeRule, ...] = ()
    duplicates: Duplicates | None = None

    def check(self) -> None:
        """Raise InputError where a package that a filter needs is not installed."""
        near = self.duplicates is not None and self.duplicates.threshold is not None
        if near and importlib.util.find_spec("imagehash") is None:
            raise InputError("--dedupe near needs ImageHash: pip install 'megapix[dedupe]'")

    def with_least_side(self, min_side: int) -> Filters:
        """With --min-side, which belongs to the image policy, as the first of the sizes."""
        sizes = tuple(rule for rule in self.sizes if rule.name != "min-side")
        return replace(self, sizes=(SizeRule("min-side", min_side), *sizes) if min_side > 1 else sizes)

    @property
    def columns(self) -> tuple[str, ...]:
        """The metadata that they ask for."""
        named = [column for expression in self.where for column in expression.columns]
        return tuple(dict.fromkeys(named + ([self.language.column] if self.language else [])))

    def named(self, keep: Sequence[str] = ()) -> list[tuple[str, str]]:
        """(option, column) of each column that they ask for, and of those that --keep names."""
        named = [(expression.option, column) for expression in self.where for column in expression.columns]
        named += [(self.language.option, self.language.column)] if self.language else []
        return named + [(f"--keep {','.join(keep)}", column) for column in keep]

    @property
    def options(self) -> list[str]:
        """Every filter as it is counted, in the order in which they are asked."""
        rules = [*self.captions, *self.where, self.language, *self.sizes, self.duplicates]
        return [rule.option for rule in rules if rule]

    def of_sample(self, caption: str, about: str) -> str:
        """The option that takes a sample for its packed captions or its metadata (a JSON object); empty if none."""
        texts = [one.text for one in unpack(caption)] if self.captions else []
        for rule in self.captions:
            if rule.takes(texts):
                return rule.option
        metadata: dict[str, Any] = json.loads(about) if about and self.columns else {}
        for expression in self.where:
            if not expression.keeps(metadata):
                return expression.option
        return self.language.option if self.language and self.language.takes(metadata) else ""

    def of_size(self, height: int, width: int) -> str:
        """The option that takes an image of so many pixels, upright; empty if none."""
        return next((rule.option for rule in self.sizes if rule.takes(height, width)), "")

    def recorded(self) -> dict[str, Any]:
        """What plan and index record, besides the policy's --min-side; nothing without filters."""
        options = replace(self, sizes=tuple(rule for rule in self.sizes if rule.name != "min-side")).options
        return {"filters": options} if options else {}


NO_FILTERS = Filters()
"""No filter."""


def check_columns(named: Iterable[tuple[str, str]], found: Iterable[str]) -> None:
    """Check that each column that --where, --language or --keep names is one that at least one sample has.

    Args:
        named: (option, column), as `Filters.named`.

    Raises:
        InputError: naming option and column.
    """
    there = set(found)
    for option, column in named:
        if column not in there:
            raise InputError(
                f"{option}: not one sample has {column!r} in its metadata; expected a key of its JSON, or a column"
            )
