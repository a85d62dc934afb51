"""`data_prep merge`: folders prepared apart are one set, by the names of their classes, and no tar file is touched."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from megapix.config import BatchLayout, DataConfig
from megapix.data.loader import batches
from megapix.data.locate import locate
from megapix.data.read import ShardReader
from megapix.shards.index import read_index
from megapix.train.resolve import resolve
from tests.data_prep.test_index import index_of, run
from tests.data_prep.test_labels import tar
from tests.data_prep.test_write import hashes
from tests.shards.test_images import encoded
from tests.support.foreign_shards import captions, make
from tests.support.small_run import SMALL


def folder(root: Path, name: str, *classes: str, images: int = 3) -> Path:
    """A prepared folder: `images` images of a class; the red of an image is its class's place in `COLORS`."""
    for label in classes:
        (root / "src" / name / label).mkdir(parents=True)
        for n in range(images):
            color = (COLORS[label], 10 * n, len(name))
            Image.new("RGB", (16, 16), color).save(root / "src" / name / label / f"{name}{n}.png")
    assert run("write", root / "src" / name, root / name, "--size", 16, "--workers", 1) == 0
    return root / name


COLORS = {"cat": 10, "dog": 20, "ant": 30, "bee": 40, "0": 50, "1": 60, "2": 70}


def found(index: Path) -> list[tuple[str, int]]:
    """(name of the class, red of the image) of every sample, through the loader's reader and table."""
    config = DataConfig(path=str(index), image_size=16, flip=False, workers=0)
    located = locate(config)
    names = located.index.class_names
    batch = next(batches(config, located, 0, BatchLayout(located.index.samples, 1, 1), 0, 0, ()))
    return sorted((names[label], int(image[0, 0, 0])) for image, label in zip(batch.images, batch.labels, strict=True))


def test_classes_are_joined_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder(tmp_path, "a", "cat", "dog"), folder(tmp_path, "b", "ant", "cat")
    before = hashes(a), hashes(b)
    assert run("merge", a, b, "--out", tmp_path / "all") == 0
    assert (hashes(a), hashes(b)) == before
    index = read_index(tmp_path / "all")
    assert [(entry.name, entry.samples) for entry in index.classes] == [("cat", 6), ("dog", 3), ("ant", 3)]
    assert [entry.name for entry in index.files] == ["a/shard-000000.tar", "b/shard-000000.tar"]
    assert (index.base, index.samples) == ("..", 12)
    assert found(tmp_path / "all") == [("ant", 30)] * 3 + [("cat", 10)] * 6 + [("dog", 20)] * 3
    assert captions(tmp_path / "all") == captions(a) + captions(b)
    assert run("verify", tmp_path / "all", "--workers", 1) == 0
    assert run("inspect", tmp_path / "all") == 0
    said = capsys.readouterr().out
    assert "source       merged, .." in said
    assert "entries      12: 12 used, 0 rejected" in said
    assert run("merge", a, b, "--out", tmp_path / "all") == 0
    assert "was finished already" in capsys.readouterr().out
    moved = shutil.move(tmp_path, f"{tmp_path} moved")
    assert found(Path(moved) / "all") == [("ant", 30)] * 3 + [("cat", 10)] * 6 + [("dog", 20)] * 3


def test_verify_knows_the_parts_own_class_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder(tmp_path, "a", "cat", "dog"), folder(tmp_path, "b", "ant", "cat")
    assert run("merge", a, b, "--out", tmp_path / "all") == 0
    path = tmp_path / "all" / "index.json"
    about = json.loads(path.read_text())
    assert about["source"]["parts"][1]["labels"] == [2, 0]
    about["source"]["parts"][1]["labels"] = [0, 1]
    path.write_text(json.dumps(about))
    assert run("verify", tmp_path / "all", "--workers", 1) == 2
    assert capsys.readouterr().err.count("the class differs from samples.bin") == 6


def test_a_merged_index_grows_and_is_merged_again(tmp_path: Path) -> None:
    parts = [folder(tmp_path, "a", "cat"), folder(tmp_path, "b", "ant", "cat"), folder(tmp_path, "c", "bee")]
    assert run("merge", *parts[:2], "--out", tmp_path / "all") == 0
    first = read_index(tmp_path / "all").digest
    assert run("merge", *parts, "--out", tmp_path / "all") == 0
    assert read_index(tmp_path / "all").class_names == ("cat", "ant", "bee")
    assert read_index(tmp_path / "all" / "versions" / first[:16]).digest == first
    assert found(tmp_path / "all" / "versions" / first[:16]) == [("ant", 30)] * 3 + [("cat", 10)] * 6
    assert run("merge", parts[2], tmp_path / "all" / "versions" / first[:16], "--out", tmp_path / "again") == 0
    assert found(tmp_path / "again") == [("ant", 30)] * 3 + [("bee", 40)] * 3 + [("cat", 10)] * 6
    assert run("verify", tmp_path / "again", "--workers", 1) == 0


