"""What is stored beside the sets of a mix is found for each: captions, features of captions, features of images."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megapix import config as configuration
from megapix.conditioning.text_source import read_prompts, text_of
from megapix.config import DataConfig
from megapix.data.arrays import Extras
from megapix.data.batch import Batch
from megapix.data.loader import MicroBatches
from megapix.data.mix.located import LocatedMix, find, order_of
from megapix.data.mix.order import MixOrder
from megapix.errors import InputError
from megapix.shards.image_features import FeatureReader, read_features
from megapix.shards.index import INDEX_NAME, read_index
from megapix.shards.table import Captions
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import read_text_features
from megapix.train.resolve import _features
from tests.support.small_run import SMALL

OLD = Path(__file__).parent / "v0_1"
STEP = 6


def again(folder: Path, out: Path, **changes: object) -> Path:
    """A copy of a data set that is another one, by what its index says of its source."""
    shutil.copytree(folder, out)
    data = json.loads((out / INDEX_NAME).read_text())
    data["source"] |= {"again": True}
    data = {key: value for key, value in (data | changes).items() if value is not None}
    (out / INDEX_NAME).write_text(json.dumps(data))
    return out


def mixed(path: Path, *sets: dict[str, Any]) -> DataConfig:
    path.write_text(json.dumps({"format": "megapix-mix", "version": 1, "sets": [{"weight": 1, **s} for s in sets]}))
    return DataConfig(path=str(path), image_size=16, flip=True, workers=0)


def read(config: DataConfig, data: LocatedMix, extras: Extras, steps: int) -> list[tuple[int, int, Batch]]:
    """(set, sample in it, batch of that sample alone) at the positions of some steps."""
    order, batches = order_of(data, config, 3, STEP), MicroBatches(data, config, 3, STEP, extras)
    assert isinstance(order, MixOrder)
    found = []
    for position in range(steps * STEP):
        (sample,) = order.at(np.array([position])).tolist()
        batch = batches[np.array([position])]
        assert isinstance(batch, Batch)
        found.append((*data.place(sample), batch))
    return found


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., DataConfig]:
    """A mix of the text set of 0.1, and of one like it without features of its captions."""
    other = again(OLD / "text", tmp_path / "other", text=None)
    return lambda **more: mixed(tmp_path / "mix.json", {"path": str(OLD / "text")}, {"path": str(other), **more})


def test_captions_of_each_set(pairs: Callable[..., DataConfig]) -> None:
    for shown in ("first", "none"):
        config = pairs(captions=shown)
        data = find(config)
        assert isinstance(data, LocatedMix)
        captions = Captions(OLD / "text", read_index(OLD / "text"))
        sets, several = set(), 0
        for number, sample, batch in read(config, data, Extras(captions=True), 12):
            texts = [caption.text for caption in captions.of(sample)]
            expected = texts if number == 0 else texts[:1] if shown == "first" else [""]
            assert batch.captions[0] in expected
            several += number == 0 and batch.captions[0] != texts[0]
            sets.add(number)
        assert sets == {0, 1}
        assert several, "of the first set any caption may be chosen"


def test_text_features_of_each_set(pairs: Callable[..., DataConfig]) -> None:
    """Those of the caption that is shown; the set that shows none has the empty caption's."""
    config = pairs(captions="none")
    data, index = find(config), read_index(OLD / "text")
    stored = read_text_features(OLD / "text", index)
    assert isinstance(data, LocatedMix)
    assert stored
    recipe = {"max_tokens": stored.recipe.max_tokens, "scale": stored.recipe.scale, "dtype": stored.recipe.dtype}
    asked = replace(SMALL, data=config, text=replace(SMALL.text, **recipe))
    asked = configuration.replace(asked, "model.text_width", stored.recipe.width)
    source, reader = text_of(asked, data, None), TextFeatureReader(stored)
    assert source.digest == stored.recipe.digest
    assert source.captions[3] == Captions(OLD / "text", index).of(3)[0].text
    shown = read(config, data, Extras(captions=True), 8)
    for (number, sample, batch), (*_, told) in zip(read(config, data, source.extras(None), 8), shown, strict=True):
        assert batch.text
        texts = [caption.text for caption in Captions(OLD / "text", index).of(sample)]
        expected = reader.empty() if number else reader.read(sample, texts.index(told.captions[0]))
        assert torch.equal(batch.text[0][0].view(torch.int16), torch.from_numpy(expected.copy()))
    with pytest.raises(InputError, match=r"other' holds no text features: give text.encoder, or store them"):
        text_of(asked, find(pairs()), None)


