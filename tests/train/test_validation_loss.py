"""Held-out loss during training: what it measures, and that training does not notice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.write import write
from megapix import config, load_model, rng
from megapix.checkpoint.layout import PARTS
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.diffusion import noise
from megapix.errors import InputError
from megapix.rng import Purpose
from megapix.train.resolve import resolve
from tests.support.launch import succeed
from tests.support.made_shards import OPTIONS
from tests.support.small_run import SMALL, STEP_BATCH, arguments, flat_vectors, saved, scalars


@pytest.fixture(scope="module")
def held_out(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second image of the training set as a set of its own: 20 images, so two groups of 16 and 4."""
    root = tmp_path_factory.mktemp("held-out")
    for number, path in enumerate(sorted(image_folder.rglob("*.png"))):
        if number % 2:
            copy = root / "images" / path.relative_to(image_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    write(ImageFolder.open(root / "images"), root / "shards", OPTIONS, workers=1, progress=False)
    return root / "shards"


def by_hand(run: Path, ema: bool, held_out: Path) -> list[float]:
    """Mean squared error of the velocity at t = 1/16, 3/16, …, an image at a time, in a plain loop."""
    net = load_model(run, ema=ema)
    reading = replace(SMALL.data, path=str(held_out), flip=False)
    batches = MicroBatches(locate(reading), reading, seed=0, batch=16)
    sums = np.zeros(8)
    for position in range(20):
        batch = batches[np.array([position])]
        x = batch.images / 127.5 - 1
        keys = noise.keys_of(rng.bits(0, Purpose.VALIDATION_NOISE, np.array([position])))
        eps = noise.normal(keys, (3, 16, 16), x.device, SMALL.flow.generator)
        for i in range(8):
            t = torch.tensor([(2 * i + 1) / 16])
            with torch.no_grad():
                v = net(t * x + (1 - t) * eps, t, batch.labels)
            sums[i] += float(((v - (x - eps)) ** 2).mean())
    return list(sums / 20)


def test_it_measures_both_weights_and_training_does_not_notice(shards: Path, held_out: Path, tmp_path: Path) -> None:
    """Two ranks share two groups of images; a grid is drawn between the same steps; bf16 rounds masters to weights."""
    run, plain = tmp_path / "run", tmp_path / "plain"
    options = ["--validation.path", str(held_out), "--validation.samples", "0", "--log.samples-every", "16"]
    every, end = ["--validation.every", str(4 * STEP_BATCH)], ["--optim.end-at", str(12 * STEP_BATCH)]
    succeed(2, "megapix", arguments(shards, run, *options, *every, *end))
    succeed(2, "megapix", arguments(shards, plain, *end))
    assert list(scalars(run, "validation/loss_ema")) == [4, 8, 12]
    for kind in ("raw", "ema"):
        expected = by_hand(run, kind == "ema", held_out)
        found = [scalars(run, f"validation/{kind}_t_{(2 * i + 1) / 16:.4f}")[12] for i in range(8)]
        assert found == pytest.approx(expected, rel=1e-5)
        assert scalars(run, f"validation/loss_{kind}")[12] == pytest.approx(np.mean(expected), rel=1e-5)
    with_it, without = (flat_vectors(saved(path).folder) for path in (run, plain))
    assert all(torch.equal(with_it[part], without[part]) for part in PARTS)
    assert scalars(run, "loss/train") == scalars(plain, "loss/train")


@pytest.mark.long
def test_bf16_training_does_not_notice_either(shards: Path, held_out: Path, tmp_path: Path) -> None:
    """Weights come back from the masters after the EMA has stood in their place."""
    options = ["--precision", "bf16", "--optim.end-at", str(8 * STEP_BATCH)]
    watched = ["--validation.path", str(held_out), "--validation.every", "8", "--log.samples-every", "16"]
    succeed(2, "megapix", arguments(shards, tmp_path / "run", *options, *watched))
    succeed(2, "megapix", arguments(shards, tmp_path / "plain", *options))
    with_it, without = (flat_vectors(saved(tmp_path / name).folder) for name in ("run", "plain"))
    assert all(torch.equal(with_it[part], without[part]) for part in PARTS)


def test_what_is_no_held_out_set_is_refused(shards: Path, image_folder: Path, tmp_path: Path) -> None:
    asked = config.replace(config.replace(SMALL, "data.path", str(shards)), "out", str(tmp_path / "run"))

    def refused(key: str, value: object) -> str:
        with pytest.raises(InputError) as error:
            resolve(config.replace(asked, key, value), 1)
        return str(error.value)

    assert "is the training set: expected images that are not trained on" in refused("validation.path", str(shards))
    assert f"shard folder '{tmp_path / 'none'}' does not exist" in refused("validation.path", str(tmp_path / "none"))
    assert "validation.samples = -1: expected 0 (all) or more" in refused("validation.samples", -1)
    two = tmp_path / "two"
    for name in ("red", "blue"):
        (two / name).mkdir(parents=True)
        for path in (image_folder / name).glob("*.png"):
            (two / name / path.name).write_bytes(path.read_bytes())
    write(ImageFolder.open(two), tmp_path / "classes", OPTIONS, workers=1, progress=False)
    assert f"has other classes than {str(shards)!r}" in refused("validation.path", str(tmp_path / "classes"))