def test_indexes_with_buckets_and_captions(tmp_path: Path) -> None:
    """Entries are in the order of their buckets, and of the parts within one."""
    for name, tars, samples in (("one", 2, 7), ("two", 3, 6)):
        make(tmp_path / name / "tars", tars, samples)
        index_of(tmp_path / name / "tars", tmp_path / name / "index", "--policy", "buckets", "--bucket-step", 4)
    one, two = (read_index(tmp_path / name / "index") for name in ("one", "two"))
    assert run("merge", tmp_path / "one" / "index", tmp_path / "two" / "index", "--out", tmp_path / "all") == 0
    index = read_index(tmp_path / "all")
    expected = sorted(
        [(entry.bucket, 0, f"one/tars/{entry.name}", entry.samples) for entry in one.shards]
        + [(entry.bucket, 1, f"two/tars/{entry.name}", entry.samples) for entry in two.shards],
        key=lambda entry: entry[:2],
    )
    merged = [(entry.bucket, entry.name, entry.samples) for entry in index.shards]
    assert merged == [(bucket, name, samples) for bucket, _, name, samples in expected]
    whole: list[tuple[bytes, str]] = []
    for name in ("one", "two", "all"):
        place = tmp_path / name if name == "all" else tmp_path / name / "index"
        config = DataConfig(path=str(place), image_size=16)
        reader = ShardReader(locate(config), config)
        mine = [(reader.read(n).data, text) for n, text in enumerate(captions(place))]
        if name == "all":
            assert sorted(mine) == sorted(whole)
        whole += mine
    assert run("verify", tmp_path / "all", "--workers", 1) == 0


def test_what_cannot_be_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named, numbered = folder(tmp_path, "named", "cat", "dog"), folder(tmp_path, "numbered", "0", "1", "2")
    make(tmp_path / "captioned", labelled=False)
    index_of(tmp_path / "captioned", tmp_path / "captions")
    assert run("write", tmp_path / "captioned", tmp_path / "written", "--size", 16, "--workers", 1) == 0
    other = folder(tmp_path, "small", "bee")
    data = json.loads((other / "index.json").read_text())
    data["image_policy"] |= {"size": 8, "buckets": [[8, 8]]}
    (other / "index.json").write_text(json.dumps(data))
    copied = shutil.copytree(named, tmp_path / "copied")
    cases: list[tuple[list[Path], str]] = [
        ([named], "merge joins folders, but there is 1; expected PART PART… --out INDEX"),
        (
            [named, numbered],
            f"the classes of {str(named)!r} are names ('cat', 'dog'), those of {str(numbered)!r} numbers ",
        ),
        ([numbered, tmp_path / "written"], "written' none ('images'); they cannot be joined by name"),
        ([named, tmp_path / "captions"], "made with applied = 'preparation', those of"),
        ([named, other], "made with size = 16, those of"),
        ([named, copied], "are the same tar file; give each part once"),
        ([named, tmp_path / "missing"], "missing' does not exist"),
    ]
    for parts, words in cases:
        capsys.readouterr()
        assert run("merge", *parts, "--out", tmp_path / "all") == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert not (tmp_path / "all").exists()
    assert run("merge", named, numbered, "--out", named) == 2
    next(copied.glob("*.tar")).unlink()
    assert run("merge", copied, numbered, "--out", tmp_path / "all") == 2
    assert "is missing, but index.json lists it" in capsys.readouterr().err


def test_numbered_parts_and_unclassed_ones(tmp_path: Path) -> None:
    a, b = folder(tmp_path, "a", "0", "1"), folder(tmp_path, "b", "0", "1", "2")
    assert run("merge", a, b, "--out", tmp_path / "all") == 0
    classes = [(entry.name, entry.samples) for entry in read_index(tmp_path / "all").classes]
    assert classes == [("0", 6), ("1", 6), ("2", 3)]
    for name in ("c", "d"):
        make(tmp_path / name, 1, 4 + ord(name) % 2, labelled=False)
        index_of(tmp_path / name, tmp_path / f"index-{name}")
    assert run("merge", tmp_path / "index-c", tmp_path / "index-d", "--out", tmp_path / "both") == 0
    assert [(entry.name, entry.samples) for entry in read_index(tmp_path / "both").classes] == [("images", 9)]


