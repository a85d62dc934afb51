"""The promise of the data plane, audited: every sample once an epoch, in one global order, on any topology.

The auditor knows the order only through what loaders yield. A property is checked on positions for many topologies that
change in the middle of an epoch, and with real loaders and worker processes for a few.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapix.config import BatchLayout, DataConfig
from megapix.data import order
from megapix.data.loader import batches
from megapix.data.locate import locate
from megapix.data.mix.order import MixOrder, Stretch
from megapix.data.order import Order, SampleOrder
from megapix.shards.index import ShardEntry

WORLDS = (1, 2, 3, 8)
STEP = 24
"""A global batch that every world divides."""

layouts = st.sampled_from([BatchLayout(STEP // w // a, a, w) for w in WORLDS for a in (1, 3) if STEP // w % a == 0])


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[list[ShardEntry], int, int, int]:
    """(shards, window, groups, seed) of one bucket."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    shards = [ShardEntry(f"{n}.tar", size, 0, "") for n, size in enumerate(sizes)]
    return shards, draw(st.integers(0, 13)), draw(st.sampled_from([1, 2, 3, 8, 24])), draw(st.integers(0, 2**63 - 1))


def step_of(position: int, layout: BatchLayout, groups: int, places: Order | MixOrder) -> dict[int, int]:
    """position -> sample of one step, gathered over the ranks of a world; each rank draws its own micro batches."""
    found: dict[int, int] = {}
    for rank in range(layout.ranks):
        stream = order.micro_batches(position, layout, rank, (), groups)
        for _ in range(layout.accumulation):
            positions = next(stream)
            for place, sample in zip(positions.tolist(), places.at(positions).tolist(), strict=True):
                assert place not in found
                found[place] = sample
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data_sets(), st.lists(layouts, min_size=1, max_size=30))
def test_every_sample_once_an_epoch_on_changing_worlds(
    data: tuple[list[ShardEntry], int, int, int], worlds: list[BatchLayout]
) -> None:
    shards, window, groups, seed = data
    total = sum(shard.samples for shard in shards)
    found: dict[int, int] = {}
    for step, layout in enumerate(worlds):  # each step on another world, opened anew: a resume at every step
        found |= step_of(step * STEP, layout, groups, Order(seed, shards, window, groups, STEP))
    assert sorted(found) == list(range(len(worlds) * STEP))
    for epoch in range(len(found) // total):
        assert sorted(found[p] for p in range(epoch * total, (epoch + 1) * total)) == list(range(total))
    alone = SampleOrder(seed, [shard.samples for shard in shards], window, groups).at(np.arange(len(found)))
    assert [found[p] for p in sorted(found)] == alone.tolist(), "the global order does not know the worlds"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 60)), min_size=2, max_size=10),
    st.integers(0, 5),
    st.sampled_from([1, 2, 8]),
    st.lists(layouts, min_size=1, max_size=40),
)
def test_every_bucket_once_an_epoch_of_its_own(
    entries: list[tuple[int, int]], window: int, groups: int, worlds: list[BatchLayout]
) -> None:
    shards = [ShardEntry(f"{n}.tar", size, 0, "", bucket) for n, (bucket, size) in enumerate(sorted(entries))]
    counts = Counter[int]()
    for shard in shards:
        counts[shard.bucket] += shard.samples
    owner = np.repeat([shard.bucket for shard in shards], [shard.samples for shard in shards])
    total, drawn, steps = len(owner), dict[int, list[int]](), Counter[int]()
    for step, layout in enumerate(worlds):
        found = step_of(step * STEP, layout, groups, Order(7, shards, window, groups, STEP))
        (bucket,) = {int(owner[sample]) for sample in found.values()}
        drawn.setdefault(bucket, []).extend(found[p] for p in sorted(found))
        steps[bucket] += 1
        for b, count in counts.items():
            assert abs(steps[b] - (step + 1) * count / total) <= len(counts) / 2 + 1, "its share at any moment"
    for bucket, samples in drawn.items():
        n = counts[bucket]
        for epoch in range(len(samples) // n):
            assert len(set(samples[epoch * n : (epoch + 1) * n])) == n


def test_the_turns_of_buckets_by_hand() -> None:
    """Buckets of 3 and 1 samples: due at (j + 1/2)/3 = 1/6 3/6 5/6 7/6 … and at 1/2 3/2 …, ties to the first."""
    shards = [ShardEntry("a", 3, 0, "", 0), ShardEntry("b", 1, 0, "", 1)]
    turns = [Order(0, shards, 0, 1, 1)._find_turn(step) for step in range(8)]
    assert turns == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]
    far = 10**12
    place, number = Order(0, shards, 0, 1, 1)._find_turn(far)
    assert (place, number) == (turns[far % 4][0], turns[far % 4][1] + far // 4 * (3, 1)[place])


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[list[ShardEntry]], int, int, int, tuple[int, ...]]:
    """(entries of each set, window, groups, seed, weights)."""
    buckets = st.integers(0, draw(st.sampled_from([0, 3])))
    some = st.lists(st.tuples(buckets, st.integers(1, 30)), min_size=1, max_size=6)
    sets = [
        [ShardEntry(f"{s}-{n}.tar", size, 0, "", bucket) for n, (bucket, size) in enumerate(sorted(entries))]
        for s, entries in enumerate(draw(st.lists(some, min_size=1, max_size=4)))
    ]
    weights = draw(st.lists(st.integers(0, 9), min_size=len(sets), max_size=len(sets)).filter(any))
    groups = draw(st.sampled_from([1, 2, 8]))
    return sets, draw(st.integers(0, 5)), groups, draw(st.integers(0, 2**63 - 1)), tuple(weights)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mixes(), st.lists(layouts, min_size=1, max_size=40), st.integers(1, 9))
