"""The order of a mix, against a loop that gives each position to the set that is most behind its share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapix.data.mix.order import MixOrder, Stretch, extended
from megapix.data.mix.turns import MOST_PARTS, Line, parts_of
from megapix.errors import InputError
from megapix.shards.index import ShardEntry

Phase = tuple[int, int]


def in_turn(
    parts: Sequence[int], had: list[int], limits: Sequence[int | None], slots: int, phase: Phase = (1, 2)
) -> list:
    """(stream, turn) of the next slots, one after the other: the stream most behind its share; `had` counts on."""
    found, base, alive = [], list(had), list[int]()
    while len(found) < slots:
        now = [s for s, limit in enumerate(limits) if parts[s] and (limit is None or had[s] < limit)]
        if now != alive:
            alive, base = now, list(had)
        if not alive:
            break
        most = min(alive, key=lambda s: ((had[s] - base[s] + Fraction(*phase)) / parts[s], s))
        found.append((most, had[most]))
        had[most] += 1
    return found


def pairs(line: Line, slots: int) -> list[tuple[int, int]]:
    streams, turns = line.at(np.arange(slots))
    return list(zip(streams.tolist(), turns.tolist(), strict=True))


shares = st.lists(st.sampled_from([0, 1, 2, 3, 7, 50, 997]), min_size=1, max_size=6).filter(any)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shares, st.sampled_from([(1, 2), (1, 8), (7, 8), (63, 128)]), st.data())
def test_turns_are_those_of_a_loop(parts: list[int], phase: Phase, data: st.DataObject) -> None:
    limits = [data.draw(st.one_of(st.none(), st.integers(0, 90))) for _ in parts]
    expected = in_turn(parts, [0] * len(parts), limits, 600, phase)
    line = Line(len(parts), phase)
    line.extend(
        0,
        lambda had: (tuple(p if n is None or h < n else 0 for p, n, h in zip(parts, limits, had, strict=True)), limits),
    )
    assert pairs(line, len(expected)) == expected
    if len(expected) < 600:
        assert line.end == len(expected)
        with pytest.raises(InputError, match="beyond the end"):
            line.at(np.array([len(expected)]))
    some = data.draw(st.integers(0, len(expected)))
    counts = Counter(stream for stream, _ in expected[:some])
    assert line.before(some).tolist() == [counts[s] for s in range(len(parts))]


def test_each_stream_is_near_its_share_wherever_one_looks() -> None:
    """Half a turn by itself, and its share of the half turn that each of the streams may be early or late."""
    parts, far = (700, 250, 49, 1), 10**12
    line = Line(4)
    line.extend(0, lambda _: (parts, [None] * 4))
    for slot in [*range(3000), far, far + 613]:
        had = line.before(slot)
        assert had.sum() == slot
        shares = [Fraction(p, 1000) for p in parts]
        assert all(abs(int(h) - slot * s) <= (1 + 4 * s) / 2 for h, s in zip(had, shares, strict=True))
    streams, turns = line.at(np.array([far + 1000, 1000]))
    assert streams[0] == streams[1]
    assert int(turns[0]) - int(turns[1]) == far // 1000 * parts[streams[0]]


def test_parts_are_whole_numbers_in_the_ratio_of_weights() -> None:
    assert parts_of([Fraction("0.7"), Fraction("0.3")]) == (7, 3)
    assert parts_of([Fraction(2), Fraction(0), Fraction(4)]) == (1, 0, 2)
    many = parts_of([Fraction(10**9 + 7), Fraction(1), Fraction(10**9)])
    assert sum(many) == MOST_PARTS
    assert many[1] == 1
    assert abs(many[0] / many[2] - 1) < 1e-5


def entries(*sizes: tuple[int, int]) -> list[ShardEntry]:
    """Entries of (bucket, samples), in order of their buckets."""
    return [ShardEntry(f"{n}.tar", size, 0, "", bucket) for n, (bucket, size) in enumerate(sorted(sizes))]


DIGESTS = ("a" * 64, "b" * 64, "c" * 64)


def mix(sets: list[list[ShardEntry]], schedule: Sequence[Stretch], groups: int = 1, batch: int = 4) -> MixOrder:
    return MixOrder(5, list(zip(DIGESTS, sets, strict=False)), schedule, 0, groups, batch)


def drawn(order: MixOrder, positions: range) -> list[tuple[int, int]]:
    """(set, sample in it) at each position, asked for a step at a time."""
    steps = [np.arange(start, start + order.batch) for start in range(positions.start, positions.stop, order.batch)]
    samples = np.concatenate([order.at(step) for step in steps])[: len(positions)].tolist()
    return [(order.set_of(sample), sample - int(order.first[order.set_of(sample)])) for sample in samples]


def test_weights_that_change_and_a_limit_by_the_loop() -> None:
    """Sets of 11, 7 and 30 samples; the second may be seen three times; weights change at 100, within its epochs."""
    sets = [entries((0, 6), (0, 5)), entries((0, 7)), entries((0, 30))]
    schedule = [Stretch(0, (5, 3, 2), (None, 3.0, None)), Stretch(100, (1, 1, 8), (None, 3.0, 2.0))]
    order, had, expected = mix(sets, schedule), [0, 0, 0], list[tuple[int, int]]()
    for stretch, slots in zip(schedule, (100, 200), strict=True):
        limits = [None if r is None else int(r * n) for r, n in zip(stretch.repeats, (11, 7, 30), strict=True)]
        expected += in_turn(stretch.weights, had, limits, slots)
    found = drawn(order, range(300))
    assert [number for number, _ in found] == [number for number, _ in expected]
    for number, size, times in ((0, 11, None), (1, 7, 3), (2, 30, 2)):
        mine = [sample for which, sample in found if which == number]
        assert order.drawn(300)[number] == len(mine)
        assert times is None or len(mine) == times * size
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert order.end is None, "the first set has no limit"


def test_the_end_where_all_sets_have_limits() -> None:
    sets = [entries((0, 6), (0, 5)), entries((0, 7))]
    order = mix(sets, [Stretch(0, (9, 1), (2.0, 1.0))])
    assert order.end == 2 * 11 + 7
    counts = Counter(drawn(order, range(28)))
    assert max(counts[0, sample] for sample in range(11)) == 2
    assert max(counts[1, sample] for sample in range(7)) == 1
    with pytest.raises(InputError, match="beyond the end"):
        order.at(np.arange(28, 32))


def test_a_set_without_weight_or_smaller_than_a_step() -> None:
    sets = [entries((0, 3)), entries((0, 50)), entries((0, 4))]
    found = drawn(mix(sets, [Stretch(0, (1, 1, 0), (None,) * 3)], batch=24), range(96))
    assert Counter(number for number, _ in found) == {0: 48, 1: 48}
    small = [sample for number, sample in found if number == 0]
    assert all(sorted(small[at : at + 3]) == [0, 1, 2] for at in range(0, 48, 3))
    alone = drawn(mix(sets[:1], [Stretch(0, (1,), (None,))], batch=2), range(6))
    assert sorted(alone[:3]) == sorted(alone[3:]) == [(0, 0), (0, 1), (0, 2)]


def test_the_order_of_a_set_does_not_know_the_others() -> None:
    """Its samples come in the same order beside other sets, at other weights and after a change of them."""
    sets = [entries((0, 20), (0, 11)), entries((0, 17))]
    lines = []
    for schedule in (
        [Stretch(0, (1, 0), (None, None))],
        [Stretch(0, (1, 3), (None, None))],
        [Stretch(0, (1, 3), (None, None)), Stretch(52, (7, 2), (None, None))],
    ):
        lines.append([sample for number, sample in drawn(mix(sets, schedule), range(400)) if number == 0])
    least = min(map(len, lines))
    assert least > 93
    assert lines[0][:least] == lines[1][:least] == lines[2][:least]


def test_sets_alike_have_orders_of_their_own() -> None:
    found = drawn(mix([entries((0, 40))] * 2, [Stretch(0, (1, 1), (None, None))]), range(80))
    first, second = ([sample for number, sample in found if number == which] for which in (0, 1))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second


def test_buckets_of_a_mix() -> None:
    """Steps hold one bucket; over time each set has its weight, and each bucket what the sets have in it by weight."""
    sets = [entries((0, 30), (2, 10)), entries((0, 5), (1, 15), (2, 5))]
    order = mix(sets, [Stretch(0, (3, 1), (None, None))], batch=8)
    numbers = [number for number, _ in found] if (found := drawn(order, range(8 * 1000))) else []
    assert abs(numbers.count(0) / len(numbers) - 0.75) < 0.003
    bucket = {(0, s): 0 if s < 30 else 2 for s in range(40)}
    bucket |= {(1, s): 0 if s < 5 else 1 if s < 20 else 2 for s in range(25)}
    steps = [{bucket[one] for one in found[at : at + 8]} for at in range(0, len(found), 8)]
    assert all(len(held) == 1 for held in steps)
    turns = Counter(held.pop() for held in steps)
    share = {0: 0.75 * 0.75 + 0.25 * 0.2, 1: 0.25 * 0.6, 2: 0.75 * 0.25 + 0.25 * 0.2}
    assert all(abs(turns[b] / 1000 - share[b]) < 0.002 for b in share)
    for number, samples in ((0, range(30)), (0, range(30, 40)), (1, range(5)), (1, range(5, 20)), (1, range(20, 25))):
        mine = [sample for which, sample in found if which == number and sample in samples]
        for epoch in range(len(mine) // len(samples)):
            assert sorted(mine[epoch * len(samples) : (epoch + 1) * len(samples)]) == list(samples)


@pytest.mark.parametrize("groups", [1, 4])
def test_limits_in_buckets(groups: int) -> None:
    """No sample more often than its set's limit; of each bucket's samples less than a step are left over at the end."""
    sets = [entries((0, 301), (1, 100)), entries((0, 55), (1, 203), (2, 40))]
    order = mix(sets, [Stretch(0, (2, 1), (2.0, 3.0))], groups, batch=8)
    assert order.end is not None
    found = Counter(drawn(order, range(order.end)))
    assert all(times <= (2, 3)[number] for (number, _), times in found.items())
    assert sum(found.values()) == order.end
    assert 2 * 401 + 3 * 298 - order.end < 3 * 8
    assert order.drawn(order.end).sum() == order.end


def test_positions_are_found_alone_and_in_any_company() -> None:
    sets = [entries((0, 20), (0, 11)), entries((0, 17))]
    schedule = [Stretch(0, (5, 2), (3.0, None)), Stretch(60, (1, 2), (4.0, None))]
    whole = np.concatenate([mix(sets, schedule, 2).at(np.arange(n, n + 4)) for n in range(0, 800, 4)])
    generator = np.random.default_rng(0)
    for _ in range(30):
        chosen = generator.integers(0, 800, generator.integers(1, 30))
        assert mix(sets, schedule, 2).at(chosen).tolist() == whole[chosen].tolist()


def test_a_schedule_grows_by_changes_alone() -> None:
    first, same, other = (
        Stretch(0, (1, 2), (None, None)),
        Stretch(8, (1, 2), (None, None)),
        Stretch(8, (1, 3), (None, None)),
    )
    assert extended((), first) == (first,)
    assert extended((first,), same) == (first,)
    assert extended((first,), other) == (first, other)
    assert extended((first, other), Stretch(8, (1, 2), (None, None))) == (first,)
    assert extended((first, other), Stretch(4, (1, 3), (None, None))) == (first, Stretch(4, (1, 3), (None, None)))
