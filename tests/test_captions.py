"""Captions of a sample: one text and back, the choice by weight, the reader."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, seed
from hypothesis import strategies as st

from megapix import draws
from megapix.captions import Caption, choose, pack, unpack
from megapix.config import DataConfig
from megapix.data.locate import locate
from megapix.data.read import ShardReader
from megapix.draws import Purpose

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x1e\x1f"))
WEIGHTS = st.just(1.0) | st.floats(min_value=5e-324, max_value=1.7e308)
CAPTIONS = st.lists(st.builds(Caption, TEXTS, WEIGHTS), min_size=1, max_size=6)

# ---------------------------------------------------------------------------------------------------------------------
# One text
# ---------------------------------------------------------------------------------------------------------------------


@seed(0)
@given(CAPTIONS)
def test_captions_come_back_from_their_text(captions: list[Caption]) -> None:
    assert unpack(pack(captions)) == tuple(captions)
    assert pack(unpack(pack(captions))) == pack(captions)


def test_the_text_itself() -> None:
    assert pack([Caption("a dog"), Caption("a brown dog", 0.25), Caption("dog", 2.0)]) == (
        "a dog\x1ea brown dog\x1f0.25\x1edog\x1f2.0"
    )
    assert pack([Caption("one\x1etwo\x1f3")]) == "one two 3"
    assert pack([]) == ""
    assert unpack("") == (Caption("", 1.0),)
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="the weight of caption 'dog' is"):
            pack([Caption("dog", weight)])
    for text in ("dog\x1f0", "cat\x1edog\x1f-1.5", "dog\x1fnan", "dog\x1finf", "dog\x1fheavy"):
        with pytest.raises(
            ValueError, match=r"the weight of caption 'dog' is|could not convert string to float: 'heavy'"
        ):
            unpack(text)


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


def test_the_choice_changes_exactly_at_the_sums_of_weights() -> None:
    """Weights 1, 2 and 1 of 4: the second from 1/4 on, the third from 3/4 on; these numbers are exact in binary."""
    captions = [Caption("a", 1.0), Caption("b", 2.0), Caption("c", 1.0)]
    for uniform, number in (
        (2.0**-54, 0),
        (math.nextafter(0.25, 0), 0),
        (0.25, 1),
        (0.5, 1),
        (math.nextafter(0.75, 0), 1),
        (0.75, 2),
        (math.nextafter(1, 0), 2),
    ):
        assert choose(captions, uniform) == number
    assert [choose([Caption("a", 0.1)], uniform) for uniform in (2.0**-54, math.nextafter(1, 0))] == [0, 0]
    sevenths = [Caption(str(n), 0.1) for n in range(7)]  # 0.1 seven times is not 0.7 in binary: the last one stands
    assert choose(sevenths, math.nextafter(1, 0)) == 6


def test_captions_come_as_often_as_their_weights_say() -> None:
    captions = [Caption("long", 0.7), Caption("short", 0.2), Caption("tags", 0.1)]
    even = [choose(captions, (n + 0.5) / 1000) for n in range(1000)]
    assert [even.count(number) for number in range(3)] == [700, 200, 100]
    drawn = [choose(captions, u) for u in draws.uniform(5, Purpose.CAPTION, np.arange(20_000, dtype=np.int64)).tolist()]
    for number, share in enumerate((0.7, 0.2, 0.1)):
        assert abs(drawn.count(number) - 20_000 * share) < 4 * math.sqrt(20_000 * share * (1 - share))
    assert Purpose.CAPTION == 10, "frozen: it defines runs"


# ---------------------------------------------------------------------------------------------------------------------
# The reader
# ---------------------------------------------------------------------------------------------------------------------


def test_the_reader_gives_the_captions_of_a_sample(shards: Path) -> None:
    config = DataConfig(path=str(shards), image_size=16)
    reader = ShardReader(locate(config), config)
    for sample in range(40):
        label = reader.read(sample).label
        assert reader.captions(sample) == (Caption(("blue", "green", "red")[label], 1.0),)
