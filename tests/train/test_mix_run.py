"""Runs on a mix: loaders on any topology, weights that change with a resume, limits that end a run, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.write import write
from megapix.checkpoint.folder import latest
from megapix.checkpoint.manifest import read_state
from megapix.config import BatchLayout, DataConfig
from megapix.data.loader import batches
from megapix.data.locate import locate
from megapix.data.mix.located import LocatedMix, find
from megapix.data.mix.order import Stretch
from megapix.shards.index import read_index
from tests.support.launch import succeed
from tests.support.made_shards import OPTIONS
from tests.support.small_run import arguments, refused, scalars

STEP = 24


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second set: 11 images of classes grey and red, which the first has, too."""
    root, generator = tmp_path_factory.mktemp("other"), np.random.default_rng(1)
    for number in range(11):
        (root / "src" / ("red", "grey")[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "src" / ("red", "grey")[number % 2] / f"{number}.png")
    write(ImageFolder.open(root / "src"), root / "other", OPTIONS, workers=1, progress=False)
    return root / "other"


def mix_of(path: Path, *sets: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"format": "megapix-mix", "version": 1, "sets": sets}))
    return path


def test_real_loaders_on_changing_worlds_and_workers(shards: Path, other: Path, tmp_path: Path) -> None:
    """40 and 11 images at 1 : 3, 24 a step: each image is there as often as it should be, with the mix's classes."""
    mix = mix_of(tmp_path / "mix.json", {"path": str(shards), "weight": 1}, {"path": str(other), "weight": 3})
    known: list[dict[bytes, str]] = []
    for folder in (shards, other):
        alone = DataConfig(path=str(folder), image_size=16, flip=False, workers=0)
        index = (located := locate(alone)).index
        batch = next(batches(alone, located, 0, BatchLayout(index.samples, 1, 1), 0, 0, ()))
        names = [index.class_names[label] for label in batch.labels.tolist()]
        known.append({image.numpy().tobytes(): name for image, name in zip(batch.images, names, strict=True)})
    drawn: tuple[list[bytes], list[bytes]] = ([], [])
    topologies = [(1, 0), (2, 1), (3, 0), (8, 0), (1, 2), (2, 0)]
    for step, (world, workers) in enumerate(topologies):
        config = DataConfig(path=str(mix), image_size=16, flip=False, workers=workers)
        data, found = find(config), dict[int, tuple[bytes, int]]()
        assert data.index.samples == 51
        assert data.index.class_names == ("blue", "green", "red", "grey")
        for rank in range(world):
            batch = next(batches(config, data, 3, BatchLayout(STEP // world, 1, world), rank, step * STEP, ()))
            for image, label, place in zip(batch.images, batch.labels.tolist(), batch.positions.tolist(), strict=True):
                found[place] = image.numpy().tobytes(), label
        assert sorted(found) == list(range(step * STEP, (step + 1) * STEP))
        for place in sorted(found):
            pixels, label = found[place]
            number = int(pixels in known[1])
            assert data.index.class_names[label] == known[number][pixels]
            drawn[number].append(pixels)
    assert list(map(len, drawn)) == [36, 108]
    for some, images in zip(drawn, known, strict=True):
        for epoch in range(len(some) // len(images)):
            assert set(some[epoch * len(images) : (epoch + 1) * len(images)]) == set(images)


def test_a_run_whose_weights_change_and_which_its_limits_end(
    shards: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"path": str(shards), "weight": 0.75, "name": "a"}
    mix, run = mix_of(tmp_path / "mix.json", first, {"path": str(other), "weight": 0.25, "name": "b"}), tmp_path / "run"
    asked = arguments(mix, run, "--model.num-classes", "4", "--checkpoint.every", "40", "--optim.lr-step-at", "never")
    said = succeed(2, "megapix", [*asked, "--optim.end-at", "40"])[0].out
    assert "mix of 2 sets; an epoch ('1ep') is all their samples, 51 images" in said
    assert "a: 75.00% of the samples, 40 images" in said
    state = read_state(run / latest(run))
    assert state.sets == (read_index(shards).digest, read_index(other).digest)
    assert state.weights == ((0, (3, 1), (None, None)),)
    assert [scalars(run, f"data/share/{name}")[5] for name in "ab"] == [0.75, 0.25]
    assert [scalars(run, f"data/epoch/{name}")[5] for name in "ab"] == pytest.approx([30 / 40, 10 / 11])

    # Other weights and limits: from the resume on, 10 images of the first set are left and 23 of the second.
    mix_of(mix, first | {"weight": 1, "repeat": 1}, {"path": str(other), "weight": 1, "name": "b", "repeat": 3})
    said = succeed(1, "megapix", asked)[0].out
    assert "weight of a: 0.75 -> 0.5, from position 40 on" in said
    assert "repeat of b: none -> 3, from position 40 on" in said
    assert f"finished: 72 images seen; {latest(run)}; every set of" in said
    state = read_state(run / latest(run))
    assert state.counters.position == 72, "one image is left: no step"
    assert state.weights == ((0, (3, 1), (None, None)), (40, (1, 1), (1, 3)))
    assert scalars(run, "data/share/a")[6] == scalars(run, "data/share/b")[6] == 0.5
    assert scalars(run, "data/epoch/a")[9] == 1.0
    assert scalars(run, "data/epoch/b")[9] == pytest.approx(32 / 11)
    assert "is finished: 72 images seen" in succeed(1, "megapix", asked)[0].out

    # What cannot be changed, in one line each.
    third = {"path": str(tmp_path / "third"), "weight": 0}
    images, third_options = ImageFolder.open(other.parent / "src"), replace(OPTIONS, seed=9)
    write(images, tmp_path / "third", third_options, workers=1, progress=False)
    two = [first, {"path": str(other), "weight": 1, "name": "b"}]
    for sets, expected in (
        ([two[1], two[0]], "in another order: a, b"),
        ([two[0]], "was trained on a mix of 2 sets, and"),
        ([*two, third], "/third' in"),
        ([first | {"classes": {"blue": "sky"}}, two[1]], "with other classes or captions of the sets"),
    ):
        mix_of(mix, *sets)
        line = refused(asked, capsys)
        assert expected in line
        assert ("--init" in line) == ("order" not in expected)
    assert "is no mix file" in refused([*arguments(shards, run)], capsys)


def test_what_a_run_refuses_of_a_mix(
    shards: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = mix_of(tmp_path / "mix.json", {"path": str(shards), "weight": "much"})
    assert "weight = 'much': expected a number" in refused(arguments(mix, tmp_path / "run"), capsys)
    mix_of(mix, {"path": str(shards), "weight": 1}, {"path": f"{shards}/", "weight": 1})
    assert "is there twice" in refused(arguments(mix, tmp_path / "run"), capsys)
    mix_of(mix, {"path": str(shards), "weight": 1})
    asked = arguments(mix, tmp_path / "run", "--validation.path", str(mix))
    assert "validation.path" in (line := refused(asked, capsys))
    assert "is a mix file" in line
    assert "does not exist; make one with 'data_prep mix" in refused(arguments(tmp_path / "no.json", tmp_path), capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_alone_is_what_it_was(shards: Path, tmp_path: Path) -> None:
    """No key of a mix is in its checkpoint, and its order is that of its samples."""
    config = DataConfig(path=str(shards), image_size=16)
    assert find(config) == locate(config)
    succeed(1, "megapix", arguments(shards, tmp_path / "run", "--optim.end-at", "8", "--checkpoint.every", "8"))
    state = json.loads((tmp_path / "run" / latest(tmp_path / "run") / "state.json").read_text())
    assert not {"sets", "weights"} & set(state)


def test_a_mix_of_one_set(other: Path, tmp_path: Path) -> None:
    config = DataConfig(path=str(mix_of(tmp_path / "mix.json", {"path": str(other), "weight": 2})), image_size=16)
    data = find(config)
    assert isinstance(data, LocatedMix)
    assert data.weights == (Stretch(0, (1,), (None,)),)
    assert data.index.digest != read_index(other).digest
