"""More tar files than are looked at at every start: once on a node, and again where one has come or gone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.data_scale import make
from megapix.config import DataConfig
from megapix.data import locate as locating
from megapix.data.locate import MANY, locate
from megapix.errors import InputError
from megapix.shards.index import shard_name

CUT, GONE = 1500, 700


def test_many_tar_files_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, config = tmp_path / "set", DataConfig(path=str(tmp_path / "set"), image_size=8)
    make(folder, MANY + 1, 1)
    assert locate(config).faults == ()

    size = (folder / shard_name(CUT)).stat().st_size
    os.truncate(folder / shard_name(CUT), 100)
    assert locate(config).faults == (), "nobody looks at them: this one is found when it is read"
    with monkeypatch.context() as few:
        few.setattr(locating, "MANY", MANY + 1)
        with pytest.raises(InputError, match=rf"{shard_name(CUT)} has 100 bytes, but index.json lists {size}"):
            locate(config)

    (folder / shard_name(GONE)).unlink()  # the folder tells that something is new
    with pytest.raises(InputError, match=rf"{shard_name(GONE)} is missing, but index.json lists it"):
        locate(config)
    for _ in range(2):  # faults are not stamped
        one, other = locate(replace(config, corrupt_shard="replace")).faults
        assert f"{shard_name(GONE)} is missing" in one
        assert f"{shard_name(CUT)} has 100 bytes" in other

    for number in (GONE, CUT):
        with open(folder / shard_name(number), "wb") as file:
            file.truncate(size)
    assert locate(config).faults == ()


def test_few_tar_files_are_always_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, config = tmp_path / "set", DataConfig(path=str(tmp_path / "set"), image_size=8)
    make(folder, 20, 1)
    assert locate(config).faults == ()
    os.truncate(folder / shard_name(7), 100)
    with pytest.raises(InputError, match=rf"{shard_name(7)} has 100 bytes"):
        locate(config)
