"""Order, reading, decoding: an auditor over positions, and the loader on real shards."""

from __future__ import annotations

import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from megapix import rng
from megapix.config import BatchLayout, DataConfig
from megapix.data import order
from megapix.data.batch import Batch
from megapix.data.loader import batches
from megapix.data.locate import locate
from megapix.data.read import ShardReader
from megapix.errors import InputError
from megapix.shards.index import TABLE_NAME, read_index
from megapix.shards.table import RECORD


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_each_epoch_is_a_permutation(size: int) -> None:
    seen = [rng.permuted(0, epoch, size, np.arange(size)).tolist() for epoch in range(3)]
    for epoch in seen:
        assert sorted(epoch) == list(range(size))
    if size > 7:
        assert seen[0] != seen[1] != seen[2]
        assert seen[0] != rng.permuted(1, 0, size, np.arange(size)).tolist()


def test_the_permutation_shuffles_well() -> None:
    size = 10_000
    place = rng.permuted(0, 0, size, np.arange(size))
    assert abs(np.corrcoef(np.arange(size), place)[0, 1]) < 0.03
    assert abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < 0.03
    # Distance of neighbours in a perfect shuffle is size/3 on average.
    assert np.abs(np.diff(place)).mean() == pytest.approx(size / 3, rel=0.03)


def test_take_jumps_over_skipped_ranges() -> None:
    skipped = [(3, 5), (8, 9), (20, 30)]
    assert order.take(0, 4, skipped)[0].tolist() == [0, 1, 2, 5]
    assert order.take(0, 4, skipped)[1] == 6
    positions, following = order.take(6, 4, skipped)
    assert (positions.tolist(), following) == ([6, 7, 9, 10], 11)
    assert order.take(3, 1, skipped)[0].tolist() == [5]
    assert order.take(4, 1, skipped)[0].tolist() == [5]
    assert order.take(40, 2, skipped)[0].tolist() == [40, 41]
    assert order.take(0, 3, [])[0].tolist() == [0, 1, 2]
    # Taken in pieces or at once, the same positions in the same order.
    at_once, position, pieces = order.take(0, 24, skipped)[0].tolist(), 0, []
    for count in (1, 2, 3, 5, 6, 7):
        some, position = order.take(position, count, skipped)
        pieces += some.tolist()
    assert pieces == at_once


@pytest.mark.parametrize(
    "layout", [BatchLayout(8, 1, 1), BatchLayout(2, 2, 2), BatchLayout(1, 2, 4), BatchLayout(4, 1, 2)]
)
def test_every_world_draws_the_same_positions_once(layout: BatchLayout) -> None:
    streams = [order.micro_batches(16, layout, rank, [(20, 26)]) for rank in range(layout.ranks)]
    for step in range(5):
        drawn = [next(stream).tolist() for stream in streams for _ in range(layout.accumulation)]
        assert {len(micro) for micro in drawn} == {layout.micro}
        start = [16, 30, 38, 46, 54][step]
        expected = [16, 17, 18, 19, 26, 27, 28, 29] if step == 0 else list(range(start, start + 8))
        assert list(chain(*drawn)) == expected, "each rank has one run of them"


SIZES = (3, 2, 3, 2, 5, 1, 4)


@pytest.mark.parametrize("window", [0, 1, 2, 3, 7, 100])
def test_each_epoch_holds_every_sample_once_window_by_window(window: int) -> None:
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    total = len(shard_of)
    samples = order.SampleOrder(5, SIZES, window).at(np.arange(4 * total)).reshape(4, total)
    for epoch in samples:
        assert sorted(epoch.tolist()) == list(range(total))
        # A window is a run of whole shards: walking the epoch, its shards are exhausted before others begin.
        width = window or len(SIZES)
        seen = list(dict.fromkeys(shard_of[epoch].tolist()))
        for start in range(0, len(SIZES), width):
            chosen = seen[start : start + width]
            count = sum(SIZES[shard] for shard in chosen)
            assert set(shard_of[epoch[:count]].tolist()) == set(chosen)
            epoch = epoch[count:]
    assert len({tuple(epoch.tolist()) for epoch in samples}) == 4, "every epoch has its own order"


