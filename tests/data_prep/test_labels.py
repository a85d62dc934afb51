"""Labels as people have them: which become classes, with which number, and which samples are rejected for theirs."""

from __future__ import annotations

import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.listing.base import Entries
from data_prep.listing.classes import Found, Given, Label, NoClass, label_of, parse_classes, settle
from data_prep.listing.reading import PLAIN, Reading, parse_image_keys
from data_prep.listing.tar_samples import samples_of
from data_prep.sources import open_source
from data_prep.writing import account
from megapix.errors import InputError
from megapix.shards.captions import Caption, unpack
from megapix.shards.index import read_index
from megapix.shards.table import RECORD
from tests.data_prep.test_several_captions import png, refused, run
from tests.data_prep.test_sources import add

BAD = (-1, "-1", 1.0, "1.0", "1e3", "", "  ", float("nan"), "NaN", True, [1], {"a": 1}, "x" * 201, float("inf"), "-inf")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (1_500_000, 1_500_000),
        ("5", 5),
        (" 07\n", 7),
        ("tabby cat \n", "tabby cat"),
        ("n01440764", "n01440764"),
        (b"cat", "cat"),
        ("1.0.2", "1.0.2"),
        ("none", "none"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_is_a_label(value: Any, expected: int | str) -> None:
    assert label_of(value, "cls") == expected
    assert type(label_of(value, "cls")) is type(expected)


def test_what_is_no_label() -> None:
    assert label_of(None, "cls") == NoClass("")
    for value in BAD:
        found = label_of(value, "json")
        assert isinstance(found, NoClass)
        assert found.reason.startswith("json: the class ")


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([2, 0, 2], ("0", "1", "2"), [2, 0, 2]),
        (["dog", "Cat", "cat"], ("Cat", "cat", "dog"), [2, 0, 1]),
        ([10**7, 9, 10**6], ("9", "1000000", "10000000"), [2, 0, 1]),
        (["dog", "cat", 3], ("cat", "dog"), [1, 0, None]),
        ([1, 1, "dog"], ("0", "1"), [1, 1, None]),
        ([1, NoClass(), NoClass("minus")], ("0", "1"), [1, None, None]),
        ([NoClass(), NoClass()], ("images",), [0, 0]),
        ([NoClass("minus"), NoClass()], ("images",), [None, None]),
    ],
)
def test_classes_of_a_set(labels: list[Label], names: tuple[str, ...], numbers: list[int | None]) -> None:
    classes, found = settle(labels, None, captioned=False)
    assert classes.names == names
    assert [None if why else number for number, why in found] == numbers


def test_with_captions_nothing_is_rejected_where_no_class_is_known() -> None:
    classes, found = settle([NoClass("minus"), NoClass()], None, captioned=True)
    assert (classes.names, found) == (("images",), [(0, ""), (0, "")])
    _, found = settle([NoClass("minus"), 0], None, captioned=True)
    assert found == [(0, "minus"), (0, "")], "but others have one"


def test_reasons_name_both_kinds() -> None:
    why = settle([5, "dog", "dog"], None, captioned=False)[1][0][1]
    assert why == "the class is 5, expected a name, as most labels are, such as 'dog'; --classes FILE settles it"


def test_free_text_is_no_class() -> None:
    found = Found()
    for n in range(10_000):
        found.add(f"text {n}")
    assert len(found.classes().names) == 10_000
    with pytest.raises(InputError, match=r"more than 10,000 distinct labels, such as 'one more' and 'text 0', are no "):
        found.add("one more")
    many = Found()
    for n in range(20_000):
        many.add(n)
    assert len(many.classes().names) == 20_000, "numbers are as many as there are"