def test_a_set_without_captions_is_refused(tmp_path: Path) -> None:
    """Or it shows the empty one, where the mix file says so."""
    captioned, plain = OLD / "text", again(OLD / "text", tmp_path / "plain")
    (plain / "captions.bin").write_bytes(b"")
    index = json.loads((plain / INDEX_NAME).read_text())
    (plain / INDEX_NAME).write_text(json.dumps(index | {"captions_sha256": hashlib.sha256(b"").hexdigest()}))
    data = find(mixed(tmp_path / "mix.json", {"path": str(captioned)}, {"path": str(plain)}))
    asked = configuration.replace(SMALL, "model.text_width", 24)
    with pytest.raises(InputError, match=r"plain' has no captions.*with \"captions\": \"none\" in the mix file"):
        text_of(asked, data, None)


def test_image_features_of_each_set(tmp_path: Path) -> None:
    """Found by the digest of the set's data, whatever the folders are called."""
    other = again(OLD / "classes", tmp_path / "other")
    config = mixed(tmp_path / "mix.json", {"path": str(OLD / "classes")}, {"path": str(other), "weight": 2})
    shutil.copytree(OLD / "features-fp32", tmp_path / "features" / "y")
    data = find(config)
    assert isinstance(data, LocatedMix)
    asked = replace(SMALL, data=config, repa=replace(SMALL.repa, features=str(tmp_path / "features"), dtype="fp32"))
    with pytest.raises(InputError, match=rf"no folder with the features of '{other}'; make them with"):
        _features(asked, data)
    shutil.copytree(OLD / "features-fp32", tmp_path / "features" / "x")
    before, now = (read_index(folder).digest.encode() for folder in (OLD / "classes", other))
    for path in (tmp_path / "features" / "x").iterdir():
        path.write_bytes(path.read_bytes().replace(before, now))
    features = _features(asked, data)
    reader = FeatureReader(read_features(OLD / "features-fp32", read_index(OLD / "classes")))
    sets = set()
    for number, sample, batch in read(config, data, Extras(features), 8):
        assert batch.features is not None
        both = [torch.from_numpy(reader.read(sample, mirrored).copy()) for mirrored in (False, True)]
        assert any(torch.equal(batch.features[0], one) for one in both)
        sets.add(number)
    assert sets == {0, 1}


def test_a_damaged_sample_is_replaced_by_one_of_its_set(tmp_path: Path) -> None:
    other = again(OLD / "classes", tmp_path / "other")
    config = mixed(tmp_path / "mix.json", {"path": str(OLD / "classes")}, {"path": str(other)})
    tars = sorted(other.glob("*.tar"))
    data = bytearray(tars[0].read_bytes())
    data[:] = bytes(len(data))
    tars[0].write_bytes(data)
    located = find(config)
    assert isinstance(located, LocatedMix)
    batches, order = MicroBatches(located, config, 3, STEP), order_of(located, config, 3, STEP)
    replaced = 0
    for position in range(42):
        batch = batches[np.array([position])]
        assert isinstance(batch, Batch)
        assert all(f"{tars[0]}: sample" in fault for fault in batch.replaced)
        first, count = order.among(int(order.at(np.array([position]))[0]))
        assert (first, count) in ((0, 21), (21, 21))
        replaced += len(batch.replaced)
    assert replaced == 9, "each of the shard's samples once in an epoch"


def test_what_takes_one_folder_says_so(tmp_path: Path) -> None:
    mix = Path(mixed(tmp_path / "mix.json", {"path": str(OLD / "text")}).path)
    with pytest.raises(InputError, match="is a mix file: expected a text file of prompts, or one shard folder"):
        read_prompts(mix, "--prompts")
    with pytest.raises(InputError, match="is a mix file: expected one shard folder"):
        read_index(mix)