def test_the_order_is_frozen() -> None:
    """The worked example of order.py; the order defines every run, so it may never change."""
    example = order.SampleOrder(0, (3, 2, 3, 2), 2)
    assert example.at(np.arange(20)).tolist() == [1, 8, 0, 9, 2, 7, 4, 5, 3, 6, 6, 3, 4, 5, 7, 2, 9, 1, 0, 8]


def test_any_position_is_found_alone_and_in_any_company() -> None:
    whole = order.SampleOrder(5, SIZES, 3).at(np.arange(200))
    generator = np.random.default_rng(0)
    for _ in range(50):
        chosen = generator.integers(0, 200, generator.integers(1, 30))
        assert order.SampleOrder(5, SIZES, 3).at(chosen).tolist() == whole[chosen].tolist()


def test_one_window_does_not_depend_on_how_the_shards_are_cut() -> None:
    """Perfect shuffle: the order of shards inside the one window is immaterial to its quality."""
    positions = np.arange(20_000)
    sharded = order.SampleOrder(1, [1000] * 20, 0).at(positions)
    assert np.abs(np.diff(sharded)).mean() == pytest.approx(20_000 / 3, rel=0.03)


def test_a_far_position_costs_what_a_near_one_does() -> None:
    """1.3 million samples in 1,300 shards, epoch 300: found at once, and the same as by walking there."""
    sizes = [1000] * 1300
    far = np.array([300 * 1_300_000 + 1_234_567])
    assert 0 <= order.SampleOrder(0, sizes, 64).at(far)[0] < 1_300_000
    nearby = np.arange(far[0] - 5, far[0] + 5)
    assert order.SampleOrder(0, sizes, 64).at(nearby)[5] == order.SampleOrder(0, sizes, 64).at(far)[0]


def collect(shards: Path, workers: int, layout: BatchLayout, position: int, steps: int) -> dict[int, tuple[bytes, int]]:
    """position -> (image bytes, label) over all ranks."""
    found: dict[int, tuple[bytes, int]] = {}
    config = DataConfig(path=str(shards), image_size=16, workers=workers)
    for rank in range(layout.ranks):
        loader = batches(config, locate(config), 3, layout, rank, position, ())
        for _ in range(steps * layout.accumulation):
            batch = next(loader)
            for image, label, place in zip(batch.images, batch.labels.tolist(), batch.positions.tolist(), strict=True):
                assert place not in found
                found[place] = (image.numpy().tobytes(), label)
    return found


def test_the_loader_gives_the_same_whatever_ranks_workers_and_micro_batch(shards: Path) -> None:
    whole = collect(shards, 0, BatchLayout(12, 1, 1), 0, 8)
    assert sorted(whole) == list(range(96))
    assert collect(shards, 2, BatchLayout(2, 2, 3), 0, 8) == whole
    resumed = collect(shards, 1, BatchLayout(6, 1, 2), 48, 4)
    assert resumed == {place: value for place, value in whole.items() if place >= 48}


def test_the_loader_agrees_with_stock_webdataset(shards: Path) -> None:
    """Every image and label of an epoch, as the stock pipeline reads them (flips undone by comparing both)."""
    index = read_index(shards)
    urls = [str(shards / shard.name) for shard in index.shards]
    stock = [
        (np.asarray(image).transpose(2, 0, 1), label)
        for image, label in webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls")
    ]
    assert len(stock) == index.samples
    ours = collect(shards, 0, BatchLayout(index.samples, 1, 1), 0, 1)
    samples = order.SampleOrder(3, [shard.samples for shard in index.shards], 0).at(np.arange(index.samples))
    flipped = 0
    for place, sample in enumerate(samples.tolist()):
        image, label = stock[sample]
        data, ours_label = ours[place]
        mirrored = data == np.ascontiguousarray(image[..., ::-1]).tobytes()
        assert data == image.tobytes() or mirrored
        assert ours_label == label
        flipped += mirrored
    assert 0.25 < flipped / index.samples < 0.75