# ---------------------------------------------------------------------------------------------------------------------
# --classes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "names", "labels"),
    [
        (b"dog\ncat\n", ("dog", "cat"), {"dog": 0, "cat": 1, 0: 0, 1: 1, "cow": None, 2: None}),
        (b"\xef\xbb\xbfdog\r\n\r\ncat  \r\n", ("dog", "cat"), {"dog": 0, "cat": 1}),
        (b'["dog", "cat"]', ("dog", "cat"), {"cat": 1, 0: 0}),
        (b'{"n02": 0, "n01": 2}', ("n02", "1", "n01"), {"n02": 0, "n01": 2, 2: None}),
        (b'{"cat": 0, "kitten": 0, "dog": 1}', ("cat", "dog"), {"kitten": 0, "cat": 0, "dog": 1}),
        (b'{"0": "dog", "1": "cat"}', ("dog", "cat"), {"cat": 1, 1: 1, "dog": 0}),
        (b"crane\ncrane\ncow\n", ("crane", "crane", "cow"), {"crane": None, 0: 0, 1: 1, "cow": 2}),
        (b"7\n3\n", ("7", "3"), {7: 0, 3: 1, "cow": None}),
        ('["dog"]'.encode("utf-16"), ("dog",), {"dog": 0}),
    ],
)
def test_classes_files(content: bytes, names: tuple[str, ...], labels: dict[Any, int | None], tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(content)
    given = parse_classes(str(tmp_path / "names"))
    assert isinstance(given, Given)
    assert given.names == names
    for label, expected in labels.items():
        if expected is None:
            with pytest.raises(ValueError, match="is not in --classes names"):
                given.number(label)
        else:
            assert given.number(label) == expected
    with pytest.raises(ValueError, match="it has no class"):
        given.number(NoClass())


def test_bad_classes_files(tmp_path: Path) -> None:
    assert parse_classes("") is None
    path = tmp_path / "names"
    for content, words in (
        (b'{"cat": -1}', "the number of 'cat' is -1"),
        (b'{"cat": "dog"}', "'cat' is no class number"),
        (b"[1]", "1 is no name"),
        (b"{", "Expecting property name"),
        (b"", "has 0 classes"),
        (b"\xe9\xe9\n", "byte 0 is not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            parse_classes(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        parse_classes(str(tmp_path / "missing"))


# ---------------------------------------------------------------------------------------------------------------------
# Tar files
# ---------------------------------------------------------------------------------------------------------------------


def tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar file of samples, key -> what follows the dot -> content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for key, members in samples.items():
            for kind, data in members.items():
                add(file, f"{key}.{kind}", data)
    return path


def labels_in(folder: Path) -> list[tuple[str, int]]:
    """(name of the class, number of its samples) of an index, counted in its table."""
    index = read_index(folder)
    found = [row[3] for row in RECORD.iter_unpack((folder / "samples.bin").read_bytes())]
    counted = [(name, found.count(number)) for number, name in enumerate(index.class_names)]
    assert counted == [(entry.name, entry.samples) for entry in index.classes]
    return counted


def label_column(folder: Path) -> list[int]:
    return [row[3] for row in RECORD.iter_unpack((folder / "samples.bin").read_bytes())]


def adds_up(folder: Path) -> account.Account:
    counted = account.load(folder)
    assert counted
    filtered, passed = sum(counted.filtered.values()), sum(counted.passed.values())
    assert counted.listed == counted.used + counted.rejected + filtered + counted.parts + passed
    return counted


def names_in_two_tars(folder: Path) -> Path:
    """'dog' comes first, in the first file, and 'cat' in the second alone; some samples have no class."""
    tar(folder / "0.tar", {"a": {"png": png(0), "cls": b"dog"}, "b": {"png": png(1), "cls": b"-1"}})
    rest = {
        "c": {"png": png(2), "json": b'{"label": "cat"}'},
        "d": {"png": png(3)},
        "e": {"png": png(4), "cls": b"dog"},
    }
    tar(folder / "1.tar", rest)
    return folder


REASONS = {
    "0.tar/b.png": "cls: the class is '-1', expected a name, or a whole number, 0 to 999999",
    "1.tar/d.png": "it has no class, but others have one; --classes none makes everything one class",
}


@pytest.mark.parametrize("command", ["index", "write"])
def test_names_of_all_tars_make_the_classes(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, out = names_in_two_tars(tmp_path / "theirs"), tmp_path / "out"
    start = ["index", theirs, "--out", out] if command == "index" else ["write", theirs, out, "--seed", 3]
    start += ["--size", 16, "--workers", 1]
    line = refused(capsys, *start)
    assert "2 of 5 samples cannot be used" in line or "1 of 5 samples" in line
    assert run(*start, "--max-rejected", 0.4) == 0
    assert "2 classes, the distinct labels in order: cat, dog" in capsys.readouterr().out
    assert labels_in(out) == [("cat", 1), ("dog", 2)]
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {one["source"]: one["reason"] for one in rejected} == REASONS
    assert adds_up(out).rejected == 2
    assert run("verify", out, "--workers", 1) == 0
    if command == "index":
        assert label_column(out) == [1, 0, 1]


def test_classes_given_for_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = names_in_two_tars(tmp_path / "theirs")
    (tmp_path / "names.json").write_text('{"dog": 2, "cow": 0}')
    command = ["index", theirs, "--size", 16, "--workers", 1, "--max-rejected", 1, "--out"]
    assert run(*command, tmp_path / "given", "--classes", tmp_path / "names.json") == 0
    assert labels_in(tmp_path / "given") == [("cow", 0), ("1", 0), ("dog", 2)]
    reasons = (tmp_path / "given" / "rejected.jsonl").read_text()
    assert "the class is" not in reasons.splitlines()[1]
    assert "its class 'cat' is not in --classes names.json" in reasons
    assert run("verify", tmp_path / "given", "--workers", 1) == 0
    line = refused(capsys, *command, tmp_path / "given")
    assert "begun with another --classes" in line
    (tmp_path / "given" / "index.json").unlink()
    about = (theirs / "0.tar").stat()
    (theirs / "0.tar").write_bytes(bytes(about.st_size))
    os.utime(theirs / "0.tar", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert run(*command, tmp_path / "given", "--classes", "none") == 0, "said anew, from the receipts"
    assert labels_in(tmp_path / "given") == [("images", 5)]
    names_in_two_tars(theirs)
    assert run(*command, tmp_path / "none", "--classes", "none") == 0
    assert labels_in(tmp_path / "none") == [("images", 5)]
    assert run("verify", tmp_path / "none", "--workers", 1) == 0


def test_large_numbers_are_put_in_order(tmp_path: Path) -> None:
    theirs = tar(
        tmp_path / "t" / "0.tar", {str(n): {"png": png(n), "cls": str(c).encode()} for n, c in enumerate((10**7, 7))}
    )
    assert run("index", theirs, "--out", tmp_path / "out", "--size", 16, "--workers", 1) == 0
    assert labels_in(tmp_path / "out") == [("7", 1), ("10000000", 1)]
    assert label_column(tmp_path / "out") == [1, 0]
    assert run("verify", tmp_path / "out", "--workers", 1) == 0


def test_captions_without_a_class(tmp_path: Path) -> None:
    """Labels that are none reject nothing where captions are there and no class is."""
    theirs = {n: {"png": png(int(n)), "json": b'{"caption": "a dog", "label": -1}'} for n in "012"}
    assert (
        run("index", tar(tmp_path / "t" / "0.tar", theirs), "--out", tmp_path / "out", "--size", 16, "--workers", 1)
        == 0
    )
    assert labels_in(tmp_path / "out") == [("images", 3)]
    assert run("verify", tmp_path / "out", "--workers", 1) == 0


def test_receipts_without_names_are_read(tmp_path: Path) -> None:
    """As an older version wrote them: a sample without a class is called by its place then."""
    theirs = tar(tmp_path / "t" / "0.tar", {"a": {"png": png(0), "cls": b"1"}, "b": {"png": png(1)}})
    command = ["index", theirs, "--out", tmp_path / "out", "--size", 16, "--workers", 1, "--max-rejected", 0.5]
    assert run(*command) == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("index.json", "samples.bin")}
    (path,) = (tmp_path / "out" / ".receipts").iterdir()
    data = json.loads(path.read_text())
    del data["names"]
    path.write_text(json.dumps(data))
    (tmp_path / "out" / "index.json").unlink()
    assert run(*command) == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert '"0.tar at byte ' in (tmp_path / "out" / "rejected.jsonl").read_text()


IMAGES = {
    "plain": {"a": ("jpg", "seg.png", "txt")},
    "dotted": {"a": ("image.jpg", "txt")},
    "several": {"a": ("jpg", "png")},
    "two dotted": {"a": ("image.jpg", "mask.png", "txt")},
    "upper case": {"a": ("Image.JPG", "MASK.PNG")},
    "dots in the name": {
        "22": ("05.png", "05.txt", "06.png"),
        "v2": ("0 (final).png",),
        "b": ("final.png", "final.txt"),
    },
}


@pytest.mark.parametrize(
    ("kind", "option", "images", "words"),
    [
        ("plain", "", ["a.jpg"], ""),
        ("dotted", "", ["a.image.jpg"], ""),
        ("several", "", [], "--image-key jpg takes one of them"),
        ("several", "png", ["a.png"], ""),
        ("several", "webp, PNG", ["a.png"], ""),
        ("several", "webp", [], "no member is webp (--image-key), found ['jpg', 'png']"),
        ("two dotted", "", [], "--image-key image.jpg takes one of them"),
        ("two dotted", "mask.png", ["a.mask.png"], ""),
        ("upper case", "image.jpg", ["a.Image.JPG"], ""),
        ("dots in the name", "", [], "what follows the first dot of"),
    ],
)
def test_which_member_is_the_image(kind: str, option: str, images: list[str], words: str, tmp_path: Path) -> None:
    path = tar(
        tmp_path / "t" / "0.tar", {key: {name: b"data" for name in names} for key, names in IMAGES[kind].items()}
    )
    entries = Entries()
    found = samples_of(path, entries, Reading(image_keys=parse_image_keys(option)))
    assert [sample.name for sample in found if not sample.fault] == images
    assert all(words in sample.fault for sample in found if sample.fault)
    assert len(found) == len(IMAGES[kind])
    members = sum(len(names) for names in IMAGES[kind].values())
    assert entries.listed == members == len(found) + entries.parts + sum(entries.passed.values())
    assert ("some images are members such as KEY.image.jpg" in "".join(entries.remarks)) == (kind == "dotted")


def test_a_key_that_comes_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first sample is used, the second is rejected, and the tar file is read to its end."""
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t" / "0.tar", "w") as file:
        for name, data in (("a.png", png(0)), ("a.cls", b"0"), ("a.png", png(1)), ("a.cls", b"1"), ("b.png", png(2))):
            add(file, name, data)
        add(file, "b.cls", b"0")
    for command in (["index", tmp_path / "t", "--out"], ["write", tmp_path / "t"]):
        out = tmp_path / command[0]
        assert run(*command, out, "--size", 16, "--workers", 1, "--max-rejected", 0.4) == 0
        assert labels_in(out) == [("0", 2)]
        assert json.loads((out / "rejected.jsonl").read_text())["reason"].startswith("key 'a' occurs twice")
        assert adds_up(out).listed == 6
        assert run("verify", out, "--workers", 1) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Folders, label files, parquet, zip
# ---------------------------------------------------------------------------------------------------------------------


def folders(root: Path, names: tuple[str, ...]) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "x.png").write_bytes(png(number))
    return root


def test_folders_that_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folders(tmp_path / "in", ("10", "9", "1"))
    source = open_source(root)
    assert source.classes == ("1", "9", "10")
    assert [item.name for item in source.items] == ["1/x.png", "9/x.png", "10/x.png"]
    assert source.about == {"kind": "image folder", "class_order": "number"}
    assert "class folders are in the order of their numbers: 1, 9, 10" in source.entries.remarks[0]
    by_name = open_source(root, reading=Reading(class_order="name"))
    assert (by_name.classes, by_name.about) == (("1", "10", "9"), {"kind": "image folder"})
    padded = open_source(folders(tmp_path / "padded", ("00", "01", "02")))
    assert (padded.about, padded.entries.remarks) == ({"kind": "image folder"}, [])
    mixed = folders(tmp_path / "mixed", ("10", "9", "cat"))
    assert open_source(mixed).classes == ("10", "9", "cat")
    with pytest.raises(InputError, match="--class-order number: class folder 'cat' is no number"):
        open_source(mixed, reading=Reading(class_order="number"))
    command = ["write", root, tmp_path / "out", "--size", 16, "--workers", 1]
    assert run(*command, "--class-order", "name") == 0, "as an older version did"
    line = refused(capsys, *command)
    assert "begun with class folders in the order of their names, this command has that of their numbers" in line
    assert "--class-order name is the old value" in line
    assert run(*command, "--class-order", "name") == 0


def test_given_classes_of_folders(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("dog\ncat\n")
    root = folders(tmp_path / "in", ("cat", "cow", "dog"))
    source = open_source(root, reading=Reading(classes=parse_classes(str(tmp_path / "names"))))
    assert source.classes == ("dog", "cat")
    assert [(item.name, item.label, bool(item.fault)) for item in source.items] == [
        ("cat/x.png", 1, False),
        ("cow/x.png", 0, True),
        ("dog/x.png", 0, False),
    ]


ROWS = {"0": "cat", "1": "dog", "2": "cat"}
LABEL_FILES: dict[str, tuple[str, bytes, dict[str, str | None]]] = {
    "csv": ("l.csv", b"0.png,cat\n1.png,dog\n2.png,cat\n", ROWS),
    "header, quotes, BOM, CRLF": (
        "l.csv",
        b'\xef\xbb\xbffile_name,label\r\n"0.png","cat"\r\n"1.png","dog"\r\n\r\n"2.png","cat"\r\n',
        ROWS,
    ),
    "label first": ("l.txt", b"cat,0.png\ndog,1.png\ncat,2.png\n", ROWS),
    "tsv, folders": ("l.tsv", b"in/0.png\tcat\n./1.png\tdog\nval\\2.png\tcat\n", ROWS),
    "no endings": ("l.csv", b"id,label\n0,cat\n1,dog\n2,cat\n", ROWS),
    "numbers, no endings": ("l.csv", b"0,1\n1,0\n2,1\n", {"0": "1", "1": "0", "2": "1"}),
    "blanks": ("l.txt", b"0.png cat\n1.png\tdog\n2.png cat \n", ROWS),
    "names with blanks": ("l.csv", b'0.png,"tabby cat, tame"\n1.png,dog\n2.png,dog\n', {"0": "tabby cat, tame"}),
    "three columns": ("l.csv", b"image,width,class\n0.png,5,cat\n1.png,5,dog\n2.png,6,cat\n", ROWS),
    "labels alone": ("l.csv", b"label\ncat\ndog\ncat\n", ROWS),
    "json": ("l.json", b'{"0.png": "cat", "1": "dog", "2.png": "cat"}', ROWS),
    "json pairs": ("l.json", b'[["0.png", "cat"], ["1.png", "dog"], ["2.png", "cat"]]', ROWS),
    "semicolons": ("l.csv", b"name;label\n0.png;cat\n1.png;dog\n2.png;cat\n", ROWS),
    "a line is missing": ("l.csv", b"0.png,cat\n1.png,dog\nother.png,cow\n", {"0": "cat", "1": "dog", "2": None}),
    "no class": ("l.csv", b"0.png,cat\n1.png,-1\n2.png,\n", {"0": "cat", "1": None, "2": None}),
    "two labels": ("l.csv", b"0.png,cat\n1.png,dog\n2.png,cat\n2.png,dog\n", {"0": "cat", "1": "dog", "2": None}),
    "ImageNet's solution": (
        "l.csv",
        b"ImageId,PredictionString\n0,n01 1 2 3 4 n01 5 6 7 8\n1,n02 1 2 3 4\n2,n01 1 2 3 4\n",
        {"0": "n01", "1": "n02", "2": "n01"},
    ),
}


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_label_files(kind: str, tmp_path: Path) -> None:
    name, content, expected = LABEL_FILES[kind]
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(png(number))
    (tmp_path / name).write_bytes(content)
    source = open_source(tmp_path / "in", reading=Reading(labels=tmp_path / name))
    found = {item.name[:-4]: None if item.fault else source.classes[item.label] for item in source.items}
    assert found | expected == found
    assert list(source.classes) == sorted({label for label in found.values() if label})
    if kind == "a line is missing":
        assert source.items[2].fault == "no label in l.csv"
        assert source.entries.remarks == ["l.csv has 1 lines without an image"]


def test_bad_label_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(png(0))
    for content, words in (
        (b"a.png,1\nb.png,2\n", "not one line names an image such as '0.png'"),
        (b"0.png,1,2\n", r"which of the columns \['1', '2'\] holds the labels is not plain"),
        (b"0.png,-1\n", "no image has a class; the first: label: the class is '-1'"),
        (b"\xff\xfe0", "is not UTF-16"),
    ):
        (tmp_path / "l.csv").write_bytes(content)
        with pytest.raises(InputError, match=words):
            open_source(tmp_path / "in", reading=Reading(labels=tmp_path / "l.csv"))


def test_a_class_named_with_the_separators_of_captions(tmp_path: Path) -> None:
    """Its name is the caption of its images: one caption, of weight 1, with blanks for the separators."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(png(9))
    (tmp_path / "l.csv").write_text("file,label\n0.png,big\x1f0_cat\x1ered\n")
    source = open_source(tmp_path / "in", reading=Reading(labels=tmp_path / "l.csv"))
    assert [unpack(item.caption) for item in source.items] == [(Caption("big 0 cat red"),)]


def test_labels_of_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def found(labels: Any, reading: Reading = PLAIN, **about: Any) -> list[str | None]:
        table = pyarrow.table({"image": [png(n) for n in range(len(labels))], "label": labels})
        pq.write_table(table.replace_schema_metadata(about.get("metadata")), tmp_path / "a.parquet")
        source = open_source(tmp_path / "a.parquet", reading=reading)
        return [None if item.fault else source.classes[item.label] for item in source.items]

    assert found(["dog", "cat", None, ""]) == ["dog", "cat", None, None]
    assert found(pyarrow.array([1, -1, None], pyarrow.int64())) == ["1", None, None]
    assert found([0.0, 1.0]) == [None, None]
    names = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": ["dog", "cat"]}}}}).encode()}
    assert found([1, 0, 2, -1], metadata=names) == ["cat", "dog", None, None]
    (tmp_path / "names").write_text("cat\ndog\n")
    given = Reading(classes=parse_classes(str(tmp_path / "names")))
    assert found([1, 0], given, metadata=names) == ["cat", "dog"], "by name"
    assert open_source(tmp_path / "a.parquet", reading=given).items[0].label == 0
    assert found([1, 0], given) == ["dog", "cat"], "without names, by number"


def test_a_file_without_labels_beside_one_with(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table({"image": [png(0)], "label": [5]}), tmp_path / "a.parquet")
    pq.write_table(pyarrow.table({"image": [png(1)]}), tmp_path / "b.parquet")
    first, second = open_source(tmp_path).items
    assert (first.label, first.fault) == (5, "")
    assert second.fault.startswith("it has no class, but others have one")


def test_labels_of_a_zip(tmp_path: Path) -> None:
    def items(labels: Any) -> tuple[tuple[str, ...], list[tuple[int, str]]]:
        with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
            for n in range(2):
                archive.writestr(f"{n}.png", png(n))
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
        source = open_source(tmp_path / "d.zip")
        return tuple(source.classes), [(item.label, item.fault) for item in source.items]

    assert items(None) == (("images",), [(0, ""), (0, "")])
    assert items([["0.png", 1]]) == (("0", "1"), [(1, ""), (0, "dataset.json has no label for it")])
    classes, ((_, why), _) = items([["0.png", -1], ["1.png", 0]])
    assert (classes, why) == (("0",), "dataset.json: the class is -1, expected a name, or a whole number, 0 to 999999")


def test_options_without_a_meaning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, names = folders(tmp_path / "in", ("a", "b")), tmp_path / "names"
    names.write_text("a\nb\n")
    for options, words in (
        (["--image-key", "jpg"], "--image-key has no meaning with --source image-folder; expected shards"),
        (["--image-key", "a,,b"], "--image-key 'a,,b': '' is no ending"),
        (["--classes", tmp_path / "none"], "cannot be read: No such file"),
    ):
        assert words in refused(capsys, "write", root, tmp_path / "out", "--size", 16, *options)
    assert not (tmp_path / "out").exists()


def test_images_are_what_they_were(tmp_path: Path) -> None:
    """The chosen member's pixels, and not the mask's, are in the shards."""
    theirs = {"a": {"mask.png": png(200), "image.png": png(3), "cls": b"cat"}}
    tar(tmp_path / "t" / "0.tar", theirs)
    command = ["write", tmp_path / "t", tmp_path / "out", "--size", 16, "--workers", 1]
    assert run(*command, "--image-key", "image.png") == 0
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as written:
        image = written.extractfile("000000000.png")
        assert image
        assert (np.asarray(Image.open(image)) == 3).all()
