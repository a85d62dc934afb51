"""`data_prep write` from tar files: what was listed is kept, and one that is lost takes no finished shard with it."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.listing.reading import Reading
from data_prep.lists import tar_lists
from data_prep.sources import open_source
from data_prep.writing import shard
from data_prep.writing import write as writing
from megapix.shards.index import read_index
from tests.data_prep.test_growing import cut, tars
from tests.data_prep.test_index import run
from tests.support.foreign_shards import captions


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tar file was listed."""
    counted: Counter[str] = Counter()
    samples_of = tar_lists.samples_of

    def counting(tar: Path, *rest: object) -> object:
        counted[tar.name] += 1
        return samples_of(tar, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tar_lists, "samples_of", counting)
    return counted


def write(source: Path, out: Path, *options: object) -> int:
    return run("write", source, out, "--size", 16, "--workers", 1, "--samples-per-shard", 5, *options)


def made(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_what_has_not_changed_is_not_listed_again(tmp_path: Path, listed: Counter[str]) -> None:
    theirs, out = tars(tmp_path / "theirs"), tmp_path / "out"
    assert write(theirs, out) == 0
    before = made(out)
    assert write(theirs, out) == 0
    assert set(listed.values()) == {1}
    os.utime(theirs / "00001.tar", ns=(1, 1))
    (out / "index.json").unlink()
    assert write(theirs, out) == 0
    assert listed == {"00000.tar": 1, "00001.tar": 2, "00002.tar": 1, "00003.tar": 1}
    shutil.copytree(theirs, tmp_path / "copied")
    assert write(tmp_path / "copied", out) == 0, "a copy has other times and the same samples"
    assert made(out) == before
    for path in (out / ".lists").glob("*.list"):
        path.write_bytes(path.read_bytes()[:-7])
    (out / "index.json").unlink()
    assert write(theirs, out) == 0, "a damaged list is made again"
    assert made(out) == before


def test_processes_list_what_one_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tars(tmp_path / "theirs", 5)
    cut(theirs / "00003.tar")
    monkeypatch.setattr(tar_lists, "AT_ONCE", 0)
    alone, both = (open_source(theirs, reading=Reading(workers=workers)) for workers in (1, 2))
    assert list(both.items) == list(alone.items)
    assert (both.classes, both.entries) == (alone.classes, alone.entries)


def cut_it(tar: Path) -> None:
    cut(tar)


def remove(tar: Path) -> None:
    tar.unlink()


def change(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    at = data.index(b"picture")
    data[at : at + 7] = b"another"
    tar.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut_it, "cannot be read any more"),
        (remove, "is not there any more"),
        (change, "has changed: it holds other samples"),
    ],
)
def test_a_tar_that_is_lost_leaves_finished_shards(
    spoil: Callable[[Path], None], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, out = tars(tmp_path / "theirs"), tmp_path / "out"
    assert write(theirs, out) == 0
    whole, every = made(out), set(captions(out))
    (out / "index.json").unlink()
    gone = ("shard-000002.tar", "shard-000005.tar")
    for name in gone:
        (out / name).unlink()
    spoil(theirs / "00002.tar")
    capsys.readouterr()
    assert write(theirs, out, "--max-rejected-tars", 0) == 2
    words = "1 of 4 tar files cannot be used, --max-rejected-tars 0 allows 0; the latest is '00002.tar'"
    assert words in capsys.readouterr().err
    assert write(theirs, out) == 0
    assert reason in capsys.readouterr().out
    now = made(out)
    finished = [name for name in whole if name.startswith("shard-") and name not in gone]
    assert {name: now[name] for name in finished} == {name: whole[name] for name in finished}
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert rejected
    assert all(line["source"].startswith("00002.tar/") and reason in line["reason"] for line in rejected)
    index, account = read_index(out), json.loads((out / "entries.json").read_text())
    assert index.samples == 32 - len(rejected)
    assert set(captions(out)) < every
    assert account["listed"] == account["used"] + account["rejected"] + account["parts"]
    assert now["plan.json"] == whole["plan.json"]
    assert write(theirs, out) == 0
    assert made(out) == now


def test_a_set_that_has_grown_is_refused_and_may_shrink_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, out = tars(tmp_path / "theirs", 3), tmp_path / "out"
    assert write(theirs, out) == 0
    tars(theirs, 4)
    assert write(theirs, out) == 2
    assert "was begun with samples = 24, this command has 32" in capsys.readouterr().err
    (theirs / "00003.tar").unlink()
    assert write(theirs, out) == 0


def test_nothing_is_kept_in_a_strangers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").touch()
    assert write(tars(tmp_path / "theirs", 1), tmp_path / "out") == 2
    assert "holds 'thesis.doc', which is not ours" in capsys.readouterr().err
    assert write(tmp_path / "theirs", tmp_path / "dry", "--dry-run") == 0
    assert [path.name for path in tmp_path.rglob("*") if path.name in (".lists", "dry")] == []


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose bytes were hashed, of those that were there already."""
    found: list[str] = []
    sha256_of = shard.sha256_of

    def counting(path: Path) -> str:
        if path.name.startswith("shard"):
            found.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(shard, "sha256_of", counting)
    monkeypatch.setattr(writing, "in_processes", lambda work, jobs, workers: ((job, work(job)) for job in jobs))
    return found


def test_finished_shards_are_hashed_only_if_asked_or_touched(
    tmp_path: Path, hashed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, out = tars(tmp_path / "theirs"), tmp_path / "out"
    assert write(theirs, out) == 0
    before = made(out)
    (out / "index.json").unlink()
    (out / "shard-000003.tar").unlink()
    assert write(theirs, out) == 0
    assert (made(out), hashed) == (before, [])
    os.utime(out / "shard-000001.tar")
    for _ in range(2):
        (out / "index.json").unlink()
        assert write(theirs, out) == 0
        assert (made(out), hashed) == (before, ["shard-000001.tar"]), "it is known from now on"
    assert write(theirs, out, "--rehash") == 0
    assert hashed[1:] == [f"shard-{n:06d}.tar" for n in range(7)]
    assert made(out) == before
    spoiled, about = out / "shard-000004.tar", (out / "shard-000004.tar").stat()
    data = bytearray(spoiled.read_bytes())
    data[700] ^= 1
    spoiled.write_bytes(data)
    os.utime(spoiled, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert write(theirs, out) == 0
    assert write(theirs, out, "--rehash") == 2
    assert "shard-000004.tar differs from what was written; delete it" in capsys.readouterr().err
    assert (out / "index.json").is_file()
