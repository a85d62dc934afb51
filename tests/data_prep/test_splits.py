"""Splits that lie in one folder are not mixed, and --hold-out makes two folders that share nothing and lack nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.listing.base import Entries
from data_prep.listing.reading import Reading
from data_prep.listing.splits import check_split, of_split, split_of
from data_prep.sources import open_source
from data_prep.writing.held_out import place_of
from megapix.errors import InputError
from megapix.shards.index import read_index
from tests.data_prep.test_labels import adds_up, tar
from tests.data_prep.test_metadata import tar_of
from tests.data_prep.test_several_captions import png, refused, run
from tests.shards.test_images import encoded
from tests.support.foreign_shards import captions


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("TRAIN_0.tar", "train"),
        ("train.parquet", "train"),
        ("train00001.tar", "train"),
        ("data/validation-0.parquet", "validation"),
        ("val.tar", "validation"),
        ("valid_3.tar", "validation"),
        ("dev-0.tar", "validation"),
        ("test-0.tar", "test"),
        ("plain_text/test/0000.parquet", "test"),
        ("Train/val-crops.parquet", "train"),
        ("val2017/cat.png", "validation"),
        ("trainer-0.tar", None),
        ("testimony.parquet", None),
        ("00000.tar", None),
        ("train_station/0.png", None),
        ("my-train-0.tar", None),
    ],
)
def test_splits_by_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


NAMES = ["test-0.tar", "train-0.tar", "train-1.tar", "val-0.tar"]


def test_one_split_of_several() -> None:
    entries = Entries()
    assert of_split(NAMES, "", entries, "here") == (NAMES[1:3], {"split": "train"})
    assert entries.passed == {"split test": 1, "split validation": 1}
    assert entries.listed == 2
    assert entries.remarks == [
        "split train alone is taken (files: train 2, validation 1, test 1); --split takes another one"
    ]
    assert of_split(NAMES, check_split("dev"), Entries(), "here") == (["val-0.tar"], {"split": "validation"})
    assert of_split(NAMES, "all", (everything := Entries()), "here") == (NAMES, {})
    assert everything == Entries()
    with pytest.raises(InputError, match=r"here: there is no split 'validation', expected .* there: train 2, test 1"):
        of_split(NAMES[:3], "validation", Entries(), "here")
    with pytest.raises(InputError, match=r"here holds several splits and no train .files: validation 1, test 1."):
        of_split(["test-0.tar", "val-0.tar"], "", Entries(), "here")
    with pytest.raises(InputError, match=r"--split = 'trian' is not the name of a split .did you mean 'train'"):
        check_split("trian")


def test_what_is_no_split() -> None:
    for names in (["train-0.tar", "train-1.tar"], ["test-0.tar"], ["0.tar", "1.tar"], []):
        entries = Entries()
        assert of_split(names, "", entries, "here") == (names, {})
        assert entries == Entries()
    entries = Entries()
    assert of_split([*NAMES, "extra.tar"], "", entries, "here") == ([*NAMES, "extra.tar"], {})
    assert "some files are named as splits are (train 2, validation 1, test 1), others are not" in entries.remarks[0]
    assert of_split([*NAMES, "extra.tar"], "test", entries, "here")[0] == ["test-0.tar"]
    assert entries.passed["no split"] == 1


def pictures(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def test_a_tree_of_splits(tmp_path: Path) -> None:
    names = ["train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png", "val/readme.md", "LICENSE.txt"]
    source = open_source(pictures(tmp_path / "in", names))
    assert source.classes == ("cat", "dog")
    assert [item.name for item in source.items] == ["cat/0.png", "dog/1.png"]
    assert source.about == {"kind": "image folder", "split": "train"}
    assert source.entries.passed == {"split validation": 3, ".txt": 1}
    assert source.entries.listed == 6
    assert source.reader.read(source.items[1], 16) == png(1)
    other = open_source(tmp_path / "in", reading=Reading(split="validation"))
    assert [other.reader.read(item, 16) for item in other.items] == [png(2), png(3)]
    assert open_source(tmp_path / "in", reading=Reading(split="all")).classes == ("train", "val")


def test_captioned_images_of_splits(tmp_path: Path) -> None:
    names = ["train/0.png", "train/1.png", "val/2.png"]
    for name in pictures(tmp_path / "in", names).rglob("*.png"):
        name.with_suffix(".txt").write_text(f"no {name.stem}")
    source = open_source(tmp_path / "in")
    assert {item.name: item.caption for item in source.items} == {"train/0.png": "no 0", "train/1.png": "no 1"}
    assert source.about == {"kind": "image-text pairs", "split": "train"}
    assert source.entries.passed == {"split validation": 1, "text of another split": 1}
    assert (source.entries.listed, source.entries.parts) == (6, 2)
    (other,) = open_source(tmp_path / "in", reading=Reading(split="validation")).items
    assert other.caption == "no 2"


def test_a_class_called_test(tmp_path: Path) -> None:
    source = open_source(pictures(tmp_path / "in", ["cat/0.png", "dog/1.png", "test/2.png"]))
    assert source.classes == ("cat", "dog", "test")
    assert source.about == {"kind": "image folder"}
    assert open_source(pictures(tmp_path / "one", ["train/0.png"])).classes == ("train",)


def test_parquet_files_of_splits(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    for number, split in enumerate(("test", "train", "validation")):
        table = pyarrow.table({"image": [png(number)], "label": [number]})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    source = open_source(tmp_path)
    assert [(item.name, item.label) for item in source.items] == [("data/train-00000-of-00001.parquet/0/0", 1)]
    assert source.about == {"kind": "parquet", "split": "train"}
    assert source.entries.passed == {"split test": 1, "split validation": 1}
    assert source.entries.listed == 3
    (other,) = open_source(tmp_path, reading=Reading(split="test")).items
    assert other.label == 0


def splits_of_tars(folder: Path) -> Path:
    for first, split in ((0, "train"), (2, "val")):
        tar(
            folder / f"{split}-0.tar",
            {f"{split}{n}": {"png": png(n), "txt": f"{n}".encode()} for n in (first, first + 1)},
        )
    return folder


@pytest.mark.parametrize("command", ["index", "write"])
def test_tar_files_of_splits(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = splits_of_tars(tmp_path / "theirs")
    start = ["index", theirs, "--out"] if command == "index" else ["write", theirs]
    options = ["--size", 16, "--workers", 1]
    assert run(*start, tmp_path / "out", *options) == 0
    assert "data_prep: split train alone is taken (files: train 1, validation 1)" in capsys.readouterr().out
    assert sorted(captions(tmp_path / "out")) == ["0", "1"]
    counted = adds_up(tmp_path / "out")
    assert (counted.listed, counted.passed) == (5, {"split validation": 1})
    for file in ("plan.json", "index.json"):
        data = json.loads((tmp_path / "out" / file).read_text())
        assert data.get("source", data)["split"] == "train"
    assert run(*start, tmp_path / "val", *options, "--split", "val") == 0
    assert sorted(captions(tmp_path / "val")) == ["2", "3"]
    assert run(*start, tmp_path / "dry", *options, "--split", "val", "--dry-run") == 0
    assert f"would {command} 2 images of 16 pixels" in capsys.readouterr().out
    if command == "index":
        assert run("index", f"{theirs}/{{train,val}}-0.tar", "--out", tmp_path / "both", *options) == 0
        assert sorted(captions(tmp_path / "both")) == ["0", "1", "2", "3"], "braces name the files"
    line = refused(capsys, *start, tmp_path / "out", *options, "--split", "all")
    assert "begun with" in line


# ---------------------------------------------------------------------------------------------------------------------
# --hold-out
# ---------------------------------------------------------------------------------------------------------------------


def expected_place(name: str) -> int:
    """A name's place among all names, written down again: the first 64 bits of a SHA-256, big-endian."""
    return int(hashlib.sha256(f"hold out/{name}".encode()).hexdigest()[:16], 16)


