"""From raw labels to class numbers, in one place for every source and for `index`.

A raw label is what stands in a `cls` member, a JSON key, a column or a label file. Whole numbers from 0 to 999,999 are
the class numbers themselves. Names, and numbers beyond, are put in order, and a class's number is its place. A sample
whose class cannot be known is rejected where others have one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from data_prep.listing.base import LARGEST_LABEL, as_utf8
from megapix.errors import InputError
from megapix.shards.mix.alike import UNCLASSED
from megapix.text import text_of

MOST_NAMES = 10_000
"""Distinct names that are taken for classes; more are taken for free text."""
LONGEST = 200
"""Characters of a class name."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf)", re.IGNORECASE)
EXPECTED = f"expected a name, or a whole number, 0 to {LARGEST_LABEL}"
MISSING = "it has no class"
BY_NAME = "by name"
"""What an index records of its labels where they are not its class numbers."""


class NoClass(NamedTuple):
    """A label that is none."""

    reason: str = ""
    """What is wrong with it; empty where there is no label."""


Label: TypeAlias = int | str | NoClass


def label_of(value: Any, where: str) -> Label:
    """A raw label: a whole number from 0, however it is written, or a name without blanks around it.

    Args:
        value: of JSON, of a parquet cell, or a text.
        where: what it is called in the reason.
    """
    if value is None:
        return NoClass()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        value = as_utf8(value.strip())
        if len(value) > LONGEST:
            return NoClass(f"{where}: the class has {len(value)} characters, at most {LONGEST} are a name")
        if value.isdecimal():
            return int(value)
        if value and not NUMBER.fullmatch(value):
            return value
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return NoClass(as_utf8(f"{where}: the class is {value!r:.80}, {EXPECTED}"))


# ---------------------------------------------------------------------------------------------------------------------
# --classes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """The option --classes."""

    names: tuple[str, ...]
    """Class names by number."""
    numbers: Mapping[str, int] | None
    """Label as text -> class number; None if no label is looked at: all is one class."""
    shown: str = "none"
    """The file, for messages."""
    remark = ""
    """As `Classes.remark`: what was given is plain."""

    def number(self, label: Label) -> int:
        """The class number of a label.

        Raises:
            ValueError: it has none, with the reason.
        """
        if self.numbers is None:
            return 0
        if isinstance(label, NoClass):
            raise ValueError(label.reason or MISSING)
        if (number := self.numbers.get(str(label))) is None:
            raise ValueError(f"its class {label!r} is not in --classes {self.shown}")
        return number

    def recorded(self) -> dict[str, Any]:
        """What plan and index say of it; `from_record` reads it."""
        return {"labels": "none" if self.numbers is None else dict(self.numbers)}


NONE = Given((UNCLASSED,), None)
"""--classes none."""


def parse_classes(option: str) -> Given | None:
    """Read --classes: 'none', or a file with a name on each line, a JSON list of names, or a JSON object of
    name -> number or number -> name.

    Where the file gives names alone, a label that is a number below their count is the class number.

    Raises:
        InputError: the file cannot be read, or is none of these.
    """
    if option in ("", "none"):
        return NONE if option else None
    path = Path(option)
    try:
        text = text_of(path.read_bytes())
        if text.lstrip().startswith(("[", "{")):
            names, numbers = _from_json(json.loads(text))
        else:
            names, numbers = _from_names([line.strip() for line in text.split("\n") if line.strip()])
        as_utf8("".join(names)).encode()
    except OSError as error:
        raise InputError(f"--classes {option!r}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"--classes {option!r}: {error}; expected 'none', or a file of names (one a line), a JSON list of them, or "
            "a JSON object of name and number"
        ) from error
    if not names or len(names) > LARGEST_LABEL + 1:
        raise InputError(f"--classes {option!r} has {len(names)} classes, expected 1 to {LARGEST_LABEL + 1}")
    return Given(names, numbers, path.name)


