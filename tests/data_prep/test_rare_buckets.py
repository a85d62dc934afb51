"""Aspect buckets with fewer samples than a batch: merged at preparation, or refused by a new run."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_prep import cli
from data_prep.writing import receipt
from data_prep.writing.survey import Rare
from megapix.cli import main as megapix
from megapix.shards.image_policy import Policy
from megapix.shards.index import read_index
from megapix.shards.table import Captions, Table
from tests.data_prep.test_sources import add
from tests.shards.test_images import encoded
from tests.support.small_run import arguments

SHAPES = [(16, 16)] * 9 + [(24, 12)] * 2 + [(20, 12)] * 8 + [(12, 24)] * 1 + [(12, 20)] * 3
BUCKETS = ("--size", 16, "--policy", "buckets", "--bucket-step", 4, "--workers", 1)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def picture(number: int) -> Image.Image:
    height, width = SHAPES[number]
    return Image.new("RGB", (width, height), (number, 7, 9))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for number in range(len(SHAPES)):
        picture(number).save(folder / f"{number:02d}.png")
    return tmp_path / "images"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    for tar in range(3):
        with tarfile.open(tmp_path / "tars" / f"{tar}.tar", "w") as file:
            for number in range(tar, len(SHAPES), 3):
                add(file, f"{number:02d}.png", encoded(picture(number)))
                add(file, f"{number:02d}.cls", b"0")
                add(file, f"{number:02d}.txt", b"number %d" % number)
    return tmp_path / "tars"


def counted(folder: Path) -> dict[str, int]:
    """Samples of each size, as 'WIDTHxHEIGHT'."""
    index, counts = read_index(folder), Counter[str]()
    for shard in index.shards:
        height, width = index.image_policy["buckets"][shard.bucket]
        counts[f"{width}x{height}"] += shard.samples
    return dict(counts)


ALL = {"12x24": 2, "12x20": 8, "16x16": 9, "20x12": 3, "24x12": 1}
MERGED = {"12x20": 10, "16x16": 13}
"""With at least 8: the tall ones go to the nearest, the wide ones to the square, the nearest of those that are left."""


def test_write_merges_rare_buckets(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("write", images, tmp_path / "all", *BUCKETS) == 0
    assert counted(tmp_path / "all") == ALL
    assert "the rarest bucket, 24x12, has 1 samples" in capsys.readouterr().out
    assert "bucket_min" not in json.loads((tmp_path / "all" / "plan.json").read_text())
    command = ("write", images, tmp_path / "merged", *BUCKETS, "--bucket-min", 8)
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert counted(tmp_path / "merged") == MERGED
    for line in (
        "2 samples of bucket 12x24 are in 12x20 (--bucket-min 8)",
        "3 samples of bucket 20x12 are in 16x16 (--bucket-min 8)",
        "1 samples of bucket 24x12 are in 16x16 (--bucket-min 8)",
        "the rarest bucket, 12x20, has 10 samples",
    ):
        assert line in said
        assert run("inspect", tmp_path / "merged") == 0
        assert line in capsys.readouterr().out
    assert run("verify", tmp_path / "merged", "--workers", 1) == 0
    assert run("write", images, tmp_path / "merged", *BUCKETS) == 2
    assert "was begun with bucket_min = 8, this command has None" in capsys.readouterr().err
    (tmp_path / "merged" / "index.json").unlink()
    assert run(*command) == 0, "from receipts and the survey"
    assert counted(tmp_path / "merged") == MERGED
    assert run("write", images, tmp_path / "x", "--size", 16, "--bucket-min", 8) == 2
    assert "--bucket-min = 8: expected 0 or more, with --policy buckets" in capsys.readouterr().err


def test_index_merges_them_when_it_knows_all(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", tars, "--out", tmp_path / "all", *BUCKETS) == 0
    assert counted(tmp_path / "all") == ALL
    assert run("index", tars, "--out", tmp_path / "merged", *BUCKETS, "--bucket-min", 8) == 0
    assert "3 samples of bucket 20x12 are in 16x16 (--bucket-min 8)" in capsys.readouterr().out
    assert counted(tmp_path / "merged") == MERGED
    index = read_index(tmp_path / "merged")
    assert Counter(shard.name for shard in index.shards) == {f"{n}.tar": 2 for n in range(3)}, (
        "an entry for each bucket"
    )
    names = [name for shard in index.shards for name in [shard.name] * shard.samples]
    for record, name in zip(Table(tmp_path / "merged", index).rows(), names, strict=True):
        assert index.shards[record.shard].name == name
    assert run("verify", tmp_path / "merged", "--workers", 1) == 0


@pytest.mark.parametrize("options", [(), ("--bucket-min", 8), ("--hold-out", 9)], ids=["all", "merged", "held out"])
def test_rows_of_several_buckets_and_tar_files(options: tuple[object, ...], tars: Path, tmp_path: Path) -> None:
    """Each with its own image, size, class and caption, in the order of its tar file."""
    assert run("index", tars, "--out", tmp_path / "index", *BUCKETS, *options) == 0
    found = list[int]()
    for folder in [tmp_path / "index", *([tmp_path / "index-held-out"] if "--hold-out" in options else [])]:
        index = read_index(folder)
        captions, order = Captions(folder, index), list[tuple[int, str, int]]()
        for place, record in enumerate(Table(folder, index).rows()):
            entry = index.shards[record.shard]
            data = (tars / entry.name).read_bytes()[record.offset : record.offset + record.size]
            image = Image.open(io.BytesIO(data))
            number = image.getpixel((0, 0))[0]  # type: ignore[index]
            assert (image.size, record.label) == (picture(number).size, 0)
            assert [caption.text for caption in captions.of(place)] == [f"number {number}"]
            order.append((entry.bucket, entry.name, number))
            found.append(number)
        assert order == sorted(order)
        entries = [(entry.bucket, entry.name, entry.samples) for entry in index.shards]
        assert entries == [(*entry, count) for entry, count in sorted(Counter(one[:2] for one in order).items())]
    assert sorted(found) == list(range(len(SHAPES)))


def test_a_receipt_is_read_as_often_as_with_one_bucket(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = Counter[object](), receipt.load

    def counted(out: Path, part: receipt.Part) -> receipt.Receipt | None:
        loaded[out.name, part] += 1
        return load(out, part)

    monkeypatch.setattr(receipt, "load", counted)
    assert run("index", tars, "--out", tmp_path / "one", "--size", 16, "--workers", 1) == 0
    assert run("index", tars, "--out", tmp_path / "five", *BUCKETS) == 0
    assert loaded == {(folder, f"{tar}.tar"): 2 for folder in ("one", "five") for tar in range(3)}


def test_where_buckets_go() -> None:
    policy = Policy.make("buckets", 16, 4)
    assert policy.buckets == ((24, 12), (20, 12), (16, 16), (12, 20), (12, 24))
    assert Rare.below(0, Counter({0: 1, 4: 2}), policy).into == {}
    assert Rare.below(5, Counter({0: 1, 2: 9, 4: 2}), policy).into == {0: 2, 4: 2}
    assert Rare.below(5, Counter({0: 1, 1: 4, 4: 9}), policy).into == {0: 4, 1: 4}, "never into one that is rare itself"
    assert Rare.below(50, Counter({0: 1, 1: 4, 4: 4}), policy).into == {0: 1, 4: 1}, "none has enough: the largest"
    assert Rare.below(5, Counter({1: 7, 2: 1, 3: 7}), policy).into == {2: 1}, "the first of equals"


def test_a_new_run_refuses_rare_buckets(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line before the first step; an index of an older version is used as it was."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run("write", images, tmp_path / "all", *BUCKETS) == 0
    command = [*arguments(tmp_path / "all", tmp_path / "run", "--model.num-classes", "1", "--dry-run")]
    assert megapix.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the aspect bucket 24x12 has 1 samples, fewer than optim.global_batch = 8" in error
    assert "prepare it with data_prep … --bucket-min 8, or give --data.repeat-rare-buckets" in error
    assert not (tmp_path / "run").exists()
    assert megapix.main([*command, "--data.repeat-rare-buckets"]) == 0
    path = tmp_path / "all" / "index.json"
    index = json.loads(path.read_text())
    del index["image_policy"]["version"]
    path.write_text(json.dumps(index))
    assert megapix.main(command) == 0
    assert run("write", images, tmp_path / "merged", *BUCKETS, "--bucket-min", 8) == 0
    assert (
        megapix.main([*arguments(tmp_path / "merged", tmp_path / "run", "--model.num-classes", "1", "--dry-run")]) == 0
    )