def names_of(folder: Path) -> set[str]:
    """The names of the samples in shards that `write` wrote."""
    import tarfile

    found = []
    for shard in folder.glob("shard-*.tar"):
        with tarfile.open(shard) as written:
            for member in written:
                if member.name.endswith(".json") and (file := written.extractfile(member)):
                    found.append(json.load(file)["source"])
    assert len(found) == len(set(found)) == read_index(folder).samples
    return set(found)


def files_of(*folders: Path) -> dict[str, bytes]:
    made = ("index.json", "samples.bin", "captions.bin", "plan.json")
    return {
        f"{folder.name}/{path.name}": path.read_bytes()
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.name in made or path.suffix == ".tar"
    }


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("in"), [f"{'abc'[n % 3]}/{n:02d}.png" for n in range(30)])


@pytest.mark.parametrize("option", ["0.3", "7"])
def test_a_written_set_in_two(option: str, thirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, held = tmp_path / "out", tmp_path / "out-held-out"
    command = ["write", thirty, out, "--size", 16, "--workers", 1, "--samples-per-shard", 8, "--hold-out", option]
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert f"{out} is finished" in said
    assert f"{held} is finished" in said
    names = sorted((f"{'abc'[n % 3]}/{n:02d}.png" for n in range(30)), key=expected_place)
    chosen = set(names[:7]) if option == "7" else {name for name in names if expected_place(name) < 0.3 * 2**64}
    assert 0 < len(chosen) < 30
    assert names_of(held) == chosen
    assert names_of(out) == set(names) - chosen
    assert read_index(out).class_names == read_index(held).class_names == ("a", "b", "c")
    for folder, kind in ((out, "held out"), (held, "not held out")):
        assert run("verify", folder, "--workers", 1) == 0
        counted = adds_up(folder)
        assert counted.listed == 30
        assert counted.passed == {kind: 30 - counted.used}
        assert read_index(folder).source["hold_out"] == option
    before = files_of(out, held)
    (out / "index.json").unlink()
    shutil.rmtree(held)
    assert run(*command) == 0, "interrupted, and resumed"
    assert files_of(out, held) == before
    assert run(*command) == 0
    assert capsys.readouterr().out.count("was finished already") == 2
    assert "begun with hold_out = " in refused(capsys, *command[:-2])


def test_a_set_that_grows_keeps_what_is_held_out(thirty: Path, tmp_path: Path) -> None:
    grown = tmp_path / "grown"
    shutil.copytree(thirty, grown)
    pictures(grown, [f"a/new{n}.png" for n in range(20)])
    found = []
    for source in (thirty, grown):
        out = tmp_path / f"out-{source.name}"
        assert run("write", source, out, "--size", 16, "--workers", 1, "--hold-out", "0.3") == 0
        found.append((names_of(out), names_of(out.with_name(f"{out.name}-held-out"))))
    (rest, held), (rest_grown, held_grown) = found
    assert held <= held_grown
    assert rest <= rest_grown
    assert not rest_grown & held_grown


@pytest.mark.parametrize("option", ["0.4", "5"])
def test_an_index_in_two(option: str, tmp_path: Path) -> None:
    """Over the same tar files; some of the samples cannot be used, and a whole tar file may go to one side."""
    theirs, usable = tmp_path / "theirs", {}
    for number in range(4):
        samples: dict[str, dict[str, bytes]] = {}
        for n in range(5 if number else 1):
            name, label = f"{number}.tar/{number}{n}.png", ["dog", "cat", "cow", "-1"][(number + n) % 4]
            image = b"bad" if n == 2 else png(5 * number + n)
            samples[f"{number}{n}"] = {"png": image, "cls": label.encode(), "txt": name.encode()}
            if n != 2 and label != "-1":
                usable[name] = label
        tar(theirs / f"{number}.tar", samples)
    out, held = tmp_path / "out", tmp_path / "out-held-out"
    command: list[Any] = ["index", theirs, "--out", out, "--size", 16, "--workers", 1, "--hold-out", option]
    command += ["--max-rejected", 0.6]
    assert run(*command) == 0
    ordered = sorted(usable, key=expected_place)
    chosen = ordered[:5] if option == "5" else [name for name in ordered if expected_place(name) < 0.4 * 2**64]
    assert sorted(captions(held)) == sorted(chosen)
    assert sorted(captions(out)) == sorted(set(ordered) - set(chosen))
    for folder in (out, held):
        assert read_index(folder).class_names == ("cat", "cow", "dog")
        assert run("verify", folder, "--workers", 1) == 0
        assert adds_up(folder).listed == 48
        assert all(entry.samples for entry in read_index(folder).shards)
    assert read_index(out).rejected + read_index(held).rejected == 16 - len(usable)
    before = files_of(out, held)
    for gone in (held / "index.json", out / "index.json"):
        gone.unlink()
        assert run(*command) == 0
        assert files_of(out, held) == before


def test_bad_hold_outs(thirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["write", thirty, tmp_path / "out", "--size", 16, "--hold-out"]
    for option, words in (
        ("0", "--hold-out = '0': expected a number of samples, or a share between 0 and 1"),
        ("1.5", "expected a number of samples, or a share"),
        ("some", "expected a number of samples, or a share"),
        ("nan", "expected a number of samples, or a share"),
        ("30", "--hold-out 30 takes all of 30 samples; expected some in each of the two folders"),
        ("0.000001", "--hold-out 0.000001 takes none of 30 samples"),
    ):
        assert words in refused(capsys, *command, option)
    assert not (tmp_path / "out").exists()
    inside = ["write", tmp_path / "out-held-out", tmp_path / "out", "--size", 16, "--hold-out", "0.5"]
    pictures(tmp_path / "out-held-out", ["a/0.png", "a/1.png"])
    assert "out-held-out' lies inside SOURCE" in refused(capsys, *inside)


def test_places_of_names() -> None:
    for name in ("a/00.png", "ü", ""):
        assert place_of(name) == expected_place(name)


@pytest.mark.parametrize("command", ["write", "index"])
def test_no_duplicate_stands_on_both_sides(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """30 names of 5 pictures each: one of each stays, in one folder or the other."""
    pictures = [encoded(Image.new("RGB", (20, 20), (40 * n, 9, 9))) for n in range(5)]
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    tar_of(
        theirs, {f"{n:03d}.{end}": (pictures[n % 5], b"0")[end == "cls"] for n in range(30) for end in ("png", "cls")}
    )
    options = ["--size", 16, "--workers", 1, "--hold-out", 0.4, "--dedupe", "exact"]
    arguments = [theirs, out] if command == "write" else [theirs, "--out", out]
    assert run(command, *arguments, *options) == 0
    folders = (out, tmp_path / "out-held-out")
    counts = [json.loads((folder / "entries.json").read_text()) for folder in folders]
    assert sum(count["used"] for count in counts) == 5
    assert all(count["used"] for count in counts)
    assert run(command, *arguments, *options) == 0
    assert capsys.readouterr().out.count("was finished already") == 2
    if command == "write":
        assert [count["filtered"]["--dedupe exact"] + count["used"] for count in counts] == [
            30 - counts[0]["passed"]["held out"],
            30 - counts[1]["passed"]["not held out"],
        ]
        assert run("write", theirs, tmp_path / "dry", *options, "--dry-run") == 0
        words = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [int(line[-1]) for line in words if line[0] == "left"] == [count["used"] for count in counts[::-1]]