def test_every_set_of_a_mix_once_an_epoch_of_its_own(
    data: tuple[list[list[ShardEntry]], int, int, int, tuple[int, ...]], worlds: list[BatchLayout], other: int
) -> None:
    """Worlds change at every step, and the weights in the middle."""
    sets, window, groups, seed, weights = data
    described = [(f"{number}" * 64, shards) for number, shards in enumerate(sets)]
    none, half = (None,) * len(sets), len(worlds) // 2 * STEP
    schedule = [Stretch(0, weights, none), Stretch(half, (*weights[1:], other), none)][: 2 if half else 1]
    owner, of_bucket = list[int](), list[int]()
    for number, shards in enumerate(sets):
        owner += [number] * sum(shard.samples for shard in shards)
        of_bucket += [shard.bucket for shard in shards for _ in range(shard.samples)]
    drawn: dict[tuple[int, int], list[int]] = {}
    for step, layout in enumerate(worlds):
        places = MixOrder(seed, described, schedule[: 2 if step * STEP >= half else 1], window, groups, STEP)
        found = step_of(step * STEP, layout, groups, places)
        assert len({of_bucket[sample] for sample in found.values()}) == 1
        for position in sorted(found):
            sample = found[position]
            drawn.setdefault((owner[sample], of_bucket[sample]), []).append(sample)
        counts = Counter[int]()
        for (number, _), samples in drawn.items():
            counts[number] += len(samples)
        assert places.drawn((step + 1) * STEP).tolist() == [counts[number] for number in range(len(sets))]
        if step * STEP < half or not half:
            assert not any(counts[number] for number, weight in enumerate(weights) if not weight)
    for (number, bucket), samples in drawn.items():
        n = sum(shard.samples for shard in sets[number] if shard.bucket == bucket)
        if groups == 1:
            for epoch in range(len(samples) // n):
                assert len(set(samples[epoch * n : (epoch + 1) * n])) == n
        times = Counter(samples)
        assert max(times.values()) - min(times[s] for s in times) <= 2 + groups, "with groups, to within an epoch each"


@pytest.mark.parametrize("nodes", [pytest.param(8, marks=pytest.mark.long), 64])
@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.long), 4])
def test_a_node_reads_its_share_of_the_shards(nodes: int, window: int) -> None:
    """ImageNet's size, 64 reading groups: whole shards that each node must fetch in an epoch, with a cache that holds
    two windows of its groups; at most 1.1 times its share of the shards."""
    shards, samples, groups, ranks_a_node = 1300, 1000, 64, 8
    sizes = [samples] * shards
    layout = BatchLayout(2048 // (nodes * ranks_a_node), 1, nodes * ranks_a_node)
    places = SampleOrder(0, sizes, window, groups)
    held = groups // nodes * (2 * window if window else shards // groups + 2)
    worst = 0.0
    for node in {0, 1, nodes // 2, nodes - 1}:
        cached: dict[int, None] = {}
        fetched = 0
        ranks = range(node * ranks_a_node, (node + 1) * ranks_a_node)
        mine = np.sort(np.concatenate([next(order.micro_batches(0, layout, rank, (), groups)) for rank in ranks]))
        for position in range(0, shards * samples, layout.total):
            positions = position + mine
            for shard in np.unique(places.at(positions[positions < shards * samples]) // samples).tolist():
                if shard in cached:
                    del cached[shard]
                else:
                    fetched += 1
                cached[shard] = None
                if len(cached) > held:
                    del cached[next(iter(cached))]
        worst = max(worst, fetched / (shards / nodes))
    assert 0.98 < worst <= 1.1
    some = layout.total * np.linspace(0, shards * samples // layout.total - 1, 200).astype(int)
    without = SampleOrder(0, sizes, window).at(mine + some[:, None])
    assert len(np.unique(without // samples)) > 1.2 * shards / nodes, "without groups it would read far more"


def test_real_loaders_on_changing_worlds_and_workers(shards: Path) -> None:
    """40 images, 24 a step: six epochs in ten steps, on worlds and workers that change at every resume."""
    plain = DataConfig(path=str(shards), image_size=16, flip=False, workers=0)
    located = locate(plain)
    whole = next(batches(plain, located, 3, BatchLayout(40, 1, 1), 0, 0, ()))
    epoch = {image.numpy().tobytes(): label for image, label in zip(whole.images, whole.labels.tolist(), strict=True)}
    assert len(epoch) == 40
    found: dict[int, bytes] = {}
    topologies = [(1, 0), (2, 1), (3, 3), (8, 0), (1, 3), (2, 0), (3, 1), (8, 1), (1, 1), (2, 3)]
    for step, (world, workers) in enumerate(topologies):
        config = DataConfig(path=str(shards), image_size=16, flip=False, workers=workers)
        for rank in range(world):
            batch = next(batches(config, located, 3, BatchLayout(STEP // world, 1, world), rank, step * STEP, ()))
            for image, label, place in zip(batch.images, batch.labels.tolist(), batch.positions.tolist(), strict=True):
                data = image.numpy().tobytes()
                assert epoch[data] == label
                assert place not in found
                found[place] = data
    assert sorted(found) == list(range(240))
    for start in range(0, 240, 40):
        assert {found[p] for p in range(start, start + 40)} == set(epoch)