def _from_json(value: Any) -> tuple[tuple[str, ...], dict[str, int]]:
    if isinstance(value, list):
        return _from_names([_name(one) for one in value])
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}")
    if all(isinstance(number, int) and not isinstance(number, bool) for number in value.values()):
        numbers = {_text(name): number for name, number in value.items()}
        if wrong := [name for name, number in numbers.items() if not 0 <= number <= LARGEST_LABEL]:
            raise ValueError(f"the number of {wrong[0]!r} is {numbers[wrong[0]]}, beyond 0 to {LARGEST_LABEL}")
        names = {number: name for name, number in reversed(numbers.items())}  # the first that has it
        return tuple(names.get(n, str(n)) for n in range(1 + max(names, default=-1))), numbers
    if wrong := [key for key in value if not key.isdecimal() or int(key) > LARGEST_LABEL]:
        raise ValueError(f"{wrong[0]!r} is no class number")
    by_number = {int(key): _name(name) for key, name in value.items()}
    return _from_names([by_number.get(n, str(n)) for n in range(1 + max(by_number, default=-1))])


def _from_names(names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names by number; a label is a name that no two classes have, or where that is none of them, the number."""
    often = Counter(map(_text, names))
    numbers = {_text(name): number for number, name in enumerate(names) if often[_text(name)] == 1}
    for number in range(len(names)):
        if str(number) not in often:
            numbers[str(number)] = number
    return tuple(names), numbers


def _text(name: str) -> str:
    """A name as the text of the label that it is."""
    label = label_of(name, "class")
    return name if isinstance(label, NoClass) else str(label)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no name")
    return as_utf8(value.strip())


# ---------------------------------------------------------------------------------------------------------------------
# The classes of a set
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """The classes of a set, and the number of each label."""

    names: tuple[str, ...]
    numbers: Mapping[int | str, int] | None = None
    """Label -> class number; None where the labels are the numbers."""
    alone: bool = False
    """Whether all is one class, whatever the labels are."""
    stray: str = ""
    """What is wrong with labels that are not among `numbers`."""
    remark: str = ""
    """One line that says how they came about, where that is not plain."""

    def number(self, label: Label) -> int:
        """The class number of a label.

        Raises:
            ValueError: the sample has to be rejected; says why.
        """
        if self.alone:
            return 0
        if isinstance(label, NoClass):
            raise ValueError(
                label.reason or f"{MISSING}, but others have one; --classes none makes everything one class"
            )
        if self.numbers is None and isinstance(label, int):
            return label
        if self.numbers is None or label not in self.numbers:
            raise ValueError(f"the class is {label!r}, expected {self.stray}; --classes FILE settles it")
        return self.numbers[label]

    @property
    def by_name(self) -> bool:
        """Whether labels were put in order, and are not the class numbers."""
        return self.numbers is not None


class Found:
    """The labels of a set, as they come."""

    def __init__(self) -> None:
        self.labels: Counter[int | str] = Counter()
        self.missing = 0
        """Samples without a label."""
        self.faulty = 0
        """Labels that are no classes."""
        self.captioned = False
        """Whether captions are what is wanted: samples have some, or --captions was given."""
        self._names = 0

    def add(self, label: Label, count: int = 1) -> None:
        """Count a sample's label.

        Raises:
            InputError: there are more names than classes have.
        """
        if isinstance(label, NoClass):
            self.faulty += count if label.reason else 0
            self.missing += 0 if label.reason else count
            return
        self._names += label not in self.labels and is_name(label)
        self.labels[label] += count
        if self._names > MOST_NAMES:
            first, second = sorted(str(label) for label in self.labels if is_name(label))[:2]
            raise InputError(
                f"more than {MOST_NAMES:,} distinct labels, such as {first!r} and {second!r}, are no classes; expected "
                "--classes none (everything is one class) or --classes FILE"
            )

    def refused_by(self, classes: Classes | Given) -> bool:
        """Whether a sample of these has to be rejected for its label."""
        labels: list[Label] = [
            *self.labels,
            *[NoClass("faulty")] * bool(self.faulty),
            *[NoClass()] * bool(self.missing),
        ]
        return any(why for _, why in numbered(labels, classes))

    def classes(self, known: Sequence[str] = ()) -> Classes:
        """Settle them.

        Args:
            known: names of classes by number from elsewhere; they count if they are enough.
        """
        if not self.labels:
            return Classes((UNCLASSED,), alone=self.captioned or not self.faulty)
        numbers = [label for label in self.labels if isinstance(label, int)]
        names = [label for label in self.labels if isinstance(label, str)]
        if sum(self.labels[n] for n in numbers) >= sum(self.labels[n] for n in names):
            stray = f"a number, as most labels are, such as {min(numbers)}"
            if max(numbers) > LARGEST_LABEL:
                return in_order(numbers, stray)
            count = 1 + max(numbers)
            return Classes(tuple(known) if len(known) >= count else tuple(map(str, range(count))), stray=stray)
        stray = f"a name, as most labels are, such as {min(names)!r}"
        if set(names) <= set(known) and len(set(known)) == len(known):
            return Classes(tuple(known), {name: number for number, name in enumerate(known)}, stray=stray)
        return in_order(names, stray)


def is_name(label: int | str) -> bool:
    """Whether a label is no class number."""
    return isinstance(label, str) or label > LARGEST_LABEL


def in_order(labels: Iterable[int | str], stray: str = "") -> Classes:
    """Classes that are the distinct labels: numbers by value, names by code point."""
    ordered = sorted(
        set(labels), key=lambda label: (isinstance(label, str), label if isinstance(label, int) else 0, str(label))
    )
    few = ", ".join(str(label) for label in ordered[:3]) + (", …" if len(ordered) > 3 else "")
    several = f"{len(ordered):,} classes" if len(ordered) > 1 else "1 class"
    return Classes(
        tuple(str(label) for label in ordered),
        {label: number for number, label in enumerate(ordered)},
        stray=stray,
        remark=f"{several}, the distinct labels in order: {few}",
    )


def settle(
    labels: Sequence[Label],
    given: Given | None,
    captioned: bool,
    known: Sequence[str] = (),
) -> tuple[Classes, list[tuple[int, str]]]:
    """The classes of a source, and (class number, why the sample is rejected) of each of its labels.

    Args:
        given: the option --classes.
        captioned: whether captions are what is wanted, so that a set without any class is fine.
        known: as in `Found.classes`.

    Raises:
        InputError: there are more names than classes have.
    """
    classes, settled = settle_counted(Counter(labels), given, captioned, known)
    by_label = dict(zip(dict.fromkeys(labels), settled, strict=True))
    return classes, [by_label[label] for label in labels]


def settle_counted(
    counts: Mapping[Label, int], given: Given | None, captioned: bool, known: Sequence[str] = ()
) -> tuple[Classes, list[tuple[int, str]]]:
    """As `settle`, from how often each label comes; the list is of the distinct ones."""
    if given:
        return Classes(given.names), numbered(list(counts), given)
    found = Found()
    found.captioned = captioned
    for label, count in counts.items():
        found.add(label, count)
    classes = found.classes(known)
    return classes, numbered(list(counts), classes)


def numbered(labels: Sequence[Label], classes: Classes | Given) -> list[tuple[int, str]]:
    """(class number, why the sample is rejected) of each label."""
    return [_attempt(classes, label) for label in labels]


def _attempt(classes: Classes | Given, label: Label) -> tuple[int, str]:
    try:
        return classes.number(label), ""
    except ValueError as error:
        return 0, str(error)


# ---------------------------------------------------------------------------------------------------------------------
# What an index records
# ---------------------------------------------------------------------------------------------------------------------


def recorded(classes: Classes | Given) -> dict[str, Any]:
    """What an index says of its labels; nothing where they are its class numbers."""
    if isinstance(classes, Given):
        return classes.recorded()
    return {"labels": BY_NAME} if classes.by_name else {}


def from_record(names: Sequence[str], source: Mapping[str, Any]) -> Classes:
    """The classes of an index, for labels of its tar files as they are there.

    Args:
        names: of its classes by number.
        source: what it records of its source.
    """
    labels = source.get("labels")
    if labels == BY_NAME:
        labels = {name: number for number, name in enumerate(names)}
    if isinstance(labels, dict):
        read = ((label_of(text, "class"), number) for text, number in labels.items())
        return Classes(tuple(names), {label: number for label, number in read if not isinstance(label, NoClass)})
    return Classes(tuple(names), alone=labels == "none" or tuple(names) == (UNCLASSED,))
