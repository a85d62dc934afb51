"""Captions of a sample: one text and back, the choice by weight, what sources hold, the reader, the counts."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, seed
from hypothesis import strategies as st

from data_prep.listing.base import Item
from data_prep.listing.captions import captions_in, captions_of, json_object, packed, parse_keys, trimmed
from data_prep.listing.reading import Reading
from data_prep.passes.caption_counts import CaptionCounts
from data_prep.writing.shard import _about
from megapix import rng
from megapix.config import DataConfig
from megapix.data.locate import locate
from megapix.data.read import ShardReader
from megapix.errors import InputError
from megapix.rng import Purpose
from megapix.shards.captions import Caption, choose, pack, unpack
from megapix.shards.index import read_index
from megapix.shards.table import Captions

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


@seed(0)
@given(TEXTS)
def test_a_single_caption_is_its_own_text(text: str) -> None:
    assert pack([Caption(text)]) == packed([Caption(text)]) == packed([Caption(text, 0.5)]) == text


@seed(0)
@given(CAPTIONS)
def test_the_json_of_a_shard_holds_what_its_item_has(captions: list[Caption]) -> None:
    text = packed(captions)
    about = json.loads(json.dumps(_about(Item("a.png", 0, text), ()), ensure_ascii=False))
    assert ("caption" in about) == (len(unpack(text)) == 1)
    assert packed(captions_of(about, "", ())) == text


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
    drawn = [choose(captions, u) for u in rng.uniform(5, Purpose.CAPTION, np.arange(20_000, dtype=np.int64)).tolist()]
    for number, share in enumerate((0.7, 0.2, 0.1)):
        assert abs(drawn.count(number) - 20_000 * share) < 4 * math.sqrt(20_000 * share * (1 - share))
    assert Purpose.CAPTION == 10, "frozen: it defines runs"


# ---------------------------------------------------------------------------------------------------------------------
# What sources hold
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("", []),
        ([], []),
        (["", None, {"text": None, "weight": math.nan}, {"text": "", "weight": 0}], []),
        ("a dog", [Caption("a dog", 2.0)]),
        (7, []),
        (math.nan, []),
        (True, []),
        (Decimal("0.5"), []),
        ([3, math.nan, "a dog"], [Caption("a dog", 2.0)]),
        ({"text": math.nan, "weight": 0}, []),
        (["a dog", "a cat"], [Caption("a dog", 2.0), Caption("a cat", 2.0)]),
        ({"text": "a dog", "weight": 3}, [Caption("a dog", 6.0)]),
        (
            [{"text": "a dog", "weight": 0.25, "model": "x"}, {"text": "a cat"}, {"text": "dogs", "weight": None}],
            [Caption("a dog", 0.5), Caption("a cat", 2.0), Caption("dogs", 2.0)],
        ),
    ],
)
def test_values_that_hold_captions(value: Any, expected: list[Caption]) -> None:
    assert captions_in(value, 2.0) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"text": "dog", "weight": "0.5"}], "the weight of caption 'dog' is '0.5', expected a finite number above 0"),
        ([{"text": "dog", "weight": 0}], "the weight of caption 'dog' is 0, exp"),
        ([{"text": "dog", "weight": -2.5}], "the weight of caption 'dog' is -2.5, exp"),
        ([{"text": "dog", "weight": math.nan}], "the weight of caption 'dog' is nan, exp"),
        ([{"text": "dog", "weight": math.inf}], "the weight of caption 'dog' is inf, exp"),
        ([{"text": "dog", "weight": 10**400}], "the weight of caption 'dog' is inf, exp"),
        ([{"text": "dog", "weight": True}], "the weight of caption 'dog' is True, exp"),
        ([{"text": "dog", "weight": 1.7e308}], "the weight of caption 'dog' is inf, exp"),  # twice that
        ([{}], "a caption is '{}', expected a text, or a list of texts or of"),
        ([["dog"]], r"a caption is \"\['dog'\]\", exp"),
        ([{"caption": "dog"}], r"a caption is \"{'caption': 'dog'}\", exp"),
        ({"text": ["dog"]}, r"a caption is \"\['dog'\]\", exp"),
        (b"dog", r"a caption is \"b'dog'\", exp"),
    ],
)
def test_values_that_hold_none(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        captions_in(value, 2.0)


def test_which_of_text_and_json_wins() -> None:
    about = {"captions": ["a", {"text": "b", "weight": 3}], "caption": "c", "long": "d", "alts": ["e", "f"]}
    several = [Caption("a"), Caption("b", 3.0)]
    assert captions_of(about, "text", ()) == several
    assert captions_of({"captions": ["", None], "caption": "c"}, "text", ()) == [Caption("text")]
    assert captions_of({"caption": "c"}, "", ()) == [Caption("c")]
    assert captions_of({"caption": ["c", "d"]}, "", ()) == [Caption("c"), Caption("d")]
    assert captions_of({}, "", ()) == []
    keys = parse_keys("alts=0.5,long,none")
    assert captions_of(about, "text", keys) == [Caption("e", 0.5), Caption("f", 0.5), Caption("d")]
    assert captions_of({}, "text", keys) == []
    assert captions_of({"caption": "c"}, "0 0.5 0.5 0.25 1.\n17 0 1e-3 0.5 0.5\n", ()) == [Caption("c")], "YOLO's boxes"
    assert captions_of({}, "2 dogs", ()) == [Caption("2 dogs")]
    assert captions_of({}, "1984", ()) == [Caption("1984")]


def test_json_beside_an_image() -> None:
    assert json_object('{"caption": "a dog"}') == {"caption": "a dog"}
    assert json_object("null") == json_object("[]") == json_object("{}") == {}
    for text, words in (
        ("", "is not JSON"),
        ('{"caption": ', "is not JSON: Expecting value"),
        ("[" * 100_000, "is not JSON: maximum recursion"),
        ('["a dog"]', "is a list, expected a JSON object"),
        ('"a dog"', "is a str, expected a JSON object"),
        ("7", "is a int, expected a JSON object"),
    ):
        with pytest.raises(ValueError, match=words):
            json_object(text)


def test_packing_what_a_source_holds() -> None:
    assert packed([Caption(" "), Caption("dog", 0.5)]) == "dog"
    assert packed([Caption("", 1.0), Caption("\n", 2.0)]) == ""
    assert packed([Caption(" dog ")]) == " dog "
    assert trimmed([Caption(" dog \r\n")]) == "dog"
    assert trimmed([Caption("\n dog\nand cat ", 0.5), Caption(" \n")]) == "dog\nand cat"
    assert packed([Caption("dog\ud800"), Caption("cat", 0.5)]) == "dog\\ud800\x1ecat\x1f0.5"


def test_the_option(tmp_path: Path) -> None:
    assert parse_keys("") == ()
    assert parse_keys("long") == (("long", 1.0),)
    assert parse_keys("long=0.7, short=3e-1,a=b=2") == (("long", 0.7), ("short", 0.3), ("a=b", 2.0))
    assert Reading().recorded() == {}
    for option in ("long", "long=0.7,short=0.3,tags", "a=b=2.0", "a=b=1.0"):
        recorded = Reading(parse_keys(option)).recorded()
        assert recorded == {"captions": option}
        assert parse_keys(recorded["captions"]) == parse_keys(option)
    for option, words in (
        ("long,", "--captions 'long,': key '' is empty; expected KEY, or KEY=WEIGHT, separated by commas"),
        ("=2", "key '' is empty"),
        ("long\udcff", "key 'long.udcff' is not UTF-8"),
        ("long,long=2", "'long' is named twice"),
        ("long=x", "--captions 'long=x': the weight of 'long' is 'x', expected a finite number above 0"),
        ("long=", "the weight of 'long' is ''"),
        ("long=0", "the weight of 'long' is '0'"),
        ("long=-1", "the weight of 'long' is '-1'"),
        ("long=nan", "the weight of 'long' is 'nan'"),
        ("long=inf", "the weight of 'long' is 'inf'"),
    ):
        with pytest.raises(InputError, match=words):
            parse_keys(option)


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    """21 captions: "w" to "w w … w" of 1 to 20 words (1, 3, … 39 characters), and the first once more."""
    counts = CaptionCounts()
    counts.add(0, unpack(""))
    for sample in range(10):
        words = (2 * sample + 1, 2 * sample + 2)
        counts.add(sample + 1, [Caption(" ".join("w" * n), 0.5) for n in words])
    counts.add(11, [Caption("w"), Caption(" \n")])
    assert list(counts.lines(lambda sample: f"shard {sample}")) == [
        "21 in 12 samples: 0 fewest, 2 median, 2 most of a sample; 1 samples without any",
        "20 different, 1 duplicates",
        "characters: 1 shortest, 19 median, 37 95th percentile, 39 longest",  # the 11th and the 20th of 21 in order
        "words: 1 shortest, 10 median, 19 95th percentile, 20 longest",
        f"longest: sample 10 in shard 10, {' '.join('w' * 20)!r}",
        "such as 'w', 'w w', 'w w w'",
    ]
    counts = CaptionCounts()
    counts.add(0, unpack(""))
    assert list(counts.lines(str)) == [
        "0 in 1 samples: 0 fewest, 0 median, 0 most of a sample; 1 samples without any",
        "0 different, 0 duplicates",
    ]
    counts.add(1, [Caption("long\n" * 20)])  # 100 characters, of which 60 are shown
    assert list(counts.lines(str))[-1] == "such as '" + "long\\n" * 12 + "'…"


# ---------------------------------------------------------------------------------------------------------------------
# The reader
# ---------------------------------------------------------------------------------------------------------------------


def test_the_reader_gives_the_captions_of_a_sample(shards: Path) -> None:
    config = DataConfig(path=str(shards), image_size=16)
    reader, said = ShardReader(locate(config), config), Captions(shards, read_index(shards))
    for sample in range(40):
        label = reader.read(sample).label
        assert said.of(sample) == (Caption(("blue", "green", "red")[label], 1.0),)
