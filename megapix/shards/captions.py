"""The captions of a sample: one text in the index, and the choice of one of them.

A sample has any number of captions, each with a weight. In `captions.bin` and in receipts they are one text: the
captions with ASCII's record separator between them, each followed by a unit separator and its weight, unless that is 1.
So a single caption is its own text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SEPARATOR, UNIT = "\x1e", "\x1f"
"""Between two captions; between a caption and its weight."""
CONTROLS = str.maketrans({SEPARATOR: " ", UNIT: " "})


class Caption(NamedTuple):
    """One caption of a sample."""

    text: str
    weight: float = 1.0
    """How often it is chosen, beside the weights of the sample's other captions; above 0."""


def pack(captions: Sequence[Caption]) -> str:
    """The captions as one text; separators inside a caption become spaces.

    Raises:
        ValueError: a weight that is not a finite number above 0.
    """
    parts = []
    for text, weight in captions:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of caption {text[:40]!r} is {weight!r}, expected a finite number above 0")
        parts.append(text.translate(CONTROLS) + ("" if weight == 1 else f"{UNIT}{weight!r}"))
    return SEPARATOR.join(parts)


def unpack(packed: str) -> tuple[Caption, ...]:
    """The captions of a sample; one, perhaps empty, if there is no separator.

    Raises:
        ValueError: a weight that is not a finite number above 0.
    """
    found = []
    for part in packed.split(SEPARATOR):
        text, _, written = part.partition(UNIT)
        weight = float(written) if written else 1.0
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of caption {text[:40]!r} is {written!r}, expected a finite number above 0")
        found.append(Caption(text, weight))
    return tuple(found)


def choose(captions: Sequence[Caption], uniform: float) -> int:
    """Number of the caption that a uniform number in (0, 1) falls on, by the weights."""
    left = uniform * sum(caption.weight for caption in captions)
    for number, caption in enumerate(captions):
        left -= caption.weight
        if left < 0:
            return number
    return len(captions) - 1