def test_bytes_that_were_not_indexed_are_noticed(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    victim = folder / "shard-000000.tar"
    victim.write_bytes(bytes(victim.stat().st_size))
    config = DataConfig(path=str(folder), image_size=16, workers=1, max_replaced=0)
    reader = ShardReader(locate(config), config)
    with pytest.raises(InputError, match=r"shard-000000.tar: sample 0: its \d+ bytes at byte \d+ are not those that"):
        reader.read(0)
    whole_epoch = batches(config, locate(config), 0, BatchLayout(40, 1, 1), 0, 0, ())
    with pytest.raises(InputError, match=r"shard-00000\d.tar: sample \d+: .* are not those that were indexed"):
        next(whole_epoch)


def spoil(shards: Path, samples: list[int]) -> None:
    """Overwrite the first bytes of some samples' images."""
    index = read_index(shards)
    for sample in samples:
        shard, _, offset, *_ = RECORD.unpack_from((shards / TABLE_NAME).read_bytes(), sample * RECORD.size)
        with open(shards / index.shards[shard].name, "r+b") as file:
            file.seek(offset)
            file.write(bytes(8))


def test_damaged_samples_are_replaced_alike_everywhere(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    spoil(damaged, [3, 17, 30])
    clean = collect(shards, 0, BatchLayout(10, 1, 1), 0, 8)
    found = collect(damaged, 0, BatchLayout(10, 1, 1), 0, 8)
    assert sorted(found) == sorted(clean), "the position never moves"
    different = {place for place in clean if clean[place] != found[place]}
    sizes = [shard.samples for shard in read_index(shards).shards]
    expected = np.flatnonzero(np.isin(order.SampleOrder(3, sizes, 0).at(np.arange(80)), [3, 17, 30]))
    assert different == set(expected.tolist())
    mirrored = {
        (np.frombuffer(i, np.uint8).reshape(3, 16, 16)[..., ::-1].tobytes(), label) for i, label in clean.values()
    }
    assert {found[place] for place in different} <= set(clean.values()) | mirrored, "by images of the set"
    assert collect(damaged, 2, BatchLayout(1, 5, 2), 0, 8) == found, "on any topology"
    later = collect(damaged, 1, BatchLayout(5, 1, 2), 40, 4)
    assert later == {place: value for place, value in found.items() if place >= 40}, "and on resume"


def test_damaged_samples_are_named_and_bounded(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    spoil(damaged, [3, 17, 30])
    config = DataConfig(path=str(damaged), image_size=16, workers=0, max_replaced=3)
    whole = batches(config, locate(config), 3, BatchLayout(40, 1, 1), 0, 0, ())
    replaced = sorted(next(whole).replaced)
    assert [text.split(":")[1] for text in replaced] == [f" sample {n} (key {n:09d})" for n in (3, 17, 30)]
    with pytest.raises(
        InputError, match=r"not those that were indexed \(damaged sample number 6, data.max_replaced allows 3"
    ):
        next(whole)
    strict = DataConfig(path=str(damaged), image_size=16, workers=0, max_replaced=0)
    with pytest.raises(InputError, match=r"data.max_replaced allows 0"):
        next(batches(strict, locate(strict), 3, BatchLayout(40, 1, 1), 0, 0, ()))


def test_batches_are_what_they_say(shards: Path) -> None:
    config = DataConfig(path=str(shards), image_size=16, workers=0)
    batch = next(batches(config, locate(config), 0, BatchLayout(4, 1, 1), 0, 0, ()))
    assert isinstance(batch, Batch)
    assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (4, 3, 16, 16))
    assert (batch.labels.dtype, batch.positions.tolist()) == (torch.int64, [0, 1, 2, 3])
