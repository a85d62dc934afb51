"""Lists of samples: packed in a file, in the order of their hashes, and those of tar files kept between commands."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.listing.base import Item
from data_prep.lists.items import Items, Some
from data_prep.writing.plan import Options, describe, jobs
from megapix.errors import InputError
from megapix.shards.image_policy import Policy


def items_of(count: int, chunks: int = 0) -> list[Item]:
    rng, found = random.Random(count), []
    for n in range(count):
        place = (f"/data/{n % 3}.tar", 512 * n, n) if n % 2 else ()
        chunk = f"c{rng.randrange(chunks)}" if chunks and n % 7 else ""
        found.append(
            Item(f"a/{n:05d} ü.jpg", n % 5, "a dog" * (n % 3), place, chunk, '{"x": 1}' * (n % 2), "cut" * (n == 9))
        )
    return found


def packed(items: Sequence[Item]) -> Items:
    made = Items()
    for item in items:
        made.add(item)
    return made


def test_items_come_out_as_they_went_in(tmp_path: Path) -> None:
    given = items_of(9001, 4)
    made = packed(given)
    assert list(made) == given == list(iter(made))
    for n in (0, 4095, 4096, 9000, -1, -9001):
        assert made[n] == given[n]
    for part in (slice(3, 5000), slice(None, None, 7), slice(-3, None), slice(5, 5)):
        assert made[part] == given[part]
    with pytest.raises(IndexError):
        made[9001]
    made.add(given[0]._replace(name="later"))
    assert made[9001].name == "later"
    some = Some(made, [5, 3, 8000])
    assert list(some) == [given[5], given[3], given[8000]]
    assert (some[1], some[1:], len(some)) == (given[3], [given[3], given[8000]], 3)
    assert not list(packed([]))


def test_labels_may_be_settled_later() -> None:
    made = packed([Item("a", 1, ""), Item("b", 0, ""), Item("c", -1, "", fault="cut"), Item("d", 1, "")])
    made.settle([(7, ""), (0, "no class")])
    assert [(item.label, item.fault) for item in made] == [(0, "no class"), (7, ""), (0, "cut"), (0, "no class")]


def by_hand(items: Sequence[Item], seed: int, shard: int, buckets: Sequence[int]) -> list[list[str]]:
    """The order of samples as version 0.2 laid them, with plain lists."""

    def place(text: str) -> bytes:
        return hashlib.sha256(f"{seed}/{text}".encode()).digest()[:16]

    out = []
    for bucket in sorted(set(buckets)):
        chunks: dict[str, list[Item]] = defaultdict(list)
        for item, own in zip(items, buckets, strict=True):
            if own == bucket:
                chunks[item.chunk].append(item)
        laid: list[Item] = []
        window: list[Item] = []
        for chunk in sorted(chunks, key=place):
            window += chunks[chunk]
            if len(window) >= shard:
                laid += sorted(window, key=lambda item: place(item.name))
                window = []
        laid += sorted(window, key=lambda item: place(item.name))
        out += [[item.name for item in laid[at : at + shard]] for at in range(0, len(laid), shard)]
    return out


@pytest.mark.parametrize("chunks", [0, 1, 40])
def test_the_order_is_what_it_was(chunks: int) -> None:
    items = items_of(1009, chunks)
    options = Options(Policy.make("crop", 16), samples_per_shard=37, seed=3)
    buckets = [n * n % 3 for n in range(len(items))]
    assert [[i.name for i in job.items] for job in jobs(packed(items), options)] == by_hand(items, 3, 37, [0] * 1009)
    made = list(jobs(items, options, buckets))
    assert [[item.name for item in job.items] for job in made] == by_hand(items, 3, 37, buckets)
    assert [job.number for job in made] == list(range(len(made)))
    assert [job.first for job in made] == [sum(len(job.items) for job in made[:n]) for n in range(len(made))]
    assert {name: job.bucket for job in made for name in (i.name for i in job.items)} == {
        item.name: bucket for item, bucket in zip(items, buckets, strict=True)
    }


class Listed:
    """A source of a list."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items, self.classes, self.about = items, ("a",), dict[str, str]()


def test_names_are_unique() -> None:
    items = items_of(50)
    options = Options(Policy.make("crop", 16))
    assert describe(Listed(items), options) == describe(Listed(packed(items)), options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the source holds 'a/00007 ü[.]jpg' twice; names must be unique"):
        describe(Listed([*items, items[7], items[3], items[7]]), options)  # type: ignore[arg-type]


def test_memory_does_not_grow_with_captions() -> None:
    count, caption = 10_000, "a caption " * 30
    tracemalloc.start()
    try:
        made = Items()
        for n in range(count):
            made.add(Item(f"00000.tar/{n:09d}.jpg", n % 1000, caption, ("/data/00000.tar", 5120 * n, 3000)))
        options = Options(Policy.make("crop", 16))
        describe(Listed(made), options)  # type: ignore[arg-type]
        assert sum(len(job.items) for job in jobs(made, options)) == count
        assert tracemalloc.get_traced_memory()[1] < 60 * count + (2 << 20), "a sample has more than 300 bytes"
    finally:
        tracemalloc.stop()
