"""What (seed, position) decides of a sample — order, flip, caption, replacement — with random numbers of our own."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.sources.image_text import ImageText
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.config import BatchLayout, DataConfig, FlowConfig
from megapix.data.arrays import Extras
from megapix.data.batch import Batch
from megapix.data.loader import MicroBatches, batches
from megapix.data.locate import locate
from megapix.data.order import Order, SampleOrder
from megapix.diffusion.flow import Draws, draw
from megapix.shards.image_policy import Policy
from megapix.shards.index import TABLE_NAME, ShardEntry, read_index
from megapix.shards.table import RECORD
from tests.support import random_numbers
from tests.support.stored import stored

SEED = 5
SIZES = [3, 5, 2, 7, 1]


def test_order_of_one_bucket() -> None:
    total = sum(SIZES)
    found = SampleOrder(SEED, SIZES, window=0).at(np.arange(3 * total)).tolist()
    assert found == [sample for number in range(3) for sample in random_numbers.epoch(SEED, SIZES, number)]


def test_each_bucket_has_an_order_of_its_own() -> None:
    """Two buckets of two and of three shards; a step of three samples holds one bucket."""
    shards = [ShardEntry("", size, 0, "", int(number > 1)) for number, size in enumerate(SIZES)]
    order, batch = Order(SEED, shards, 0, 1, 3), 3
    steps = [order.at(np.arange(step * batch, (step + 1) * batch)).tolist() for step in range(12)]
    for bucket, (first, sizes) in enumerate([(0, SIZES[:2]), (sum(SIZES[:2]), SIZES[2:])]):
        seed = random_numbers.bits(SEED, "bucket", bucket)
        line = [first + n for number in range(4) for n in random_numbers.epoch(seed, sizes, number)]
        found = [sample for step in steps if (step[0] >= sum(SIZES[:2])) == bool(bucket) for sample in step]
        assert len(found) > 6
        assert found == line[: len(found)], bucket


def read(data: MicroBatches, positions: list[int]) -> Batch:
    batch = data[np.array(positions)]
    assert isinstance(batch, Batch), batch
    return batch


def samples(shards: Path, epochs: int) -> list[int]:
    """Sample number at each position of some epochs."""
    sizes = [entry.samples for entry in read_index(shards).shards]
    return [n for number in range(epochs) for n in random_numbers.epoch(SEED, sizes, number)]


def test_order_and_flip_of_every_position(shards: Path) -> None:
    reading, order = DataConfig(path=str(shards), image_size=16), samples(shards, 2)
    images = [image for image, _ in stored(shards)]
    positions = list(range(1, 80, 3))
    found = read(MicroBatches(locate(reading), reading, SEED, 80), positions)
    for image, position in zip(found.images, positions, strict=True):
        mirrored = random_numbers.uniform(SEED, "flip", position) < 0.5
        expected = images[order[position]]
        assert torch.equal(image, expected.flip(-1) if mirrored else expected), position


def test_captions_by_weight_and_position(tmp_path: Path) -> None:
    """Nine images in nine greys, each with three captions of unequal weights."""
    weights = (1.0, 0.25, 2.5)
    (tmp_path / "images").mkdir()
    for number in range(9):
        Image.new("RGB", (16, 16), (20 * number,) * 3).save(tmp_path / "images" / f"{number}.png")
        texts = [{"text": f"{number} {kind}", "weight": weight} for kind, weight in zip("abc", weights, strict=True)]
        (tmp_path / "images" / f"{number}.json").write_text(json.dumps({"captions": texts}))
    options = Options(Policy.make("crop", 16), samples_per_shard=4)
    write(ImageText.open(tmp_path / "images"), tmp_path / "shards", options, workers=1, progress=False)
    reading = DataConfig(path=str(tmp_path / "shards"), image_size=16)
    positions = list(range(45))
    found = read(MicroBatches(locate(reading), reading, SEED, 45, Extras(captions=True)), positions)
    for image, caption, position in zip(found.images, found.captions, positions, strict=True):
        left = random_numbers.uniform(SEED, "caption", position) * sum(weights)
        kind = "a" if left < 1.0 else "b" if left < 1.25 else "c"
        assert caption == f"{image[0, 0, 0].item() // 20} {kind}", position
    assert {caption[-1] for caption in found.captions} == {"a", "b", "c"}


def test_workers_draw_times_dropout_and_keys(shards: Path) -> None:
    """Of each rank's own positions; a function and its options reach the worker's process."""
    reading = DataConfig(path=str(shards), image_size=16, workers=1)
    options = FlowConfig(t_mean=0.25, time_shift=2.0, label_dropout=0.4)
    extras, layout = Extras(draw=partial(draw, seed=SEED, config=options)), BatchLayout(5, 1, 3)
    dropped = list[bool]()
    for batch in islice(batches(reading, locate(reading), SEED, layout, 2, 30, (), extras), 4):
        found = Draws(*batch.draws)
        assert [part.dtype for part in found] == [torch.float32, torch.bool, torch.int64]
        for t, drop, key, position in zip(*(part.tolist() for part in found), batch.positions.tolist(), strict=True):
            z = NormalDist(0.25, 1.0).inv_cdf(random_numbers.uniform(SEED, "timestep", position))
            plain = 1 / (1 + math.exp(-z))
            assert abs(t - plain / (plain + (1 - plain) * 2.0)) < 1e-6
            assert drop == (random_numbers.uniform(SEED, "label_dropout", position) < 0.4)
            assert key % 2**64 == random_numbers.bits(SEED, "noise", position)
            dropped.append(drop)
    assert 2 <= sum(dropped) <= 18
    assert read(MicroBatches(locate(reading), reading, SEED, 15), [0]).draws == ()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_replacement_depends_on_seed_and_position_alone(
    rank: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second sample is damaged, so that many replacements are, too."""
    images, order = [image for image, _ in stored(shards)], samples(shards, 1)
    damaged = Path(shutil.copytree(shards, tmp_path / "shards"))
    index, table = read_index(damaged), (damaged / TABLE_NAME).read_bytes()
    for sample in range(0, 40, 2):
        shard, _, offset, *_ = RECORD.unpack_from(table, sample * RECORD.size)
        with open(damaged / index.shards[shard].name, "r+b") as file:
            file.seek(offset)
            file.write(bytes(8))
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    reading = replace(DataConfig(path=str(damaged), image_size=16), workers=0, flip=False)
    replaced = 0
    for batch in islice(batches(reading, locate(reading), SEED, BatchLayout(5, 2, 2), rank, 0, ()), 4):
        for image, position in zip(batch.images, batch.positions.tolist(), strict=True):
            shown = order[position]
            tries = [random_numbers.bits(SEED, "replacement", 8 * position + n) % 40 for n in range(8)]
            expected = shown if shown % 2 else next(sample for sample in tries if sample % 2)
            assert torch.equal(image, images[expected]), position
            replaced += shown != expected
    assert replaced > 5
