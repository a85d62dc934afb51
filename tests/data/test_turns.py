"""Which bucket a step belongs to, against the definition: all steps of all buckets, sorted by their times."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest

from megapix.data.order import Order
from megapix.shards.index import ShardEntry


def order_of(counts: list[int]) -> Order:
    return Order(3, [ShardEntry("a.tar", n, 10, "0" * 64, bucket) for bucket, n in enumerate(counts)], 0, 1, 8)


def defined(counts: list[int], steps: int) -> list[tuple[int, int]]:
    """The first steps of a run: the j-th step of a bucket with n samples is due at (j + 1/2) / n, ties by bucket."""
    whole = sum(counts)
    each = [
        (Fraction(2 * j + 1, 2 * n), place, j) for place, n in enumerate(counts) for j in range(steps * n // whole + 2)
    ]
    return [(place, j) for _, place, j in sorted(each)[:steps]]


def steps_before(counts: list[int], place: int, number: int) -> int:
    """How many steps come before the `number`-th of a bucket, counted bucket by bucket in whole numbers."""
    total, mine = number, counts[place]
    for other, count in enumerate(counts):
        if other != place:
            total += max(0, -(-((2 * number + 1) * count - mine + (other < place)) // (2 * mine)))
    return total


COUNTS = {
    "two": [3, 5],
    "equal": [7, 7, 7, 7],
    "one rare": [1, 1000, 999],
    "ties": [2, 4, 6, 12, 1, 3],
    "129": [int(n) for n in np.random.default_rng(5).integers(1, 5000, 129)],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_turns_are_as_defined(counts: list[int]) -> None:
    order, steps = order_of(counts), 3 * sum(counts) if sum(counts) < 100 else 3001
    assert [order._find_turn(step) for step in range(steps)] == defined(counts, steps)


def test_far_turns_are_exact() -> None:
    """Counts near the largest that an index may have, which floats do not tell apart."""
    for counts in ([10**15, 10**15 - 1, 10**15 - 7, 3], [10**9 + n for n in range(57)]):
        order, generator = order_of(counts), np.random.default_rng(1)
        for step in [int(n) for n in generator.integers(0, 10**12, 25)] + [sum(counts) * 2 + n for n in range(9)]:
            place, number = order._find_turn(step)
            assert steps_before(counts, place, number) == step


def test_turns_of_200_buckets_are_quick() -> None:
    order = order_of([int(n) for n in np.random.default_rng(2).integers(1, 10**7, 200)])
    took = []
    for step in range(10**6, 10**6 + 101):
        start = time.thread_time()
        order._find_turn(step)
        took.append(time.thread_time() - start)
    assert sorted(took)[50] < 1e-3, "seconds of this thread; it was 1.3 at 129 buckets"