def test_index_over_prepared_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their class numbers are each part's own: they are read by name, or not at all."""
    a, b, same = (
        folder(tmp_path, "a", "cat", "dog"),
        folder(tmp_path, "b", "ant", "cat"),
        folder(tmp_path, "c", "cat", "dog"),
    )
    pattern = f"{tmp_path}/{{a,b}}/shard-000000.tar"
    assert run("index", pattern, "--out", tmp_path / "all", "--size", 16, "--workers", 1) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"data_prep: error: the tar files of {str(a)!r} and {str(b)!r} number their classes each in their own way "
        "(cat, dog and ant, cat); join them by the names of their classes: data_prep merge PART… --out INDEX"
    )
    index_of(f"{tmp_path}/{{a,c}}/shard-000000.tar", tmp_path / "fine")
    assert [(entry.name, entry.samples) for entry in read_index(tmp_path / "fine").classes] == [("cat", 6), ("dog", 6)]
    (same / "index.json").unlink()
    assert run("index", f"{tmp_path}/{{a,c}}/shard-000000.tar", "--out", tmp_path / "x", "--size", 16) == 2
    assert "(cat, dog and without an index)" in capsys.readouterr().err


def test_a_run_starts_on_a_merged_index(tmp_path: Path) -> None:
    a, b = folder(tmp_path, "a", "cat", "dog"), folder(tmp_path, "b", "ant", "cat")
    assert run("merge", a, b, "--out", tmp_path / "all") == 0
    data = replace(SMALL.data, path=str(tmp_path / "all"))
    assert resolve(replace(SMALL, out=str(tmp_path / "run"), data=data), 1).located.index.samples == 12


def test_parts_are_read_as_each_was_indexed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels by name, by --classes and by number of the same class names; captions and images under other keys."""
    names = [b"dog", b"cat", b"ant", b"dog"]
    for part, keys in (("one", ("a.jpg", "b.jpg")), ("two", ("jpg", "seg.jpg"))):
        samples = {
            f"{n}": {
                key: encoded(Image.new("RGB", (16, 16), (10 * n, len(part), at)), "JPEG") for at, key in enumerate(keys)
            }
            | {"cls": names[n], "json": json.dumps({"long": f"{part} {n}", "caption": "no"}).encode()}
            for n in range(4)
        }
        tar(tmp_path / part / "tars" / "0.tar", samples)
    (tmp_path / "classes.txt").write_text("cow\ndog\nant\ncat\n")
    index_of(tmp_path / "one" / "tars", tmp_path / "one" / "index", "--image-key", "b.jpg", "--captions", "long")
    index_of(tmp_path / "two" / "tars", tmp_path / "two" / "index", "--classes", tmp_path / "classes.txt")
    assert run("merge", tmp_path / "one" / "index", tmp_path / "two" / "index", "--out", tmp_path / "all") == 0
    classes = [(entry.name, entry.samples) for entry in read_index(tmp_path / "all").classes]
    assert classes == [("ant", 2), ("cat", 2), ("dog", 4), ("cow", 0)]
    assert captions(tmp_path / "all") == ["one 0", "one 1", "one 2", "one 3", "no", "no", "no", "no"]
    assert run("verify", tmp_path / "all", "--workers", 1) == 0
    plain = {f"{n}": {"jpg": encoded(Image.new("RGB", (16, 16), (9, 9, n)), "JPEG"), "cls": b"cat"} for n in range(2)}
    tar(tmp_path / "three" / "tars" / "0.tar", plain)
    index_of(tmp_path / "three" / "tars", tmp_path / "three" / "index", "--icc", "ignore")
    capsys.readouterr()
    assert run("merge", tmp_path / "all", tmp_path / "three" / "index", "--out", tmp_path / "no") == 2
    assert "were made with icc = 'convert', those of" in capsys.readouterr().err
    path = tmp_path / "two" / "index" / "index.json"
    data = json.loads(path.read_text())
    del data["image_policy"]["version"]
    path.write_text(json.dumps(data))
    assert run("merge", tmp_path / "one" / "index", tmp_path / "two" / "index", "--out", tmp_path / "no") == 2
    assert "were made with version = 2, those of" in capsys.readouterr().err


def test_rare_buckets_of_the_parts_are_summed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, least, wide in (("a", 2, 1), ("b", 3, 2), ("c", 0, 4)):
        samples = {
            f"{part}{n}": {
                "png": encoded(Image.new("RGB", (24 if n < wide else 16, 12 if n < wide else 16), (n, 1, least)))
            }
            | {"cls": b"0"}
            for n in range(9)
        }
        tar(tmp_path / part / "tars" / "0.tar", samples)
        options = ("--policy", "buckets", "--bucket-step", 4, "--bucket-min", least)
        index_of(tmp_path / part / "tars", tmp_path / part / "index", *options)
    folders = [tmp_path / part / "index" for part in "abc"]
    assert run("merge", *folders, "--out", tmp_path / "all") == 0
    policy = read_index(tmp_path / "all").image_policy
    ((bucket, into, samples),) = policy["merged"]
    assert (policy["bucket_min"], samples) == (3, 3)
    assert (policy["buckets"][bucket], policy["buckets"][into]) == ([12, 24], [16, 16])
    assert "3 samples of bucket 24x12 are in 16x16 (--bucket-min 3)" in capsys.readouterr().out
    assert run("verify", tmp_path / "all", "--workers", 1) == 0
